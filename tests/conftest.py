"""Shared fixtures. Tests run on one thread: they are small, and two threads that wait are slow."""

import gc
import os

# Imports make half a million objects that stay: the collector would look at them again and again.
gc.disable()

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Tests that run Snakemake name its profile themselves, also where `make` has one.
os.environ.pop("SNAKEMAKE_PROFILE", None)

# A long file that starts last would end alone; with `--no-loadscope-reorder` these start first.
LONG = (
    *("test_workflow.py", "test_compressed.py", "test_baselines.py", "test_hub.py"),
    *("test_paper.py", "test_security.py", "test_numerics.py", "test_wrong_input.py"),
)


def pytest_collection_modifyitems(items):
    """Put the tests of long files first."""
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


def pytest_collection_finish():
    """Collect garbage of tests alone."""
    gc.freeze()
    gc.enable()
