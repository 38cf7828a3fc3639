"""The profile for other schedulers, with a stand-in for PBS's commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

from drills import CHAIN, PAGE, TARGET, check_same

COMMAND = re.search(r"^ {4}snakemake (--profile \S+/cluster-generic)", PAGE, re.MULTILINE)[1]


def test_every_heavy_job_is_submitted(project, undisturbed, tmp_path):
    for name in ("qsub", "qstat", "qdel"):
        (tmp_path / name).symlink_to(Path(__file__).parent / "pbs")
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            *COMMAND.split(),
            "--latency-wait=5",
            "--seconds-between-status-checks=1",
            TARGET,
        ],
        cwd=project.folder,
        env=os.environ
        | {
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PBS_FOLDER": str(jobs),
            "PYTHONPATH": str(project.folder),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    calls = [path.read_text() for path in sorted(jobs.glob("*.call"))]
    assert len(calls) == len(CHAIN)
    for call in calls:
        assert re.search(
            r"-l select=1:ncpus=1:mem=(?:9|1\d)\d{2}mb:ngpus=0 -l walltime=10:00 ", call
        )
    assert {path.read_text() for path in jobs.glob("*.code")} == {"0\n"}
    check_same(project, undisturbed)
