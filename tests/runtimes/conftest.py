"""What the tests with SmolLM2 share: its folder and its texts, as the workflow makes them."""

import subprocess
import sys

import pytest
from test_llama import MODEL, ROOT, TEXTS


@pytest.fixture(scope="session")
def sources():
    """The model, the calibration text and the test text, made where they are missing."""
    texts = [TEXTS / "wiki-articles/docs.jsonl", TEXTS / "wikipedia-summaries/test.jsonl"]
    targets = [str(path.relative_to(ROOT)) for path in (MODEL / "arch.json", *texts)]
    profile = ["--profile", "workflow/profiles/default", "--cores", "2"]
    subprocess.run([sys.executable, "-m", "snakemake", *profile, *targets], cwd=ROOT, check=True)
    return texts
