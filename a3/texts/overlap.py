"""Finds documents that occur in other texts: by title, 13 consecutive words, or as a whole."""

import hashlib
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import regex

from a3.texts.reading import Document

# GPT-3's (arXiv 2005.14165, appendix C), like the rule: any so many words in a row, case and
# punctuation aside.
NGRAM = 13

REASONS = ("title", f"{NGRAM}-gram", "whole")

# Scripts without spaces between words: a character, its marks with it, is so many tenths of a word.
# In running text a word has 1.7 characters in Chinese, 1.9 in Japanese, and 3.2, marks not counted,
# in Thai (docs/log.md): 13 words are 22 ideographs, 26 kana, or 44 characters of the scripts of
# South East Asia whose lines only a dictionary can break (Unicode's class SA: Thai, Lao, Khmer,
# Burmese …).
TENTHS = {
    r"[\w&&[\p{Script_Extensions=Han}\p{Script=Yi}]]": 6,
    r"[\w&&[\p{scx=Hiragana}\p{scx=Katakana}\p{Script=Bopomofo}]]": 5,
    r"[\w&&\p{Line_Break=SA}]": 3,
}

# Characters; of lines that are longer, 13 words are compared in any case but for very long words.
LONGEST = 200

UNSPACED = "".join(TENTHS)

WORD = regex.compile(
    rf"[{UNSPACED}--\p{{M}}]\p{{M}}*"
    rf"|[\w--[\p{{M}}{UNSPACED}]][[\w\p{{M}}]--[{UNSPACED}]]*",
    regex.V1,
)

ASCII_WORD = re.compile(r"\w+")

SPACE = regex.compile(rf"(?<=[{UNSPACED}])\s+|\s+(?=[{UNSPACED}])", regex.V1)

# Soft hyphens, joiners, marks of direction, variants of emoji …
INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}")

# A fixed random odd number, and its inverse modulo 2^64.
BASE = int(np.random.PCG64(NGRAM).random_raw()) | 1

INVERSE = pow(BASE, -1, 2**64)


def exclusions(found: Sequence[Document], excluded: Sequence[Document]) -> list[str | None]:
    """Why each document may not be used: one of REASONS, or None if it may.

    That is where its title is one of `excluded`, where 13 words in a row of it occur there, or
    where all of it, however short, is a document or a line there. An empty title or document is
    the same as no other.
    """
    titles = {same(document.title) for document in excluded} - {""}
    numbers: dict[str, int] = {}
    wholes: set[bytes] = set()
    runs = [np.empty(0, np.uint64)]
    for document in excluded:
        text = plain(document.text)
        wholes.update(map(digest, [text, *text.split("\n"), *lines_together(text)]))
        runs.append(windows(text, numbers))
    wholes.discard(digest(""))
    known = np.unique(np.concatenate(runs))
    reasons: list[str | None] = []
    for document in found:
        text = plain(document.text)
        if same(document.title) in titles:
            reasons.append("title")
        elif any_in(windows(text, numbers), known):
            reasons.append(f"{NGRAM}-gram")
        else:
            reasons.append("whole" if digest(text) in wholes else None)
    return reasons


def plain(text: str) -> str:
    """`text` but for letter case, Unicode's compatible forms (NFKC) and invisible characters."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", INVISIBLE.sub("", text))


def same(text: str) -> str:
    """What two texts have in common that are the same but for case, Unicode form and white space.

    Beside scripts without spaces there is none.
    """
    return joined(plain(text))


def joined(text: str) -> str:
    """`text`, as `plain` leaves it, with one space for any white space, or none."""
    return " ".join((text if text.isascii() else SPACE.sub("", text)).split())


def digest(text: str) -> bytes:
    """A hash of a whole text, as `plain` leaves it: of its words, or where it has none, of all."""
    words = (ASCII_WORD if text.isascii() else WORD).findall(text)
    return hashlib.sha256((" ".join(words) or joined(text)).encode()).digest()


def lines_together(text: str) -> Iterator[str]:
    """Lines that follow each other in a text, as long as they are too short to be windows."""
    lines = [line for line in text.split("\n") if line.strip()]
    for start, line in enumerate(lines):
        for end in range(start + 2, len(lines) + 1):
            if len(line) > LONGEST:
                break
            line = " ".join(lines[start:end])
            yield line


def any_in(values: np.ndarray, known: np.ndarray) -> bool:
    """Whether any of `values` is in the sorted `known`; np.isin would sort `known` at each call."""
    if len(known) == 0:
        return False
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return bool((known[places] == values).any())


def windows(text: str, numbers: dict[str, int]) -> np.ndarray:
    """A 64-bit hash of the shortest run of 13 words or more from each word of `text` on.

    `text` is as `plain` leaves it; `numbers` gives each new word a number. Hashes are polynomials
    in BASE modulo 2^64 of what `mixed` makes of these. Uint64, of as many as there are such runs.
    """
    ascii = text.isascii()
    words = (ASCII_WORD if ascii else WORD).findall(text)
    places = [numbers.setdefault(word, len(numbers) + 1) for word in words]
    tenths = np.arange(len(words) + 1) * 10
    if not ascii:
        starts = "".join([word[0] for word in words]).encode("utf-32-le")
        np.cumsum(tenths_of_word()[np.frombuffer(starts, np.uint32)], out=tenths[1:])
    # Of the run from word i on, the word behind its end.
    ends = np.searchsorted(tenths, tenths + 10 * NGRAM)
    ends = ends[ends < len(tenths)]
    values = mixed(np.array(places, np.uint64))
    sums = np.zeros(len(words) + 1, np.uint64)
    np.cumsum(values * powers(BASE, len(words)), out=sums[1:])
    return (sums[ends] - sums[: len(ends)]) * powers(INVERSE, len(ends))


@cache
def tenths_of_word() -> np.ndarray:
    """How many tenths of a word a word is that starts with a character: (code points,) int64."""
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    tenths = np.full(len(characters), 10)
    for script, share in TENTHS.items():
        for found in regex.finditer(f"{script}+", characters, regex.V1):
            tenths[found.start() : found.end()] = share
    return tenths


def mixed(numbers: np.ndarray) -> np.ndarray:
    """64 bits as good as random of each number (SplitMix64's finisher), so that no sums meet."""
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


def powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1 … modulo 2^64: (count,) uint64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)
