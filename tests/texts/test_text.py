"""Texts: reading formats, taking out what calibration has seen, items, token blocks."""

import json
import random
import re
import time
import zipfile
from types import SimpleNamespace

import lm_eval
import pandas
import pytest
import torch
import yaml
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tiny import tiny_tokenizer

from a3.core.errors import A3Error
from a3.core.files import read_json, sha256
from a3.experiments.config import CATALOGUE
from a3.models.inputs import wheels_in
from a3.stages.evaluate.items import task_config
from a3.stages.inputs.items import harness_items
from a3.stages.inputs.split import exclude_and_split
from a3.stages.inputs.text import documents
from a3.texts.blocks import token_blocks
from a3.texts.reading import Document, load_documents, write_documents

WIKI = """<doc id="1" url="https://x" title="Fire &amp; Ice">
Fire &amp; Ice

A poem about "ends".

</doc>
<doc id="2" url="https://y" title="Short">
Short

</doc>
"""
WORDS = [
    *("river", "stone", "cloud", "field", "horse", "lamp", "music"),
    *("night", "ocean", "paper", "queen", "road", "silver", "table"),
]


def words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(f"{draw.choice(WORDS)}{draw.randrange(1000)}" for _ in range(count))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# --- documents ------------------------------------------------------------------------------------


def test_doc_tags_and_min_chars(tmp_path):
    path = tmp_path / "wiki.utf8"
    path.write_text(WIKI)
    spec = {"source": {"path": str(path)}, "format": "doc-tags"}
    found = documents(spec)
    assert [document.title for document in found] == ["Fire & Ice", "Short"]
    assert found[0].text == 'Fire & Ice\n\nA poem about "ends".'
    assert documents(spec | {"min_chars": 10}) == found[:1]
    with pytest.raises(A3Error, match="2 documents, none of at least 1000 characters"):
        documents(spec | {"min_chars": 1000})


def test_paragraphs_are_cut_at_blank_lines_once_they_are_long_enough(tmp_path):
    path = tmp_path / "code.utf8"
    path.write_text("  a = 1\n\n\nb = 2\nc = 3\n \t\nlong enough\n\nrest\n")
    spec = {"source": {"path": str(path)}, "format": "paragraphs"}
    found = [document.text for document in documents(spec | {"min_chars": 11})]
    assert found == ["  a = 1\n\nb = 2\nc = 3", "long enough"]
    found = [document.text for document in documents(spec)]
    assert found == ["  a = 1", "b = 2\nc = 3", "long enough", "rest"]


def test_a_mark_parts_documents_of_format_endoftext(tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text("One day.\n\nThe end.\n<|endoftext|>\n\nOnce.\n<|endoftext|>\n")
    spec = {"source": {"path": str(path)}, "format": "endoftext"}
    assert [document.text for document in documents(spec)] == ["One day.\n\nThe end.", "Once."]
    with pytest.raises(A3Error, match="format endoftext has no columns"):
        documents({"source": {"path": str(path), "column": "x"}, "format": "endoftext"})


def test_dots_of_a_column_lead_to_nested_fields(tmp_path):
    path = tmp_path / "asked.jsonl"
    record = {"input": [{"content": "title it"}, {"content": "An abstract."}], "a.b": "flat"}
    path.write_text(json.dumps(record) + "\n")
    spec = {"path": str(path), "column": "input.1.content"}
    assert documents({"source": spec}) == [Document("", "An abstract.")]
    assert documents({"source": spec | {"column": "a.b"}}) == [Document("", "flat")]
    for column in ("input.2.content", "input.x", "input.1.content.0", "input..1"):
        with pytest.raises(A3Error, match=r"record 1: found .*'input'.*expected an object"):
            documents({"source": spec | {"column": column}})
    with pytest.raises(A3Error, match=r"input\.1 is .*expected a string"):
        documents({"source": spec | {"column": "input.1"}})


def test_a_doc_tag_that_is_not_closed_is_an_error(tmp_path):
    path = tmp_path / "wiki.utf8"
    path.write_text(WIKI.rsplit("</doc>", 1)[0])
    with pytest.raises(A3Error, match="found 2 <doc …> and 1 whole blocks"):
        documents({"source": {"path": str(path)}, "format": "doc-tags"})


def test_a_glob_in_a_wheel_gives_one_document_a_file(tmp_path):
    path = tmp_path / "talks-1.0.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("talks/1790-A-1.txt", "Fellow citizens")
        wheel.writestr("talks/1791-A-1.txt", "Again")
    wheel = {"name": "talks", "version": "1.0", "sha256": sha256(path), "member": "talks/*.txt"}
    spec = {"source": {"wheel": wheel}, "format": "text"}
    assert documents(spec, tmp_path) == [
        Document("1790-A-1", "Fellow citizens"),
        Document("1791-A-1", "Again"),
    ]


def test_formats_of_local_files(tmp_path):
    rows = [{"title": "One", "text": "first"}, {"title": "Two", "text": "second"}]
    expected = [Document("One", "first"), Document("Two", "second")]
    summaries = {row["title"]: {"title": row["title"], "extract": row["text"]} for row in rows}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(summaries))
    pandas.DataFrame(rows).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("first\nsecond\n")

    def read(name: str, **spec) -> list[Document]:
        return documents({"source": {"path": str(tmp_path / name)}, **spec})

    assert read("a.jsonl") == expected
    assert read("b.json", format="summaries") == expected
    assert read("c.parquet") == expected
    assert read("d.txt") == [Document("d", "first\nsecond\n")]
    assert read("d.txt", format="lines") == [Document("", "first"), Document("", "second")]
    assert read("", format="text") == read("d.txt")


@pytest.mark.parametrize(
    ("name", "content", "form", "message"),
    [
        ("a.txt", b"caf\xe9", None, r"a\.txt: byte 3 is not UTF-8"),
        ("a.txt", b" \n", None, r"a\.txt: the file holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', None, r"line 2: found \['txt'\], expected"),
        ("a.jsonl", b"{\n", None, r"line 1: not JSON"),
        ("a.json", b'{"a": {"title": "A"}}', "summaries", r"KeyError\('extract'\)"),
        ("a.bin", b"x", None, r"\.bin is not a known text format; expected \.txt"),
        ("a.parquet", b"x", None, r"a\.parquet: cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, form, message):
    (tmp_path / name).write_bytes(content)
    spec = {"source": {"path": str(tmp_path / name)}} | ({"format": form} if form else {})
    with pytest.raises(A3Error, match=message):
        documents(spec)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(A3Error, match=r"none\.txt: no such file"):
        documents({"source": {"path": str(tmp_path / "none.txt")}})


def test_documents_survive_writing(tmp_path):
    some = [Document('A "b"', "line\u2028separator\r\nand\ttab"), Document("", "é")]
    write_documents(tmp_path / "docs.jsonl", some)
    assert load_documents(tmp_path / "docs.jsonl") == some


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufefftext".encode())
    assert load_documents(tmp_path / "a.txt") == [Document("a", "text")]


# --- exclusion and splits -------------------------------------------------------------------------


def test_seen_titles_and_13_grams_are_taken_out(tmp_path):
    seen = words(100, 1)
    thirteen, twelve = (" ".join(seen.upper().split()[40 : 40 + n]) for n in (13, 12))
    some = [
        Document("FIRE", words(50, 2)),
        Document("Copied", f"{words(20, 3)} {thirteen.replace(' ', ', ')}; {words(20, 4)}"),
        Document("Nearly", f"{words(20, 5)} {twelve} {words(20, 6)}"),
        Document("New", words(50, 7)),
        Document("", words(50, 8)),
    ]
    write_documents(tmp_path / "t" / "docs.jsonl", some)
    write_documents(
        tmp_path / "c" / "docs.jsonl", [Document("Fire", "x"), Document("", f"a {seen} b")]
    )
    exclude_and_split(
        tmp_path / "t" / "docs.jsonl", [tmp_path / "c" / "docs.jsonl"], None, tmp_path / "t"
    )
    assert load_documents(tmp_path / "t" / "test.jsonl") == some[2:]
    counts = read_json(tmp_path / "t" / "split.json")
    assert counts["excluded"] == {"title": 1, "13-gram": 1, "whole": 0}
    assert counts["documents"] == {"found": 5, "dev": 0, "test": 3, "harness": 0, "calibration": 0}
    assert counts["inputs"]["c/docs.jsonl"] == sha256(tmp_path / "c" / "docs.jsonl")


def test_splits_follow_the_shares_and_nothing_else(tmp_path):
    some = [Document(f"T{i}", words(3, i)) for i in range(2000)]
    shares = {"dev": 0.2, "test": 0.5, "harness": 0.3}
    found = {}
    for name, chosen in (("all", some), ("half", some[::-2])):
        write_documents(tmp_path / name / "docs.jsonl", chosen)
        exclude_and_split(tmp_path / name / "docs.jsonl", [], shares, tmp_path / name)
        for split in shares:
            found[name, split] = set(load_documents(tmp_path / name / f"{split}.jsonl"))
    for split, share in shares.items():
        assert len(found["all", split]) == pytest.approx(share * 2000, abs=70)
        assert found["half", split] == found["all", split] & set(some[::-2])
    assert set.union(*(found["all", split] for split in shares)) == set(some)


@pytest.mark.parametrize("shares", [{"dev": 0.5}, {"dev": 1.5, "test": -0.5}, {"train": 1}])
def test_wrong_shares_are_refused(tmp_path, shares):
    with pytest.raises(A3Error, match="expected shares of dev, test, harness"):
        exclude_and_split(tmp_path / "docs.jsonl", [], shares, tmp_path)


def test_what_the_calibration_split_holds_is_in_no_other(tmp_path):
    """Not even 13 words of it; two documents of one title are not the same, for files are such."""
    common = words(13, -1)
    plain = [Document("same title", words(40, i)) for i in range(400)]
    copies = [Document("", f"{words(20, 1000 + i)} {common}") for i in range(50)]
    write_documents(tmp_path / "docs.jsonl", [*plain, *copies])
    shares = {"dev": 0.2, "test": 0.5, "calibration": 0.3}
    exclude_and_split(tmp_path / "docs.jsonl", [], shares, tmp_path)
    found = {split: load_documents(tmp_path / f"{split}.jsonl") for split in shares}
    assert len(found["calibration"]) == pytest.approx(0.3 * 450, abs=40)
    assert set(copies) & set(found["calibration"])
    assert not set(copies) & {*found["dev"], *found["test"]}
    assert set(plain) <= {*found["dev"], *found["test"], *found["calibration"]}
    assert sum(map(len, found.values())) == len(set().union(*found.values()))
    record = read_json(tmp_path / "split.json")
    gone = 450 - sum(map(len, found.values()))
    assert record["excluded"] == {"title": 0, "13-gram": gone, "whole": 0}
    # With no such share the splits are the same but for what calibration took.
    exclude_and_split(tmp_path / "docs.jsonl", [], {"dev": 0.2, "test": 0.8}, tmp_path)
    assert set(found["dev"]) <= set(load_documents(tmp_path / "dev.jsonl"))


def test_a_text_that_calibration_has_seen_whole_is_refused(tmp_path):
    path = tmp_path / "docs.jsonl"
    write_documents(path, [Document("", words(50, 1))])
    with pytest.raises(A3Error, match="all 1 documents occur in the calibration texts"):
        exclude_and_split(path, [path], None, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_million_words_take_seconds(tmp_path):
    write_documents(tmp_path / "t.jsonl", [Document("", words(100, i)) for i in range(7000)])
    write_documents(tmp_path / "c.jsonl", [Document("", words(1000, -i)) for i in range(1, 300)])
    start = time.perf_counter()
    exclude_and_split(tmp_path / "t.jsonl", [tmp_path / "c.jsonl"], None, tmp_path)
    assert time.perf_counter() - start < 20


# --- harness --------------------------------------------------------------------------------------


@pytest.fixture
def articles(tmp_path):
    """A harness split of 50 articles whose title is in the text, in two forms."""
    path = tmp_path / "harness.jsonl"
    titles = [f"The Mount {word.title()}{i}" for i, word in enumerate(WORDS * 4)][:50]
    text = "{0} is a peak, as all {0}s are. {1}"
    write_documents(path, [Document(t, text.format(t, words(30, i))) for i, t in enumerate(titles)])
    return path


def test_items_mask_the_title_and_hold_it_once(articles, tmp_path):
    harness_items(articles, 40, 0, tmp_path / "a")
    items = [json.loads(line) for line in (tmp_path / "a" / "items.jsonl").read_text().splitlines()]
    assert len(items) == 40
    for item in items:
        title = item["choices"][item["gold"]]
        assert len(set(item["choices"])) == 4
        # "The" is no telling word and stays.
        assert item["query"].startswith("The ___ ___ is a peak, as all The ___ ___ are.")
        assert title.split()[-1] not in item["query"]
    assert {item["gold"] for item in items} == {0, 1, 2, 3}


def question(content, ideal):
    return json.dumps({"input": [{"role": "user", "content": content}], "ideal": ideal}) + "\n"


def test_questions_with_lettered_answers_become_items(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [question(f"Who has {i} cups? A: Ann; B: Bo; C: no one.", "BAC"[i]) for i in range(3)]
    path.write_text("".join(lines))
    found = documents({"source": {"path": str(path)}, "format": "questions"})
    assert [document.title for document in found] == ["Bo", "Ann", "no one"]
    write_documents(tmp_path / "docs.jsonl", found)
    harness_items(tmp_path / "docs.jsonl", 3, 0, tmp_path / "a")
    made = [json.loads(line) for line in (tmp_path / "a/items.jsonl").read_text().splitlines()]
    assert {(item["query"], item["gold"]) for item in made} == {
        (f"Who has {i} cups?\nAnswer:", gold) for i, gold in enumerate((1, 0, 2))
    }
    assert all(item["choices"] == ["Ann", "Bo", "no one"] for item in made)
    with pytest.raises(A3Error, match="3 questions, needed 4"):
        harness_items(tmp_path / "docs.jsonl", 4, 0, tmp_path / "b")


def test_a_document_that_is_no_question_among_questions_is_named(tmp_path):
    asking = Document("Bo", "Who? A: Ann; B: Bo.")
    write_documents(tmp_path / "docs.jsonl", [asking, asking, Document("Peak", "A peak is high.")])
    with pytest.raises(A3Error, match=r"docs.jsonl: document 2 \('Peak'\) is no question"):
        harness_items(tmp_path / "docs.jsonl", 2, 0, tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "ideal", "message"),
    [
        ("Who? A: Ann; B: Bo.", "C", "line 2: ideal is 'C', and input.0.content has 2 answers"),
        ("Who? B: Ann; A: Bo.", "A", "has 0 answers"),
        ("Who?", "A", "has 0 answers"),
        ("Who? A: Ann; B: Bo.", "", "ideal is ''"),
        ("Who? A: Ann; B: Bo.", None, "ideal is None"),
    ],
)
def test_a_question_without_its_answer_is_named(tmp_path, content, ideal, message):
    path = tmp_path / "q.jsonl"
    path.write_text(question("Who? A: Ann; B: Bo.", "A") + question(content, ideal))
    with pytest.raises(A3Error, match=message):
        documents({"source": {"path": str(path)}, "format": "questions"})


def test_items_follow_the_seed(articles, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        harness_items(articles, 20, seed, tmp_path / name)
    a, b, c = ((tmp_path / name / "items.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_too_few_articles_are_refused(articles, tmp_path):
    with pytest.raises(A3Error, match="50 documents have a title and 20 words, needed 51"):
        harness_items(articles, 51, 0, tmp_path / "a")


class Guess(LM):
    """Finds a choice likely when it is the longest, which no lm-eval default depends on."""

    def loglikelihood(self, requests):
        return [(float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


def test_lm_eval_runs_the_task(articles, tmp_path):
    harness_items(articles, 30, 0, tmp_path / "a")
    path = tmp_path / "a" / "items.jsonl"
    found = lm_eval.simple_evaluate(
        model=Guess(),
        tasks=[task_config(path, "titles")],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    items = [json.loads(line) for line in path.read_text().splitlines()]
    right = [max(range(4), key=lambda i: len(x["choices"][i])) == x["gold"] for x in items]
    assert found["results"]["titles"]["acc,none"] == pytest.approx(sum(right) / 30)
    assert "acc_norm,none" in found["results"]["titles"]
    sample = found["samples"]["titles"][0]
    assert sample["arguments"][0][0].endswith("\n\nThis is the definition of")
    assert sample["arguments"][0][1].startswith(" The Mount")


def test_a_broken_item_is_named(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"query": "q", "choices": ["a"], "gold": 1}\n')
    with pytest.raises(A3Error, match="line 1: not an item"):
        TaskManager(include_defaults=False).load([task_config(tmp_path / "items.jsonl", "t")])


# --- token blocks ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some():
    return [Document("", words(30, i)) for i in range(40)]


def test_blocks_are_the_joined_text(tokenizer, some):
    blocks = token_blocks(some, tokenizer, block_length=32, tokens=320, seed=None, bos=False)
    assert blocks.shape == (10, 32)
    assert blocks.dtype == torch.long
    whole = "\n\n".join(document.text for document in some)
    assert whole.startswith(tokenizer.decode(blocks.flatten()))


def test_more_tokens_give_the_same_blocks_first(tokenizer, some):
    few = token_blocks(some, tokenizer, 32, 64, 3, False)
    every = token_blocks(some, tokenizer, 32, 10**6, 3, False)
    assert torch.equal(few, every[:2])
    ids = tokenizer("\n\n".join(d.text for d in some))["input_ids"]
    assert len(every) == len(ids) // 32


def test_only_as_much_text_is_tokenised_as_needed(tokenizer, some):
    characters = []

    class Counting:
        bos_token_id = 0

        def __call__(self, text, **options):
            characters.append(len(text))
            return tokenizer(text, **options)

    token_blocks(some * 50, Counting(), 32, 320, None, False)
    assert sum(characters) < 10_000 < sum(len(document.text) for document in some * 50)


@pytest.mark.parametrize("width", [6, 40])
def test_the_end_of_a_text_cut_short_is_not_used(some, width):
    class Unsettled:
        """A token every `width` characters; the last three would change if the text went on."""

        bos_token_id = 0

        def __call__(self, text, **_):
            ids = [sum(text[i : i + width].encode()) for i in range(0, len(text), width)]
            return {"input_ids": [*ids[:-3], -1, -1, -1]}

    few = token_blocks(some, Unsettled(), 16, 64, None, False)
    every = token_blocks(some, Unsettled(), 16, 10**6, None, False)
    assert few.shape == (4, 16)
    assert torch.equal(few, every[:4])


def test_the_seed_permutes_documents(tokenizer, some):
    first, again, other, plain = (
        token_blocks(some, tokenizer, 32, 320, seed, False) for seed in (0, 0, 1, None)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, plain)


def test_bos_takes_one_place(tokenizer, some):
    plain = token_blocks(some, tokenizer, 31, 310, None, False)
    blocks = token_blocks(some, tokenizer, 32, 320, None, True)
    assert (blocks[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(blocks[:, 1:], plain)


def test_a_short_text_is_refused(tokenizer):
    with pytest.raises(A3Error, match="too short for one block: found 2 tokens, needed 31"):
        token_blocks([Document("", "ab")], tokenizer, 32, 320, None, True)
    with pytest.raises(A3Error, match="at least one block"):
        token_blocks([Document("", "ab")], tokenizer, 32, 31, None, False)


def test_no_bos_is_an_error(some):
    with pytest.raises(A3Error, match="no BOS token"):
        token_blocks(some, SimpleNamespace(bos_token_id=None), 32, 320, None, True)


# --- catalogue ------------------------------------------------------------------------------------


def test_the_catalogue_is_whole():
    catalogue = yaml.safe_load(CATALOGUE.read_text())
    assert set(catalogue) == {"models", "texts", "perplexity", "harness", "quantisations"}
    for entry in [*catalogue["models"].values(), *catalogue["texts"].values()]:
        assert entry["licence"]
        for wheel in wheels_in(entry["source"]):
            assert set(wheel) == {"name", "version", "sha256", "member"}
            assert re.fullmatch("[0-9a-f]{64}", wheel["sha256"])
        if wheels_in(entry["source"]):
            assert entry["source"].keys() <= {"wheel", "wheels", "column"}
        elif "hub" in entry["source"]:  # a commit, or the hub's own conversion
            revision = "[0-9a-f]{40}|refs/convert/parquet"
            assert re.fullmatch(revision, entry["source"]["revision"])
        else:  # made here of another entry (test_train.py)
            assert entry["source"].keys() <= {"repeat_kv", "train", "mix"}
    for text in catalogue["texts"].values():
        assert set(text.get("exclude", [])) <= set(catalogue["texts"])
