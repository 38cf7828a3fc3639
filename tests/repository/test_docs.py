"""Every page's commands and Python run on a tiny model; what code knows is not written twice."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import LINES, tiny_llama

from a3.cli.main import main, parser
from a3.core.files import load_yaml
from a3.experiments.config import complete

ROOT = Path(__file__).parents[2]
SCHEMA = load_yaml(ROOT / "workflow/schemas/config.schema.yaml")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md"),
]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A tiny model needs no more; the pages leave the defaults.
FEW = {"--tokens": "1024", "--block-length": "64"}


def blocks(page):
    """(language, text) of each fenced block of a page."""
    return BLOCK.findall(page.read_text())


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the model and texts that the pages speak of."""
    tiny_llama(tmp_path / "my-llama", max_position_embeddings=2048)
    (tmp_path / "my-text.txt").write_text("\n\n".join(LINES * 60))
    (tmp_path / "other-text.txt").write_text("\n\n".join(LINES[::-1] * 40))
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = [page for page in PAGES if any(kind in ("bash", "python") for kind, _ in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_commands_and_python_of_a_page_run(page, desk):
    for kind, text in blocks(page):
        if kind == "bash":
            for line in commands(text):
                assert main(with_few_tokens(line)) == 0, line
        elif kind == "python":
            exec(compile(text, page.name, "exec"), {})


def commands(text):
    """The words of each `a3` line after the shell's brace expansion; other lines are not run."""
    for line in text.splitlines():
        if line.startswith("a3 "):
            done = subprocess.run(
                ["bash", "-c", f"printf '%s\\n' {line.split(' #')[0]}"],
                capture_output=True,
                text=True,
                check=True,
            )
            yield done.stdout.splitlines()[1:]
        else:
            assert not line or line.split()[0] in ("source", "pip"), line


def with_few_tokens(words):
    """The command, with fewer tokens where it has the option and does not say how many."""
    one = parser()
    for word in words:
        choices = [action.choices for action in one._actions if action.dest == "==SUPPRESS=="]
        if not choices:
            break
        one = choices[0][word]
    known = one._option_string_actions
    extra = {o: v for o, v in FEW.items() if o in known and o not in words}
    return [*words, *(word for pair in extra.items() for word in pair)]


# Others that pages show.
PROGRAMS = ("snakemake", "source", "export", "pip", "vllm")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_exists(page):
    """Lines that need a network or minutes: the command, the make target and the keys exist."""
    targets = re.findall(r"^([\w%-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets += [f"study-{path.name}" for path in (ROOT / "config/studies").iterdir()]
    for kind, text in blocks(page):
        if kind == "console":
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["a3"]:
                    assert parser().parse_args(words[1:])
                elif words[:1] == ["make"]:
                    assert words[1] in targets, line
                else:
                    assert not words or words[0] in PROGRAMS, line
        elif kind == "yaml":
            config = {"experiments": "x.tsv"} | yaml.safe_load(text)
            assert complete(config, SCHEMA)
    for target in re.findall(r"`make ([a-z-]+)`", page.read_text()):
        assert target in targets, target


def test_the_reference_pages_are_what_the_code_says():
    """`python docs/generate.py` writes them."""
    sys.path.insert(0, str(ROOT / "docs"))
    from generate import pages

    for name, text in pages().items():
        assert (ROOT / "docs/reference" / name).read_text() == text, (
            f"python docs/generate.py: {name}"
        )


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80


def test_links_between_pages_lead_somewhere():
    """mkdocs checks those of the site; this one also those of README and CONTRIBUTING."""
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)
