"""Questions with lettered answers: Which of them? A: this; B: that."""

import re
from string import ascii_uppercase

LETTERS = ascii_uppercase

ANSWER = re.compile(r"[?;] ([A-Z]): ")


def asked(text: str) -> tuple[str, list[str]]:
    """The question of a text and its answers; no answers if their letters are not A, B, C …"""
    question, *rest = ANSWER.split(text)
    letters, answers = rest[::2], rest[1::2]
    if "".join(letters) != LETTERS[: len(letters)]:
        return text, []
    return f"{question}?", [answer.removesuffix(".") for answer in answers]
