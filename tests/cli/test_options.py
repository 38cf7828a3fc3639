"""Numbers, devices and JSON that are wrong are refused in one line, before anything is computed."""

import argparse
import json
import re
import subprocess

import pytest
from tiny import document, run, tiny_llama

from a3.cli import options
from a3.cli.main import main, parser
from a3.core.devices import require_device
from a3.core.errors import A3Error
from a3.core.files import load_yaml
from a3.experiments.config import CATALOGUE, validate, validate_entry
from a3.solutions.recipes import check_method

ROW = {"qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w", "ratio": "0.2"}
PPL = ["eval", "ppl", "m", "--text", "d.jsonl", "-o", "r.json"]
HARNESS = ["eval", "harness", "m", "--task", "x", "--items", "i.jsonl", "-o", "r.json"]
SPEED = ["eval", "speed", "m", "-o", "r.json"]
GENERATION = ["eval", "generation", "m", "--prompt", "x", "-o", "r.json"]
HEAL = ["heal", "m", "--teacher", "n", "--text", "d.jsonl", "-o", "h"]
QUANTISE = ["quantise", "m", "--rxx", "rx", "-o", "q"]
COLLECT = ["collect", "m", "--text", "d.jsonl", "-o", "v_blocks.safetensors"]
APPROX = ["approx", "m", "--rxx", "rx", "-o", "small"]
PLAN = ["plan", "m", "--ratio", "0.2"]
TABLES = ["tables", "--results", ".", "-o", "t"]
# Commands, an option, and values that are none.
COUNTS = [
    *((words, "--threads", "1025") for words in (PPL, HARNESS, SPEED, COLLECT, APPROX, PLAN)),
    *((words, option, "0") for words, options_ in (
        (PPL, ("--tokens", "--block-length", "--threads")), (COLLECT, ("--tokens", "--threads")),
        (HARNESS, ("--limit",)), (QUANTISE, ("--rank",)), (APPROX, ("--multiple",)),
        (HEAL, ("--tokens", "--batch-size")),
        (SPEED, ("--batch", "--prompt", "--repeats", "--new-tokens", "--layers", "--multiple")),
        (GENERATION, ("--new-tokens",)), (PLAN, ("--tokens", "--cores", "--block-length")),
        (["items", "d.jsonl", "-o", "i"], ("--items",)),
    ) for option in options_),
    (PPL, "--block-length", "1"), (COLLECT, "--block-length", "1"), (HARNESS, "--shots", "-1"),
    (HARNESS, "--seed", str(2**32)), (COLLECT, "--seed", "-1"),
]  # fmt: skip
NO_NUMBERS = ["-1", "1.5", "nan", "inf", "1e3", "0x10", "", " 1", "+1", "1_0", "٣", "9" * 5000]


def refused(capsys, *words):
    """The one line of a command that is refused."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1, words
    said = capsys.readouterr().err
    assert said.startswith("a3: error: "), said
    assert len(said.splitlines()) == 1, said
    return said


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A working folder with nothing in it: whatever is refused is refused before it is read."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "option", "value"), COUNTS)
def test_a_number_out_of_range(empty, capsys, words, option, value):
    assert f"argument {option}: expected an integer from" in refused(
        capsys, *words, f"{option}={value}"
    )


@pytest.mark.parametrize("option", ["--minutes", "--learning-rate"])
def test_a_measure_is_above_nothing(empty, capsys, option):
    assert [options.positive(word) for word in ("10", "0.5", "3e-4")] == [10, 0.5, 3e-4]
    for word in ("0", "-1", "nan", "inf", "1e999", "0x10", "", " 1", "+1", "1_0", "٣", "0e0"):
        said = refused(capsys, *HEAL, f"{option}={word}")
        assert f"argument {option}: expected a number above 0" in said


@pytest.mark.parametrize("word", NO_NUMBERS)
def test_what_is_no_number(word):
    for read in (options.count(), options.count(0), options.count_or_all):
        with pytest.raises(argparse.ArgumentTypeError, match="expected an integer"):
            read(word)


def test_every_number_is_read_by_the_same_rule():
    """A new option of a command is, too."""
    types = {one.type for command in leaves(parser()) for one in command._actions}
    assert not types & {int, float, json.loads}


def leaves(one):
    below = [a for a in one._actions if a.dest == "==SUPPRESS==" and a.choices]
    return [leaf for a in below for child in a.choices.values() for leaf in leaves(child)] or [one]


@pytest.mark.parametrize("words", [PPL, HARNESS, SPEED, GENERATION, COLLECT, PLAN])
@pytest.mark.parametrize("device", ["gpu", "meta", "CPU", "cuda:-1", "cuda:99", "", "cpu cuda"])
def test_a_device_that_is_not_there(empty, capsys, words, device):
    assert "device" in refused(capsys, *words, "--device", device)


def test_a_device_that_does_not_compute_in_a_dtype(monkeypatch):
    import torch

    real = torch.ones

    def ones(*sizes, dtype, device):
        if dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported on MPS")
        return real(*sizes, dtype=dtype)

    monkeypatch.setattr(torch, "ones", ones)
    require_device("mps", "float32")
    with pytest.raises(A3Error, match=r"'mps' cannot compute in bfloat16 here \(BFloat16 is not"):
        require_device("mps", "bfloat16")


@pytest.mark.parametrize(
    "ratio", ["nan", "inf", "-inf", "1", "-0.1", "1e-400", "0x1", "", ".2", "0.20", "0." + "1" * 99]
)
@pytest.mark.parametrize("words", [APPROX, SPEED, ["compress", "m", "-o", "small"]])
def test_a_ratio_that_is_none(empty, capsys, words, ratio):
    assert "ratio" in refused(capsys, *words, f"--ratio={ratio}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model", "{}", "-o", "x"], "'source' is a required"),
        (["model", '{"source": 3}', "-o", "x"], "source: 3 is not of type 'object'"),
        (["model", '{"source": {"path": 3}}', "-o", "x"], "source.path: 3 is not of type 'string'"),
        (["model", '{"source": {"path": ""}}', "-o", "x"], "source.path"),
        (["model", '{"source": {"path": "\\u0000"}}', "-o", "x"], "has invalid characters"),
        (["model", '{"source": {"path": "\\ud800"}}', "-o", "x"], "characters"),
        (["model", '{"source": {"wheel": {}}}', "-o", "x"], "'name' is a required"),
        (["model", '{"source": {"path": "m"}, "licence": 3}', "-o", "x"], "licence: 3"),
        (["model", '{"source": ', "-o", "x"], "not valid JSON"),
        (["model", "[1]", "-o", "x"], "'[1]': expected a folder"),
        (["model", "", "-o", "x"], "argument MODEL: expected text, found ''"),
        (["model", "n" * 5000, "-o", "x"], "expected a folder"),
        (["model", '{"source": {"path": "m"}}', "-o", "n" * 250], "too long"),
        (["convert", "{}", "-o", "x"], "'source' is a required"),
        (["compress", "{}", "--ratio", "0.2", "-o", "x"], "'source' is a required"),
        (["compress", "{}", "--ratio", "0.2", "--text", "{}", "-o", "x"], "'source'"),
        (["train", '{"source": {"train": {}}}', "--text", "d", "-o", "x"], "'config' is a req"),
        (["text", "{}", "-o", "x.jsonl"], "'source' is a required"),
        (["text", '{"source": {"path": "d"}, "min_chars": "x"}', "-o", "x.jsonl"], "min_chars"),
        (["text", '{"source": {"path": "d"}, "min_chars": 1.0}', "-o", "x.jsonl"], "min_chars"),
        (["text", '{"source": {"path": "d"}, "min_chars": NaN}', "-o", "x.jsonl"], "NaN"),
        (["text", '{"source": {"mix": {"a": 1e999, "b": 1}}}', "-o", "x.jsonl"], "inf is"),
        (["text", "[" * 100000, "-o", "x.jsonl"], "expected a file or folder of text"),
        (["text", '{"a":' * 100000, "-o", "x.jsonl"], "not valid JSON"),
        ([*QUANTISE, "--recipe", "{}"], "'layers' is a required"),
        ([*QUANTISE, "--recipe", '{"layers": [{"match": 3}]}'], "layers.0.match"),
        ([*QUANTISE, "--recipe", '{"layers": [{"match": "x", "W": "int9/8"}]}'], "layers.0.W"),
        ([*QUANTISE, "--recipe", "nonsense"], "w4a8"),
        ([*QUANTISE], "no rank"),
        ([*QUANTISE, "--method", "none", "--rank", "3"], "rank 3"),
        (["split", "d", "-o", "x", "--shares", '{"test": "half"}'], "test: 'half' is not"),
        (["split", "d", "-o", "x", "--shares", "[1]"], "is not of type 'object'"),
        (["split", "d", "-o", "x", "--shares", '{"test": null}'], "test: None"),
        (["split", "d", "-o", "x", "--shares", '{"test": true}'], "test: True"),
        (["split", "d", "-o", "x", "--shares", '{"test": NaN}'], "NaN"),
        ([*COLLECT, "--shard", "x"], "expected 0of4"),
        ([*COLLECT, "--shard", "9" * 5000 + "of3"], "expected 0of4"),
        ([*COLLECT, "--experiments", "[3]"], "expected a list of objects"),
        ([*COLLECT, "--experiments", '[{"qk": "x"}]'], "expected a list of objects"),
        ([*APPROX, "--ratio", "0.2", "--shard", "x"], "expected 0of4"),
        ([*TABLES, "--experiments", "[]"], "expected a list of objects"),
        ([*TABLES, "--experiments", '[{"model": {}}]'], "expected a list of objects"),
        ([*TABLES, "--experiments", '[{"model": "m", "x": "y"}]'], "unknown key 'x'"),
        (["report", "--results", ".", "--tables", ".", "--config", "[1]", "-o", "x.html"], "obj"),
        ([*PLAN, "--jobs", "3"], "list of jobs"),
        ([*PLAN, "--jobs", '[{"model": "m", "stage": "__init__", "settings": {}}]'], "stage is"),
        (["wheel", "-o", "x.whl", "--", "-r", "1", "0" * 64], "name: '-r' does not match"),
        (["wheel", "x", "1", "z", "-o", "x.whl"], "sha256: 'z' does not match"),
        ([*GENERATION[:4], "\udcff", "-o", "r.json"], "not UTF-8"),
        (["eval", "ppl", "m", "-o", "x"], "required: --text"),
        ([], "required: COMMAND"),
        ([*APPROX, "--rato", "3"], "unrecognized arguments: --rato 3. `a3 approx -h` shows"),
        (["eval", "ppl", "m", "--text", "t", "-o", "x", "y"], ": y. `a3 eval ppl -h` shows"),
        (["inspect", "nowhere"], "nowhere: no such folder"),
        (["paper", "compare", "x.yaml", "-o", "x"], "error: x.yaml: no such file"),
        (["paper", "rows", "x.yaml", "--model", "m", "--results", "r", "-o", "x"], "r: x.yaml: no"),
    ],
)  # fmt: skip
def test_arguments_that_are_none(empty, capsys, words, says):
    assert says in refused(capsys, *words)


TEXTS = [
    *((HARNESS, option) for option in ("--apply-chat-template", "--system-instruction")),
    *((HARNESS, option) for option in ("--metric", "--task", "--items", "--yaml", "--out")),
    *((PPL, option) for option in ("--name", "--split", "--text", "--source", "--out")),
    *((SPEED, option) for option in ("--qk", "--beside")),
    *((APPROX, option) for option in ("--mlp", "--rxx", "--allocation")),
    *((TABLES, option) for option in ("--reference", "--perplexity", "--results")),
    (["split", "d", "-o", "s"], "--exclude"),
]


@pytest.mark.parametrize(("words", "option"), TEXTS)
def test_text_that_is_none(empty, capsys, words, option):
    """An unset variable of the shell, and bytes that are not UTF-8."""
    assert "expected text, found ''" in refused(capsys, *words, option, "")
    assert "not UTF-8" in refused(capsys, *words, option, "a\udcff")


def test_configs_have_no_empty_text():
    for key in ("metric", "apply_chat_template", "system_instruction"):
        with pytest.raises(A3Error, match=f"{key}: "):
            validate_entry({"yaml": "t.yaml", key: ""}, "harness", "harness x")
    with pytest.raises(A3Error, match="task: "):
        validate_entry({"task": ""}, "harness", "harness x")


@pytest.mark.parametrize(
    ("kind", "source", "key"),
    [
        ("model", {"path": "m", "revision": "x"}, "source.revision: 'x' has no effect"),
        ("model", {"repeat_kv": "m", "revision": "x"}, "source.revision: 'x' has no effect"),
        ("text", {"path": "d", "revision": "x"}, "source.revision: 'x' has no effect"),
        ("text", {"path": "d", "config": "x"}, "source.config: 'x' has no effect"),
        ("text", {"path": "d", "files": "x"}, "source.files: 'x' has no effect"),
        ("text", {"path": "d", "split": "test"}, "source.split: 'test' does not match"),
        ("text", {"path": "d", "split": "trains"}, "source.split: 'trains' does not match"),
        ("text", {"hub": "a/b", "revision": "x", "files": "f", "split": "test"}, "source.split"),
        ("text", {"mix": {"a": 0.5, "b": 0.5}, "column": "x"}, "source.column: 'x' has no effect"),
    ],
)
def test_a_key_that_a_source_does_not_use(kind, source, key):
    with pytest.raises(A3Error, match=re.escape(key)):
        validate_entry({"source": source}, kind, "entry")


def test_keys_that_a_source_uses():
    both = {"mix": {"a": 0.5, "b": 0.5}}
    for source in (
        {"path": "d", "split": "train[:10]", "column": "x"},
        {"hub": "a/b", "revision": "x", "config": "c", "split": "test", "column": "x"},
        {"hub": "a/b", "revision": "x", "files": "f", "split": "train"},
        both,
    ):
        validate_entry({"source": source}, "text", "entry")
    with pytest.raises(A3Error, match="min_chars: 3 has no effect"):
        validate_entry({"source": both, "min_chars": 3}, "text", "entry")
    for section, kind in (("models", "model"), ("texts", "text")):
        for name, each in load_yaml(CATALOGUE)[section].items():
            validate_entry(each, kind, name)


def test_jobs_of_a_workflow(capsys):
    common = {"threads": 1, "device": "cpu", "dtype": "float32"}
    right = {"model": "m", "stage": "ppl", "settings": common | {"tokens": 9, "block_length": 3}}
    right["settings"] |= {"row": {}}
    assert options.jobs(json.dumps([right]))
    for key, value in (("threads", 0), ("tokens", -1), ("row", {"qk": "x"}), ("dtype", "int"),
                       ("device", 3), ("tokens", "9"), ("block_length", 1.5)):  # fmt: skip
        wrong = right | {"settings": right["settings"] | {key: value}}
        with pytest.raises(A3Error, match="expected a list of jobs"):
            options.jobs(json.dumps([wrong]))
    typing_error = right | {"settings": right["settings"] | {"tokns": 9}}
    with pytest.raises(A3Error, match="settings of ppl are threads, device, row, tokens"):
        options.jobs(json.dumps([typing_error]))
    elsewhere = right | {"settings": right["settings"] | {"device": "cuda:99"}}
    assert "cuda:99" in refused(capsys, "plan", "--jobs", json.dumps([elsewhere]))


def test_configs_are_held_to_the_same():
    recipe = {"learning_rate": float("nan")}
    with pytest.raises(A3Error, match=r"model x: learning_rate: nan is not a finite number"):
        validate_entry({"source": {"train": recipe}}, "model", "model x")
    schema = {"type": "object", "properties": {"tokens": {"type": "integer"}}}
    with pytest.raises(A3Error, match=r"config: tokens: 512\.0 is not of type 'integer'"):
        validate({"tokens": 512.0}, schema)
    with pytest.raises(A3Error, match="rank of the repair is -1"):
        check_method("qera", -1)


def test_git_is_not_asked(tmp_path, monkeypatch, capfd):
    """Outside of a repository git says "fatal"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", "/")
    assert subprocess.run(["git", "describe", "--always"]).returncode != 0
    assert "fatal" in capfd.readouterr().err
    tiny_llama(tmp_path / "m")
    (tmp_path / "d.jsonl").write_text("".join(map(document, range(40))))
    run("items", "d.jsonl", "--items", "4", "-o", "i")
    words = ["eval", "harness", "m", "--task", "x", "--items", "i/items.jsonl", "-o", "r.json"]
    run(*words)
    assert "fatal" not in capfd.readouterr().err
