"""Shared fixtures. Tests run on one thread: they are small, and two threads that wait are slow."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Tests that run Snakemake name its profile themselves, also where `make` has one.
os.environ.pop("SNAKEMAKE_PROFILE", None)
