"""One reader for texts in every command: kinds of files, null, folders, what is refused."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import pandas
import pytest
from tiny import document, run, tiny_llama

from a3.cli.main import entry, main
from a3.core.errors import A3Error
from a3.core.files import read_json, sha256
from a3.stages.inputs.text import documents
from a3.texts.files import text_files
from a3.texts.reading import Document, load_documents, text_sha256

ROWS = [
    {"title": "One", "text": 'says "a, b; c | d"\tand\nmore\u2028still one'},
    {"title": None, "text": "null"},
    {"title": "None", "text": "NA"},
    {"title": "007", "text": "中文 😀 naïve"},
    {"title": " ", "text": ""},
    {"title": "", "text": "x" * 200_000},
]
EXPECTED = [Document(row["title"] or "", row["text"]) for row in ROWS]


def table(delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, ["title", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue().encode("utf-8-sig")


def parquet() -> bytes:
    return pandas.DataFrame(ROWS).to_parquet()


LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
CONTENTS = {
    "a.jsonl": LINES,
    "a.ndjson": LINES.replace(b"\n", b"\r\n"),
    "lines.json": LINES,
    "array.json": json.dumps(ROWS, indent=1).encode("utf-8-sig"),
    "array.jsonl": json.dumps(ROWS).encode(),
    "a.csv": table(","),
    "semicolons.csv": table(";"),
    "bars.csv": table("|"),
    "a.tsv": table("\t"),
    "a.parquet": parquet(),
}
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("name", CONTENTS)
def test_the_same_records_are_the_same_documents(tmp_path, name, upper, packing):
    path = tmp_path / ((name.upper() if upper else name) + packing)
    path.write_bytes(PACK[packing](CONTENTS[name]))
    assert load_documents(path) == EXPECTED
    assert documents(entry(str(path), "texts")) == EXPECTED  # a3 text, a3 compress
    kept = [document for document in EXPECTED if document.text]
    assert documents({"source": {"path": str(path)}}) == kept  # a config: min_chars is 1


@pytest.mark.parametrize("name", ["A.TXT", "a.md", "a", "a.txt.gz"])
def test_prose_is_one_document(tmp_path, name):
    said = "# River\r\n\r\n = Heading = \r\nA river, [1] {2}\u2028is. text, title\n"
    content = ("\ufeff" + said).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    expected = [Document(name.split(".")[0], said)]
    assert load_documents(tmp_path / name) == expected
    assert documents(entry(str(tmp_path / name), "texts")) == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model") / "m")


def test_every_command_reads_the_same(model, tmp_path):
    rows = [json.loads(document(i)) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(map(document, range(40))))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "C.CSV").write_text(pandas.DataFrame(rows).to_csv(index=False))
    shares = json.dumps({"test": 0.5, "harness": 0.5})
    recipe = {"config": {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}}
    recipe |= {"text": "t", "vocab_size": 258, "steps": 2, "batch_size": 1, "block_length": 16}
    recipe |= {"learning_rate": 0.01, "seed": 0}
    seen = []
    for name in ("a.jsonl", "b.json", "C.CSV"):
        text, out = tmp_path / name, tmp_path / f"of-{name}"
        block = ["--tokens", "256", "--block-length", "64"]
        (tmp_path / "a.json").write_text("[]")  # beside a.jsonl, and not what a3 text writes there
        run("text", text, "-o", out / "docs.jsonl")
        run("split", text, "--shares", shares, "-o", out / "split")
        run("items", text, "--items", "4", "-o", out / "items")
        run("eval", "ppl", model, "--text", text, *block, "-o", out / "ppl.json")
        run("collect", model, "--text", text, *block, "-o", out / "down_diagonal.safetensors")
        run("train", json.dumps({"source": {"train": recipe}}), "--text", text, "-o", out / "t")
        ppl = read_json(out / "ppl.json")
        assert ppl["text_sha256"] == sha256(text)
        made = ("docs.jsonl", "split/test.jsonl", "items/items.jsonl", "t/model.safetensors")
        sums = pandas.Series(read_safetensors(out / "down_diagonal.safetensors"))
        seen.append([ppl["token_ids_sha256"], sums.sum(), *(sha256(out / one) for one in made)])
    assert seen[0] == seen[1] == seen[2]


def read_safetensors(path: Path) -> dict[str, float]:
    from safetensors.torch import load_file

    return {name: float(value.double().sum()) for name, value in load_file(path).items()}


# --- null -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", ["null", "NaN", '""', None])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_null_is_no_word(tmp_path, title, suffix):
    field = "" if title is None else f'"title": {title}, '
    line = f'{{{field}"member": null, "text": "x"}}\n'
    (tmp_path / f"a{suffix}").write_text(line + '{"text": null}\n{"text": NaN, "title": "t"}\n')
    expected = [Document("", "x"), Document("", ""), Document("t", "")]
    assert load_documents(tmp_path / f"a{suffix}") == expected


def test_nan_in_parquet_is_no_word(tmp_path):
    frame = pandas.DataFrame({"text": ["a", None], "title": [float("nan"), float("nan")]})
    frame.to_parquet(tmp_path / "a.parquet")
    assert load_documents(tmp_path / "a.parquet") == [Document("", "a"), Document("", "")]


def test_a_whole_number_is_its_digits(tmp_path):
    """As in CSV, where 1984 has no quotes either."""
    (tmp_path / "a.jsonl").write_text('{"title": 1984, "text": "x"}\n')
    (tmp_path / "a.csv").write_text("title,text\n1984,x\n")
    pandas.DataFrame({"title": [1984], "text": ["x"]}).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert load_documents(tmp_path / name) == [Document("1984", "x")]


def test_titles_of_summaries_may_be_null(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": {"title": null, "extract": " x "}}')
    assert documents({"source": {"path": str(path)}, "format": "summaries"}) == [Document("", "x")]


def test_items_never_ask_for_null(tmp_path):
    lines = [json.loads(document(i)) for i in range(30)]
    titles = [None, "", "  ", "nan", "None", "NONE", " none ", "A", "B", "Ｃ", "C"]
    rows = [line | {"title": title} for line, title in zip(lines, titles, strict=False)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("items", tmp_path / "a.jsonl", "--items", "8", "-o", tmp_path / "made")
    for line in (tmp_path / "made/items.jsonl").read_text().splitlines():
        choices = [choice.strip().casefold() for choice in json.loads(line)["choices"]]
        assert "" not in choices
        assert len({choice.replace("ｃ", "c") for choice in choices}) == 4


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"title": "y"}\n', r"a\.jsonl: line 2: found \['title'\]"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', "line 2: found list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": 3}', r"record 1: text is 3 \(int\), expected a string or null"),
        ("a.jsonl", b'{"text": ["x"]}', r"text is \['x'\] \(list\)"),
        ("a.jsonl", b'{"text": "x", "title": true}', r"title is True \(bool\)"),
        ("a.jsonl", b'{"text": "x", "title": 1.5}', r"title is 1\.5 \(float\)"),
        ("a.jsonl", b'{"text": "x", "title": {"en": "x"}}', "title is .* \\(dict\\)"),
        ("a.jsonl", b'{"text": "x", "member": [1]}', "member is "),
        ("a.jsonl", b'{"text": "x\\ud800"}', "record 1: half a surrogate pair"),
        ("a.json", b'[{"text": "x"}, {"txt": "y"}]', r"a\.json: record 2: found \['txt'\]"),
        ("a.json", b'[{"messages": [], "id": 1}]', r"found \['id', 'messages'\].*column"),
        ("a.json", b'{"text": {"0": "pandas"}}', "record 1: text is "),
        ("a.json", b'[\n{"text": "x"},\n]', r"a\.json: not JSON \(.*line 3"),
        ("a.json", b'[{"text": null}]', "1 documents, none with text"),
        ("a.json", b"[]", "0 documents, none with text"),
        ("a.json", b"{" * 100000, "not JSON"),
        ("a.csv", b"question,answer\na,b\n", r"a\.csv: found \['answer', 'question'\], expected"),
        ("a.csv", b"title,text\na,b,c\n", r"line 2: found 3 cells, expected 2: title, text"),
        ("a.csv", b'title,text\n"a,b\n', r"not a table"),
        ("a.csv", b"text,text\na,b\n", "two columns have one name"),
        ("a.csv", b"title,text\n", "0 documents, none with text"),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read as Parquet"),
        ("a.txt", b"", "the file holds no text"),
        ("a.txt", b"h\0i\0", "byte 1 is zero"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16, expected text in UTF-8"),
        ("a.csv", "text".encode("utf-16"), "is UTF-16, expected text in UTF-8"),
        ("a.txt", gzip.compress(b"text", mtime=0), r"is packed by gzip \(\.gz\)"),
        ("a.txt", CONTENTS["a.parquet"], r"is Parquet \(\.parquet\)"),
        ("a.txt", LINES, r"holds records, not prose.*\.jsonl"),
        ("a.md", CONTENTS["array.json"], r"holds records, not prose.*\.jsonl"),
        ("a", CONTENTS["a.csv"], r"holds records, not prose.*\.csv"),
        ("a.txt", CONTENTS["a.tsv"], r"holds records, not prose.*\.csv or \.tsv"),
        ("a.txt.gz", b"text", r"a\.txt\.gz: cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "cannot be unpacked"),
        ("a.xz", b"text", "cannot be unpacked"),
        ("a.pdf", b"%PDF", r"\.pdf is not a known text format; expected \.txt, \.md, \.jsonl"),
        ("a.txt.zst", b"x", r"\.zst is not a known text format"),
    ],
)
def test_what_is_no_text_is_refused_alike(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(A3Error, match=message) as direct:
        load_documents(tmp_path / name)
    with pytest.raises(A3Error) as made:
        documents(entry(str(tmp_path / name), "texts"))
    none = "none with text" in str(direct.value)
    assert none or str(made.value) == str(direct.value)
    assert "et format" not in str(direct.value)


def test_another_field_is_named_as_the_error_says(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"question": "who?", "answer": "me", "title": null}\n')
    with pytest.raises(A3Error) as error:
        load_documents(tmp_path / "a.jsonl")
    said = str(error.value).split("'")
    spec = next(word for word in said if word.startswith('{"source"'))
    spec = spec.replace("…", json.dumps(str(tmp_path / "a.jsonl")), 1).replace("…", '"answer"')
    assert main(["text", spec, "-o", str(tmp_path / "docs.jsonl")]) == 0
    assert load_documents(tmp_path / "docs.jsonl") == [Document("", "me")]


def test_some_of_the_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([str(i) for i in range(10)]))

    def texts(split: str) -> str:
        spec = {"source": {"path": str(tmp_path / "a.json"), "split": split}}
        return "".join(document.text for document in documents(spec))

    assert texts("train") == "0123456789"
    assert texts("train[:20%]") == "01"
    assert texts("test[3:5]") == "34"
    with pytest.raises(A3Error, match=r"split 'train\[x\]'"):
        texts("train[x]")


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_is_all_texts_in_it(tmp_path, caplog):
    folder, other = tmp_path / "texts", tmp_path / "other"
    (folder / "b" / ".git").mkdir(parents=True)
    other.mkdir()
    (folder / "b" / "z.txt").write_text("z")
    (folder / "a.MD").write_text("a")
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "c", "title": "C"}'))
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "b" / ".git" / "x.txt").write_text("hidden")
    (folder / "LICENSE").write_text("mine")
    (folder / "photo.png").write_bytes(b"\x89")
    (other / "far.txt").write_text("far")
    (folder / "link.txt").symlink_to(other / "far.txt")
    (folder / "linked").symlink_to(other)
    (folder / "b" / "up").symlink_to(folder)
    expected = ["a", "z", "c", "far", "far"]
    assert [document.text for document in load_documents(folder)] == expected
    assert "left out 2 files of other types: LICENSE, photo.png" in caplog.text
    assert documents(entry(str(folder), "texts")) == load_documents(folder)
    found = documents({"source": {"path": str(folder)}, "format": "text"})
    assert [document.text for document in found] == ["a", "z", "far", "far"]


def test_a_folder_is_known_by_all_that_is_read(model, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("A river is a river. " * 99)
    before = text_sha256(folder)
    out = tmp_path / "ppl.json"
    run("eval", "ppl", model, "--text", folder, "--tokens", "64", "--block-length", "64", "-o", out)
    assert read_json(out)["text_sha256"] == before
    run("split", folder, "-o", tmp_path / "split")
    (folder / "notes.pdf").write_text("not read")
    assert text_sha256(folder) == before
    (folder / "b.txt").write_text("A rover is a river. " * 99)
    assert text_sha256(folder) != before
    (folder / "b.txt").rename(folder / "c.txt")
    assert len({before, text_sha256(folder)}) == 2


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(A3Error, match="no text in this folder; it has no files"):
        load_documents(tmp_path)
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(A3Error, match=r"it has a\.pdf. Expected files that end in \.txt"):
        documents({"source": {"path": str(tmp_path)}})
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(A3Error, match=r"gone\.txt: no such file"):
        load_documents(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(A3Error, match="pipe: no such file"):
        load_documents(tmp_path / "pipe")
    assert text_files(tmp_path / "x.txt") == [tmp_path / "x.txt"]


def test_a_file_whose_name_is_not_unicode_is_refused(tmp_path):
    """Its name is a document's title, and stands in records."""
    (tmp_path / "a.txt").write_text("A river.")
    path = tmp_path / os.fsdecode(b"b\xff.txt")
    path.write_text("A lake.")
    for each in (tmp_path, path):
        with pytest.raises(A3Error, match="its name is not UTF-8"):
            load_documents(each)


def test_quotes_in_tsv_are_read_where_they_are_sure(tmp_path):
    """As a csv writer puts them, all or where needed; inside of a cell; and else not guessed at."""
    path = tmp_path / "a.tsv"
    cells = ['"Hello there"', "a\tb", "two\nlines", 'a 5" pipe', "plain, of course"]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t", quoting=quoting)
            writer.writerows([["title", "text"], *(["t", cell] for cell in cells)])
        assert [document.text for document in load_documents(path)] == cells
    path.write_text('title\ttext\nt\ta 5" pipe\n')
    assert [document.text for document in load_documents(path)] == ['a 5" pipe']
    for rows in ('t\t"Hello there"\n', 't\t"Hello\nt\tthere"\n'):
        path.write_text(f"title\ttext\n{rows}")
        with pytest.raises(A3Error, match="quotes may be part of its cells"):
            load_documents(path)
