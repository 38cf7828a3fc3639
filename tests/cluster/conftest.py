"""Fixtures of the tests that need a Slurm: `make test-cluster` starts one and stops it again."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from drills import ClusterProject, slurm, until


@pytest.fixture(scope="session", autouse=True)
def node():
    """The folder of the Slurm that make test-cluster started."""
    if "A3_SLURM" not in os.environ:
        pytest.fail("these tests need a Slurm of their own; start them with make test-cluster")
    return Path(os.environ["A3_SLURM"])


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The project after a whole run on this machine, without Slurm."""
    project = ClusterProject(tmp_path_factory.mktemp("local"))
    project.snakemake()
    return project


@pytest.fixture
def project(undisturbed, tmp_path):
    """A copy that has its model and texts and nothing further."""
    copy = undisturbed.copy(tmp_path / "project")
    for name in ("rxx", "checkpoints", "spectra", "eval", "tables"):
        shutil.rmtree(copy.folder / "results" / name)
    yield copy
    for run in copy.runs:  # where a test failed
        run.kill()
    subprocess.run(["scancel", "--user=root"], check=True)
    until("an empty queue", lambda: not slurm("squeue", "-h"))
