"""Stage text: reads a source as documents."""

import html
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.files import sha256, write_record
from a3.core.provenance import provenance
from a3.models.inputs import hash_inputs
from a3.stages.inputs.asked import LETTERS, asked
from a3.stages.inputs.hub import hub_commit, hub_rows
from a3.stages.inputs.sources import PLACES, origin_of, rows_of
from a3.stages.inputs.wheels import wheel_file, wheel_members
from a3.texts.blocks import interleave
from a3.texts.files import FILE_TYPES, inner, text_files
from a3.texts.reading import (
    RECORDS,
    Document,
    as_document,
    decode,
    load_documents,
    parse,
    read_bytes,
    type_of,
    unpack,
    write_documents,
)

PROSE = ("text", "lines", "paragraphs", "endoftext", "doc-tags")

FORMATS = (*PROSE, "summaries", "jsonl", "questions", "dataset")

# Where a record of format questions has what is asked, with its lettered answers.
ASKED = "input.0.content"

# What parts the documents of a file of format endoftext, as in files that models are trained on.
END_OF_TEXT = "<|endoftext|>"

BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")

DOC_TAG = re.compile(r'^<doc [^\n]*?title="([^\n]*)">\n(.*?)\n?^</doc>$', re.MULTILINE | re.DOTALL)


def make_documents(
    spec: dict[str, Any], wheels: Path | None, members: Sequence[Path], out: Path
) -> None:
    """Write a text's `documents` to `out`, a .jsonl file, and its provenance beside it in JSON.

    `members`: of a mixture, the documents of each member, in the order of their names.
    """
    if out.suffix != ".jsonl":
        raise A3Error(f"{out}: expected a name that ends in .jsonl. Choose such a name.")
    if origin_of(spec["source"], (*PLACES, "mix")) == "mix":
        shares = spec["source"]["mix"]
        if len(members) != len(shares):
            raise A3Error(
                f"a mixture of {', '.join(sorted(shares))}: found {len(members)} files of "
                "documents, expected one for each. Name them in this order (--members)."
            )
        paths = dict(zip(sorted(shares), members, strict=True))
        write_documents(out, mixture(paths, shares))
        inputs = {f"{path.parent.name}/{path.name}": sha256(path) for path in members}
        say(out, __name__, text=spec, inputs=inputs)
    else:
        write_documents(out, documents(spec, wheels))
        say(out, __name__, text=spec)


def say(path: Path, stage: str, **settings: Any) -> None:
    """Write the content hash of a file and its provenance, by a module, beside it in JSON."""
    made: dict[str, Any] = {
        "files": {path.name: sha256(path)},
        "provenance": provenance(stage, **settings),
    }
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


def mixture(paths: Mapping[str, Path], shares: Mapping[str, float]) -> list[Document]:
    """Documents of several files, each with its member's name, as `interleave` mixes them."""
    members = {
        name: [replace(document, member=name) for document in load_documents(path)]
        for name, path in sorted(paths.items())
    }
    return interleave(members, shares)


def documents(spec: dict[str, Any], wheels: Path | None = None) -> list[Document]:
    """Documents of a text: `source`, and optionally `format` and `min_chars`.

    A file is what its name says, as everywhere (a3.texts.reading), unless `format` says otherwise:
    doc-tags (`<doc … title="…">` blocks), summaries (JSON of title: {title, extract}), text (each
    file one document, whatever it holds), lines (each line one), paragraphs (cut at blank lines, as
    soon as a document has `min_chars`), endoftext (parted by `<|endoftext|>`), jsonl (JSON of
    records), questions (records as OpenAI's evals have them: what is asked, with its lettered
    answers, is the text, the right answer the title), dataset (records, as the name says; of a hub
    data set its rows). Of records `column`
    of the source (default text) is the text, and title the title; in JSON dots lead to nested
    fields.
    Raises A3Error when the source cannot be read as that format or nothing is left of it.
    """
    source, form = spec["source"], spec.get("format")
    hub = origin_of(source) == "hub"
    allowed = ("dataset",) if hub else FORMATS
    if form is not None and form not in allowed:
        raise A3Error(
            f"text {source}: format is {form}, expected {' or '.join(allowed)}. Correct format."
        )
    least = spec.get("min_chars", 1)
    found = hub_documents(source) if hub else local_documents(source, form, wheels, least)
    kept = [document for document in found if len(document.text.strip()) >= least]
    if not any(document.text.strip() for document in kept):
        raise A3Error(
            f"text {source}: {len(found)} documents, none of at least {max(least, 1)} characters. "
            "Correct the source or lower min_chars."
        )
    return kept


def local_documents(
    source: dict[str, Any], form: str | None, wheels: Path | None, least: int
) -> list[Document]:
    """Documents of the files of a wheel or path source, as `documents` says; `least` characters."""
    column = source.get("column")
    if column is not None and form in PROSE:
        raise A3Error(f"text {source}: format {form} has no columns. Leave column out.")
    found = [
        document
        for name, content in contents(source, form, wheels)
        for document in parse_as(form, name, content, column, least)
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
        types: dict[str | None, set[str]] = {each: {"text"} for each in PROSE}
        types |= {"dataset": set(RECORDS)}
        types |= {key: {"json"} for key in ("summaries", "jsonl", "questions")}
        types[None] = set(FILE_TYPES.values())
        files = text_files(Path(source["path"]), types[form])
        yield from ((str(file), read_bytes(file)) for file in files)


def parse_as(
    form: str | None, name: str, content: bytes, column: str | None, least: int
) -> list[Document]:
    """Documents of one file, in one of the formats; A3Error if it is not of that format.

    Those of format paragraphs have `least` characters or more, but for the last one.
    """
    if form == "dataset" and type_of(name) not in RECORDS:
        raise A3Error(f"{name}: expected a file of records for format dataset. Correct format.")
    if form in (None, "dataset", "jsonl"):
        return parse(name, content, column, "json" if form == "jsonl" else None)
    if form == "questions":
        return questions(name, content)
    text = decode(unpack(name, content), name)
    if form == "lines":
        return [Document("", line) for line in text.split("\n")]
    if form == "paragraphs":
        return [Document("", passage) for passage in passages(text, least)]
    if form == "endoftext":
        return [Document("", part.strip()) for part in text.split(END_OF_TEXT)]
    if form == "doc-tags":
        return doc_tags(name, text)
    if form == "summaries":
        return summaries(name, text)
    return [Document(inner(name)[0], text)]


def questions(name: str, content: bytes) -> list[Document]:
    """Questions with lettered answers, and the right answers as titles; A3Error for others."""
    found = []
    for where, fields in RECORDS["json"](name, unpack(name, content), ASKED):
        text = as_document(fields, ASKED, where).text
        _, answers = asked(text)
        letter = fields.get("ideal") if isinstance(fields, dict) else None
        if letter not in tuple(LETTERS[: len(answers)]):
            raise A3Error(
                f"{where}: ideal is {letter!r}, and {ASKED} has {len(answers)} answers; expected "
                "its letter, after a question: Which? A: this; B: that. Correct the record."
            )
        found.append(Document(answers[LETTERS.index(letter)], text))
    return found


def passages(text: str, least: int) -> Iterator[str]:
    """Runs of paragraphs with `least` characters or more, each as short as can be; then the rest.

    Between paragraphs are one or more blank lines.
    """
    passage = ""
    for paragraph in BLANK_LINES.split(text):
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph
        if len(passage.strip()) >= least:
            yield passage.strip("\n")
            passage = ""
    yield passage.strip("\n")


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
