"""What the tests with SmolLM2 share: its folder and texts, models made of it, and their table."""

import fcntl
import json
import os
import re
import subprocess
import sys

import pytest
from smollm2 import KINDS, MODEL, ROOT, TEXTS, a3_

# What docs/generate.py makes docs/reference/runtimes.md of; written if A3_RECORD=1.
MEASURED = ROOT / "docs/runtimes.json"


@pytest.fixture(scope="session")
def sources():
    """The model, the calibration text and the test text, made where they are missing."""
    texts = [TEXTS / "wiki-articles/docs.jsonl", TEXTS / "wikipedia-summaries/test.jsonl"]
    targets = [str(path.relative_to(ROOT)) for path in (MODEL / "arch.json", *texts)]
    profile = ["--profile", "workflow/profiles/default", "--cores", "2"]
    # One worker makes them while the other waits.
    with (ROOT / ".venv-runtimes/sources.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "snakemake", *profile, *targets]
        env = os.environ | {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "15"}
        done = subprocess.run(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    print(done.stdout)
    if done.returncode and (lost := re.search(r".*pip could not download it.*", done.stdout)):
        pytest.skip(f"no SmolLM2 or texts: {lost[0].strip()}")
    assert done.returncode == 0
    return texts


@pytest.fixture(scope="session")
def plus_rxx(sources, tmp_path_factory):
    """The statistics that a3-plus and a3-stock need."""
    folder = tmp_path_factory.mktemp("rxx")
    outputs = [folder / f"{kind}.safetensors" for kind in KINDS]
    cut = ["--tokens", "4096", "--block-length", "512"]
    a3_("collect", MODEL, "--text", sources[0], *cut, "-o", *outputs)
    return folder


@pytest.fixture(scope="session")
def preset(plus_rxx, tmp_path_factory):
    """A function: the folder of SmolLM2 as a preset makes it at a ratio of 0.2."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        words = [MODEL, "--rxx", plus_rxx, "--preset", name, "--ratio", "0.2"]
        a3_("allocate", *words, "-o", folder / "ranks.json")
        a3_("approx", *words, "--allocation", folder / "ranks.json", "-o", folder / "small")
        return folder / "small"

    return make


# --- the table ------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter):
    """Print the rows that tests recorded as "measured"; if A3_RECORD=1, write down what passed."""
    found = {
        kind: [
            said
            for one in terminalreporter.getreports(kind)
            for name, said in one.user_properties
            if name == "measured"
        ]
        for kind in ("passed", "failed")
    }
    for kind, said in found.items():
        for row in said:
            terminalreporter.write_line(f"{kind}: {json.dumps(row, ensure_ascii=False)}")
    rows = found["passed"]
    if os.environ.get("A3_RECORD") == "1" and rows:
        known = json.loads(MEASURED.read_text()) if MEASURED.exists() else []
        table = {(row["model"], row["runtime"].split()[0]): row for row in [*known, *rows]}
        lines = ",\n".join(json.dumps(table[key], ensure_ascii=False) for key in sorted(table))
        MEASURED.write_text(f"[\n{lines}\n]\n")
