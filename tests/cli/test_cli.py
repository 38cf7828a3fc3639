"""The command line, as a user types it."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import a3  # noqa: F401  (the user's first line)
from a3.cli.main import main, parser

RULES = Path(__file__).parents[2] / "workflow" / "rules"
COMMANDS = [
    "compress",
    "collect",
    "approx",
    "export hf",
    "export dense",
    "export gguf",
    "export onnx",
    "inspect",
    "eval ppl",
    "eval fit",
    "eval harness",
    "eval speed",
    "eval generation",
    "surgery",
    "model",
    "convert",
    "card",
    "train",
    "text",
    "show",
    "paper rows",
    "paper compare",
]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_fast_and_does_not_import_torch(command):
    code = (
        "import sys; from a3.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "-h"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage: a3" in done.stdout
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("rules", sorted(RULES.glob("*.smk")), ids=lambda path: path.stem)
def test_the_commands_have_the_options_that_the_workflow_gives_them(rules):
    """Strings that stand together are one command: `a3 WORDS … --option …`."""
    for command in re.findall(r'(?:^ *f?"(?:[^"\n]*)"\n)+', rules.read_text(), re.MULTILINE):
        command = " ".join(re.findall(r'"(.*)"', command))
        for words, options in re.findall(r"\ba3 ((?:[a-z][a-z-]* )+)([^&]*)", command):
            known = option_strings(words.split())
            used = re.findall(r"(?<!\S)(--[a-z-]+)", options)
            assert set(used) <= known, (rules.name, words, set(used) - known)


@pytest.fixture
def shown(tmp_path):
    """Runs a command that prints, in a folder with a table, its output going to a file."""
    (tmp_path / "results.md").write_text("| model |\n|---|\n| tiny |\n")
    # Buffered, as a shell's pipe is.
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}

    def run(output, *words):
        command = [sys.executable, "-m", "a3", *words]
        options = {"cwd": tmp_path, "env": buffered, "text": True}
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, **options)
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize("words", [["show", "."], ["show", "-h"]])
def test_output_that_nobody_reads_ends_a_command_without_a_word(shown, words):
    reading, writing = os.pipe()
    os.close(reading)
    assert shown(writing, *words) == (141, "")
    os.close(writing)


def test_output_to_a_full_disk_is_an_error(shown):
    with Path("/dev/full").open("w") as full:
        said = "a3: error: standard output: No space left on device. Make room.\n"
        assert shown(full, "show", ".") == (1, said)


def option_strings(words):
    """All options of one command."""
    one = parser()
    for word in words:
        (choices,) = (action.choices for action in one._actions if action.dest == "==SUPPRESS==")
        one = choices[word]
    return set(one._option_string_actions)


def test_compress_in_one_go_then_load_score_and_generate(tmp_path, capsys):
    tiny_llama(tmp_path / "dense")
    (tmp_path / "dense" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "text.txt").write_text("A river moves towards an ocean, or a lake. " * 99)
    out, text = tmp_path / "small", str(tmp_path / "text.txt")
    blocks = ["--tokens", "512", "--block-length", "64"]
    command = ["compress", str(tmp_path / "dense"), "--ratio", "0.25", "-o", str(out)]
    assert main([*command, "--text", text, *blocks, "--seed", "1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "small", "text.txt"]
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    ids = tokenizer("A river", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]
    result = tmp_path / "ppl.json"
    assert main(["eval", "ppl", str(out), "--text", text, *blocks, "-o", str(result)]) == 0
    record = json.loads(result.read_text())
    assert record["tokens_scored"] == record["blocks"] * 63
    assert record["perplexity"] > 1
    # A second run into the same folder is refused before any work.
    assert main([*command, "--text", text, *blocks]) == 1
    assert "exists already" in capsys.readouterr().err
