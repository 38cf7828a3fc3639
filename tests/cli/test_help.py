"""Help that is complete and the same everywhere, and what a shell completes."""

import shlex
import subprocess
import sys
from collections import defaultdict

import pytest

from a3.cli.arguments import parsers
from a3.cli.main import GROUPS, parser

ALL = {one.prog: one for one in parsers(parser()) if one.prog != "a3"}
# Of one name, but not of one kind: several, or what the command itself writes or scores.
SEVERAL = {
    "--ratio": {"a3 eval speed"},
    "--multiple": {"a3 eval speed"},
    "--speed": {"a3 compare"},  # a switch
}
OWN = {"-h", "-o", "--items", "--prompt", "--model"}


def test_every_command_is_in_one_group():
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted({name.split()[1] for name in ALL})
    said = parser().format_help()
    for title in ("everyday", "stages", "the workflow's own"):
        assert f"{title}:" in said


@pytest.mark.parametrize("name", ALL)
def test_help_says_what_a_command_reads_and_writes_with_an_example(name):
    one = ALL[name]
    said = one.format_help()
    assert one.description.count(".") >= 2
    assert "None" not in said
    assert "(default: -)" not in said
    for action in one._actions:
        assert action.help or action.dest == "==SUPPRESS==", action
        if action.nargs != 0 and not action.choices and action.dest not in ("help", "bos"):
            assert action.metavar, action
            assert action.metavar in ("KofN", action.metavar.upper()), action
    (example,) = [line for line in one.epilog.split("\n") if line.startswith("  a3 ")]
    words = shlex.split(example)
    assert " ".join(words).startswith(name)
    assert vars(parser().parse_args(words[1:]))["command"]


def test_options_of_one_name_have_one_metavar_and_one_help():
    found = defaultdict(set)
    for name, one in ALL.items():
        for action in one._actions:
            option = (action.option_strings or [None])[0]
            if option and option not in OWN and name not in SEVERAL.get(option, ()):
                found[option].add((action.metavar, action.help))
    # Where more is possible, the help says more.
    for option, several in found.items():
        shortest = min((text for _, text in several), key=len)
        assert len({metavar for metavar, _ in several}) == 1, (option, several)
        assert all(shortest in text for _, text in several), (option, several)


def test_every_result_goes_to_out():
    for name, one in ALL.items():
        if one.get_default("writes") is not None:
            (out,) = [action for action in one._actions if action.dest == "out"]
            assert out.option_strings == ["-o", "--out"], name


COMPLETED = {
    "a3 com": {"compress"},
    "a3 eval ": {"ppl", "harness", "generation", "speed"},
    "a3 compress smol": {"smollm2-135m", "smolfolder/"},
    "a3 compress smollm2-135m --text wiki-a": {"wiki-articles"},
    "a3 approx smolfolder --qk uni": {
        *("uniform-global", "uniform-global~", "uniform-contiguous", "uniform-contiguous~"),
    },
    "a3 approx smolfolder --mlp ob": {"obs", "obs~"},
    "a3 compress m --preset ": {"a3", "a3-plus", "a3-stock"},
    "a3 eval speed m --beside svd-llm-": {"svd-llm-v2"},
    "a3 quantise m --recipe w4a16-": {"w4a16-int"},
    "a3 surgery m --mode pca-sh": {"pca-shared-kv", "pca-shared-kv-rxx"},
    "a3 collect smolfolder --text smolte": {"smoltext.txt"},
    "a3 collect m -o rxx/q_": {"rxx/q_blocks.safetensors"},
    "a3 compress m --tok": {"--tokens"},
}


# Answers each line in a process of its own, as a shell asks, without starting Python anew.
ASK = """
import os, sys
import a3.cli.completion
from a3.cli.main import main
for number, line in enumerate(sys.argv[1:]):
    if os.fork() == 0:
        os.environ |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
        os.environ |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\\n"}
        os.environ["_ARGCOMPLETE_STDOUT_FILENAME"] = f"offered{number}"
        main()
        os._exit(1)
    _, status = os.wait()
    assert status == 0, (line, status)
"""


def test_a_shell_completes(tmp_path):
    """By argcomplete's own protocol."""
    (tmp_path / "smolfolder").mkdir()
    (tmp_path / "smoltext.txt").write_text("x")
    words = [sys.executable, "-c", ASK, *COMPLETED]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for number, (line, expected) in enumerate(COMPLETED.items()):
        offered = (tmp_path / f"offered{number}").read_text().split("\n")
        assert expected <= {word.strip() for word in offered}, line


def test_completion_imports_nothing_heavy():
    code = "import sys, a3.cli.completion; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
