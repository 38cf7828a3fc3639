"""`--for RUNTIME`: what it cannot run is refused before a text is read or anything collected."""

import pytest
from tiny import document, run, tiny_llama, tiny_model
from tokenizers import Tokenizer
from tokenizers import pre_tokenizers as splitting

import a3
from a3 import A3Error, pipeline
from a3.cli.main import main
from a3.core.files import write_record

YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}


def words_at_spaces(folder):
    """Give a model a tokenizer whose rules llama.cpp does not have."""
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.pre_tokenizer = splitting.Whitespace()
    tokenizer.save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a text; reading it for `a3 compress` fails the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text("".join(map(document, range(40))))

    def read(*_, **__):
        raise AssertionError("the text was read")

    monkeypatch.setattr(pipeline, "make_text", read)
    return tmp_path


CASES = {
    "family": ("gemma2", {}, "llama.cpp", "llama.cpp cannot run it: a3 writes no ordinary check"),
    "hf": ("gemma2", {}, "hf", "hf cannot run it: a3 writes no ordinary checkpoints of gemma2"),
    "rope": ("llama", {"rope_parameters": YARN}, "hf", "multiplies queries and keys by"),
    "activation": ("llama", {"hidden_act": "gelu"}, "llama.cpp", "its activation is gelu"),
    "window": ("mistral", {"sliding_window": 16}, "llama.cpp", "a window of 16 positions"),
    "plugin": ("qwen3", {}, "vllm", "vllm cannot run it: it is a qwen3, not one of llama, mistral"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_the_runtime_cannot_run_is_refused_at_once(folder, capsys, case):
    family, config, name, says = CASES[case]
    tiny_model(folder / "dense", family, **config)
    words = ["dense", "--for", name, "--ratio", "0.3", "-o", "small"]
    assert main(["compress", *words, "--text", "text.jsonl"]) == 1
    said = capsys.readouterr().err
    assert says in said
    # Before statistics, too, of which there are none.
    for command in ("allocate", "approx"):
        assert main([command, *words, "--rxx", "none"]) == 1
        assert says in capsys.readouterr().err
    with pytest.raises(A3Error, match=says.split(" ")[-1]):
        a3.compress("dense", texts="text.jsonl", runtime=name, ratio=0.3, progress=False)
    for stage, more in ((a3.approximate, {}), (a3.allocate, {"out": "ranks.json"})):
        with pytest.raises(A3Error, match=says.split(" ")[-1]):
            stage("dense", rxx="none", runtime=name, ratio=0.3, progress=False, **more)
    assert not (folder / "small").exists()
    assert not (folder / "small.a3-work").exists()


def test_what_is_wrong_of_a_size_or_a_tokenizer_is_said_at_once(folder, capsys):
    tiny_llama(folder / "dense", head_dim=64)
    words = ["compress", "dense", "--text", "text.jsonl", "-o", "small", "--for", "llama.cpp"]
    sizes = ["--qk", "uniform-global@50", "--ov", "joint@50", "--mlp", "dense"]
    assert main([*words, *sizes]) == 1
    assert "Take uniform-global@32 or uniform-global@64" in capsys.readouterr().err
    words_at_spaces(folder / "dense")
    assert main([*words, "--ratio", "0.3"]) == 1
    said = capsys.readouterr().err
    assert "dense/tokenizer.json: its pre_tokenizer is" in said
    # Other runtimes read the tokenizer itself, so that the text is read.
    with pytest.raises(AssertionError, match="the text was read"):
        main([*words[:-1], "hf", "--ratio", "0.3"])


def test_ranks_that_were_allocated_for_another_runtime_are_refused(folder, capsys):
    tiny_llama(folder / "dense")
    ratio = ["--preset", "a3-plus", "--ratio", "0.3"]
    record = {"ranks": {"qk": [8, 16], "ov": [16, 11], "mlp": [64, 72]}}
    write_record(folder / "ranks.json", record)
    words = ["approx", "dense", "--rxx", "none", "--allocation", "ranks.json", "-o", "small"]
    assert main([*words, *ratio, "--for", "gpu"]) == 1
    said = capsys.readouterr().err
    assert "ranks.json: ov has rank 11, which gpu does not take. Allocate again with --for" in said


@pytest.mark.parametrize("size", [["--params", "0.09M"], ["--ratio", "0.1"]])
def test_what_stays_whole_is_said(folder, caplog, capsys, size):
    tiny_llama(folder / "dense")
    with pytest.raises(AssertionError, match="the text was read"):
        run("compress", "dense", "--for", "llama.cpp", *size, "-o", "small", "--text", "text.jsonl")
    said = capsys.readouterr().err + caplog.text
    assert "--for llama.cpp: qk stays whole: no size below 16 is a multiple of 32" in said
