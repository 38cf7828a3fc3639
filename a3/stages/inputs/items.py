"""Makes multiple-choice items from documents: questions, or choose the title of a description."""

import json
import random
import re
from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.files import whole_file
from a3.stages.inputs.asked import asked
from a3.stages.inputs.split import WORD
from a3.stages.inputs.text import say
from a3.texts.overlap import same
from a3.texts.reading import Document, load_documents, text_sha256

# Of a description. More of them do not help a dense SmolLM2-135M: on 300 items it gets 0.70 right
# with 15 words, 0.80 with 20 and 0.77 with 25, and time grows with them.
WORDS = 20

CHOICES = 4

SMALL_WORDS = {"and", "for", "from", "the", "with"}


def harness_items(docs_path: Path, items: int, seed: int, out_dir: Path) -> None:
    """Write items.jsonl: questions, or the title, out of 4, of a description in which it is masked.

    What made them lies beside them in items.json.

    Each item has query, choices and gold. Documents with lettered answers of which their title is
    the right one (format questions) are asked as they are, drawn by `seed`. Of others, a
    description is the first 20 words of a document of at least that many; the 3 other titles are
    those of other documents, drawn by `seed`. Raises A3Error when there are too few documents.
    """
    found = load_documents(docs_path)
    draw = random.Random(seed)
    made = drawn_questions(docs_path, found, items, draw) or descriptions(
        docs_path, found, items, draw
    )
    with whole_file(out_dir / "items.jsonl") as temporary:
        lines = (json.dumps(fields, ensure_ascii=False, sort_keys=True) + "\n" for fields in made)
        temporary.write_text("".join(lines), encoding="utf-8")
    said = {"items": items, "seed": seed, "text_sha256": text_sha256(docs_path)}
    say(out_dir / "items.jsonl", __name__, **said)


def drawn_questions(
    path: Path, found: list[Document], items: int, draw: random.Random
) -> list[dict[str, Any]]:
    """Items of documents that are questions; empty if the first is none."""
    if not found or found[0].title not in asked(found[0].text)[1]:
        return []
    if len(found) < items:
        raise A3Error(f"{path}: {len(found)} questions, needed {items}. Ask for fewer items.")
    for number, document in enumerate(found):
        if document.title not in asked(document.text)[1]:
            raise A3Error(
                f"{path}: document {number} ({document.title!r}) is no question with its title "
                "among the answers, and the first document is one. Correct it, or leave it out."
            )
    made = []
    for document in draw.sample(found, items):
        question, choices = asked(document.text)
        gold = choices.index(document.title)
        made.append({"query": f"{question}\nAnswer:", "choices": choices, "gold": gold})
    return made


def descriptions(
    docs_path: Path, found: list[Document], items: int, draw: random.Random
) -> list[dict[str, Any]]:
    """Items that ask for the title of a description."""
    usable = [d for d in found if d.title.strip() and len(d.text.split()) >= WORDS]
    # Of titles that differ in case or spaces only, one.
    titles = list({same(title): title for title in sorted({d.title for d in usable})}.values())
    if len(usable) < items or len(titles) < CHOICES:
        raise A3Error(
            f"{docs_path}: {len(usable)} documents have a title and {WORDS} words, needed {items} "
            f"(and {CHOICES} titles). Ask for fewer items or give harness a larger share."
        )
    return [item(document, titles, draw) for document in draw.sample(usable, items)]


def item(document: Document, titles: list[str], draw: random.Random) -> dict[str, Any]:
    """One multiple-choice item; `draw` chooses the other titles and the order."""
    own = same(document.title)
    others = [title for title in draw.sample(titles, CHOICES) if same(title) != own]
    choices = [document.title, *others[: CHOICES - 1]]
    draw.shuffle(choices)
    start = " ".join(mask(document.title, document.text).split()[:WORDS])
    return {
        "query": f"{start}\n\nThis is the definition of",
        "choices": choices,
        "gold": choices.index(document.title),
    }


def mask(title: str, text: str) -> str:
    """`text` with the words of `title`, and inflections up to 3 letters longer, as ___."""
    words = WORD.findall(title)
    telling = [w for w in words if len(w) > 2 and w.lower() not in SMALL_WORDS] or words
    if not telling:
        return text
    pattern = rf"\b(?:{'|'.join(map(re.escape, telling))})\w{{0,3}}\b"
    return re.sub(pattern, "___", text, flags=re.IGNORECASE)
