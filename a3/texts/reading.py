"""Reads texts as documents. In every command the file's name determines its type.

A file is either prose, which is one document, or records, each of which is a document. The
Snakefile imports this, so it imports nothing heavy.
"""

import csv
import hashlib
import io
import json
import lzma
import math
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.files import sha256, whole_file
from a3.texts.files import FILE_TYPES, READABLE, UNPACK, inner, text_files

# How files that are no text begin.
MAGIC = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "packed by gzip (.gz)",
    b"BZh": "packed by bzip2 (.bz2)",
    b"\xfd7zXZ": "packed by xz (.xz)",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet (.parquet)",
    b"%PDF": "a PDF",
}

DELIMITERS = ",;\t|"

# No value at all, where null is one.
MISSING = object()


@dataclass(frozen=True)
class Document:
    """An article, page or speech; `title` may be empty. `member`: of a mixture, which it is of."""

    title: str
    text: str
    member: str = ""


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write one JSON object a line (title, text, member if any), whole or not at all."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for document in documents:
            fields = {
                key: value for key, value in asdict(document).items() if value or key != "member"
            }
            stream.write(json.dumps(fields, ensure_ascii=False, sort_keys=True) + "\n")


def load_documents(path: Path) -> list[Document]:
    """Documents of a file, or of all files of a folder in the order of their names.

    Records have the field text and, optionally, title. Raises A3Error, with the line or record,
    for what is missing, holds no text, or is no such file.
    """
    files = text_files(path)
    found = [document for file in files for document in parse(str(file), read_bytes(file))]
    if not any(document.text.strip() for document in found):
        raise A3Error(f"{path}: {len(found)} documents, none with text. Choose another.")
    return found


# --- files ----------------------------------------------------------------------------------------
def read_bytes(path: Path) -> bytes:
    """The content of a file; raises A3Error when there is none, or it cannot be read."""
    if not path.is_file():
        raise A3Error(f"{path}: no such file. Build it, or correct the path.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise A3Error(f"{path}: cannot be read ({error.strerror}). Correct it.") from error


def text_sha256(path: Path) -> str:
    """Hex SHA-256 of what is read of a text: a file's content, or a folder's names and hashes."""
    if not path.is_dir():
        return sha256(path)
    lines = [f"{sha256(file)} {file.relative_to(path).as_posix()}\n" for file in text_files(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; A3Error when missing, empty or other."""
    return decode(read_bytes(path), str(path))


def unpack(name: str, content: bytes) -> bytes:
    """The content of a file that may be packed, as its name says; raises A3Error when damaged."""
    packing = inner(name)[2]
    try:
        return UNPACK[packing](content) if packing else content
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise A3Error(f"{name}: cannot be unpacked ({error}). Fetch it again.") from error


def decode(content: bytes, name: str) -> str:
    """The text of a file called `name`; raises A3Error when it is empty or not text in UTF-8."""
    found = next((what for start, what in MAGIC.items() if content.startswith(start)), None)
    if found is not None:
        raise A3Error(f"{name}: is {found}, expected text in UTF-8. Convert or rename it.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise A3Error(
            f"{name}: byte {error.start} is not UTF-8 ({error.reason}). Convert the file to UTF-8."
        ) from error
    if "\0" in text:
        raise A3Error(
            f"{name}: byte {content.index(0)} is zero: not text. Convert the file to UTF-8."
        )
    if not text.strip():
        raise A3Error(f"{name}: the file holds no text. Choose another, or build it again.")
    return text


# --- documents ------------------------------------------------------------------------------------
def type_of(name: str) -> str:
    """The type of a file, as its name says; raises A3Error if it says none."""
    suffix = inner(name)[1]
    if suffix and suffix not in FILE_TYPES:
        raise A3Error(
            f"{name}: {suffix} is not a known text format; expected {READABLE}. Convert it, or "
            "rename it to .txt if it is plain text."
        )
    return FILE_TYPES[suffix] if suffix else "text"


def parse(
    name: str, content: bytes, column: str | None = None, as_type: str | None = None
) -> list[Document]:
    """Documents of a file's content; of records `column` (default text) is the text.

    Without `as_type` it is the name's. Raises A3Error if the content is of another, or the name
    says none.
    """
    file_type = as_type or type_of(name)
    content = unpack(name, content)
    if file_type != "text":
        return [
            as_document(fields, column or "text", where)
            for where, fields in RECORDS[file_type](name, content, column or "text")
        ]
    text = decode(content, name)
    if column is not None:
        raise A3Error(f"{name}: plain text has no column {column!r}. Leave column out.")
    refuse_records(text, name)
    return [Document(inner(name)[0], text)]


def refuse_records(text: str, name: str) -> None:
    """Raise A3Error if a file that is called prose holds records."""
    start = text.lstrip()
    found, first = None, start.split("\n", 1)[0]
    if start[0] in "{[" and (is_json(start) or (start[0] == "{" and is_json(first))):
        found = "for JSON a name that ends in .json or .jsonl"
    for delimiter in DELIMITERS:
        cells = [cell.strip().strip('"') for cell in first.split(delimiter)]
        if "text" in cells[:-1] + cells[1:] and all(re.fullmatch(r"\w+", cell) for cell in cells):
            found = "for a table a name that ends in .csv or .tsv"
    if found:
        raise A3Error(f"{name}: holds records, not prose. Rename it: expected {found}.")


def is_json(text: str) -> bool:
    """Whether all of a text is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def as_document(fields: Any, column: str, where: str) -> Document:
    """A record, or a string alone, as a document; raises A3Error that says where it is."""
    if isinstance(fields, str):
        fields = {column: fields}
    text = look_up(fields, column)
    if text is MISSING:
        found = sorted(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
        raise A3Error(
            f"{where}: found {found}, expected an object whose {column} is a string. Where a text "
            'has another name, name it as column: a3 text \'{"source": {"path": …, '
            '"column": …}}\' -o docs.jsonl makes documents that every command reads.'
        )
    if is_null(text):
        text = ""
    elif not isinstance(text, str):
        raise A3Error(
            f"{where}: {column} is {shown(text)}, expected a string or null. Write the text "
            "of each record as one string."
        )
    title, member = (word(fields.get(key), key, where) for key in ("title", "member"))
    try:
        f"{title}{text}{member}".encode()
    except UnicodeEncodeError as error:
        raise A3Error(f"{where}: half a surrogate pair ({error}). Correct it.") from error
    return Document(title, text, member)


def look_up(record: Any, column: str) -> Any:
    """The value of a record's field; MISSING if it has none.

    If there is no field of that name, its dots lead to nested ones: of messages.0.content, the
    content of the first of the messages.
    """
    if isinstance(record, dict) and column in record:
        return record[column]
    value = record
    for key in column.split("."):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and re.fullmatch("[0-9]{1,9}", key) and int(key) < len(value):
            value = value[int(key)]
        else:
            return MISSING
    return value


def word(value: Any, key: str, where: str) -> str:
    """A title: a string as it is, the digits of a whole number, and "" of what is null or NaN."""
    if is_null(value):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise A3Error(f"{where}: {key} is {shown(value)}, expected a string or null. Correct it.")


def is_null(value: Any) -> bool:
    """Whether a value says that there is none: null, and NaN, which stands for it in tables."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def shown(value: Any) -> str:
    """A value of another type, short."""
    said = repr(value)
    return f"{said if len(said) <= 40 else said[:40] + '…'} ({type(value).__name__})"


# --- records --------------------------------------------------------------------------------------
def json_records(name: str, content: bytes, _: str) -> Iterator[tuple[str, Any]]:
    """(where, value) of each item of an array, of each line, or of one object alone."""
    text = decode(content, name)
    # Not splitlines: JSON leaves other line separators, such as U+2028, inside strings.
    lines = {i: line for i, line in enumerate(text.split("\n"), 1) if line.strip()}
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if inner(name)[1] == ".json" and not is_json(next(iter(lines.values()))):
            raise A3Error(f"{name}: not JSON ({error}). Correct the file.") from error
    else:
        items = whole if isinstance(whole, list) else [whole]
        yield from ((f"{name}: record {i}", item) for i, item in enumerate(items, 1))
        return
    for number, line in lines.items():
        where = f"{name}: line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise A3Error(f"{where}: not JSON ({error}). Write one JSON object a line.") from error


def table_records(name: str, content: bytes, column: str) -> Iterator[tuple[str, Any]]:
    """(where, cells by column) of each row of a table with a header, after Python's csv module.

    Cells are text whatever they look like. The delimiter is the one that finds `column`.
    """
    text = decode(content, name)
    csv.field_size_limit(sys.maxsize)  # a cell may be a book

    def fit(delimiter: str) -> tuple[bool, int]:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        head = next(filter(None, rows))
        return column in head, len(head)

    try:
        delimiter = max("\t" if inner(name)[1] == ".tsv" else DELIMITERS, key=fit)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        if inner(name)[1] == ".tsv":
            refuse_doubtful_quotes(text, name)
        head = next(filter(None, reader))
        if len(set(head)) != len(head):
            raise A3Error(f"{name}: two columns have one name: {head}. Rename one.")
        if column not in head:
            yield name, dict.fromkeys(head)
        for cells in filter(None, reader):
            where = f"{name}: line {reader.line_num}"
            if len(cells) != len(head):
                raise A3Error(
                    f"{where}: found {len(cells)} cells, expected {len(head)}: {', '.join(head)}. "
                    "Correct the line; a cell with a delimiter or a line break needs quotes."
                )
            yield where, dict(zip(head, cells, strict=True))
    except csv.Error as error:
        raise A3Error(f"{name}: not a table ({error}). Correct its quotes.") from error


def refuse_doubtful_quotes(text: str, name: str) -> None:
    """Raise A3Error if quotes in a .tsv may be its cells' own, or such as tables put around.

    Some programs write cells as they are, others quote like .csv: all of the header, or none but
    cells that need it. Where both readings are the same, or the file is as the latter write it, it
    is read like .csv, unless lines would be joined that are whole rows.
    """
    if '"' not in text or text.startswith('"'):
        return
    lines = text.splitlines()
    plain = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    quoted = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
    if plain == quoted:
        return
    written = io.StringIO()
    csv.writer(written, delimiter="\t", lineterminator="\n").writerows(quoted)
    merged = len(plain) != len(quoted) and len({len(row) for row in plain}) == 1
    if written.getvalue().splitlines() == lines and not merged:
        return
    raise A3Error(
        f"{name}: its quotes may be part of its cells, or around them as in a .csv, and nothing "
        "tells which. Save it as .csv or .jsonl."
    )


def parquet_records(name: str, content: bytes, column: str) -> Iterator[tuple[str, Any]]:
    """(where, values by column) of each row, of the columns that a document needs."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        names = table.schema_arrow.names
        if column not in names:
            yield name, dict.fromkeys(names)
        wanted = [each for each in (column, "title", "member") if each in names]
        rows = (row for batch in table.iter_batches(columns=wanted) for row in batch.to_pylist())
        yield from ((f"{name}: record {i}", row) for i, row in enumerate(rows, 1))
    # Text that is not UTF-8 is of type ValueError.
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise A3Error(f"{name}: cannot be read as Parquet ({reason}). Correct the file.") from error


RECORDS = {
    "json": json_records,
    "csv": table_records,
    "tsv": table_records,
    "parquet": parquet_records,
}
