"""After Snakemake was killed: cancel the cluster jobs that it left behind, and unlock its folder.

Slurm's jobs continue without the Snakemake that submitted them, and a new Snakemake does not find
them. All jobs of one run have the same name: the run ID, which is in Snakemake's log.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from a3.core.errors import A3Error
from a3.core.progress import LOG

PATIENCE = 120  # seconds that Slurm has to end cancelled jobs


def recover() -> None:
    """Cancel jobs that runs of this folder left in Slurm's queue, wait for them, and unlock.

    Raises A3Error if Snakemake has not run here or is still running (on this machine), if Slurm's
    commands are missing, or if jobs do not end.
    """
    logs = sorted(Path(".snakemake/log").resolve().glob("*.snakemake.log"))
    if not logs:
        raise A3Error(
            f"{Path.cwd()}: no .snakemake/log; expected the folder that snakemake was started in."
        )
    if process := holder(logs):
        raise A3Error(
            f"{Path.cwd()}: Snakemake still runs here, as process {process}. Stop it with Ctrl-C: "
            "it cancels its jobs and unlocks by itself."
        )
    runs = [run for log in logs for run in re.findall(r"SLURM run ID: (\S+)", log.read_text())]
    if runs:
        cancel(runs)
    words = ["--profile", "none", "--cores", "1", "--unlock"]
    subprocess.run([sys.executable, "-m", "snakemake", *words], check=True)


def holder(logs: list[Path]) -> int | None:
    """The process that is writing one of the logs, if any."""
    for process in psutil.process_iter(["open_files"]):
        opened = process.info["open_files"] or []  # None if it is another user's
        if any(Path(file.path) in logs for file in opened):
            return process.pid
    return None


def cancel(runs: list[str]) -> None:
    """Cancel the jobs of these runs and wait until none is left; A3Error if some remain."""
    if shutil.which("scancel") is None:
        raise A3Error("scancel not found. Run a3 recover where snakemake ran, on the login node.")
    end = time.monotonic() + PATIENCE
    while jobs := queued(runs):
        if time.monotonic() > end:
            raise A3Error(f"jobs {', '.join(jobs)} are still there after {PATIENCE} s. Try again.")
        LOG.info(f"recover: cancelling {', '.join(jobs)}")
        subprocess.run(["scancel", *jobs], check=True)
        time.sleep(1)


def queued(runs: list[str]) -> list[str]:
    """IDs of the jobs of these runs that are pending, running or completing."""
    command = ["squeue", "--noheader", "--format=%i", f"--name={','.join(runs)}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
