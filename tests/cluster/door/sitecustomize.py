"""Holds jobs at the worst moment, for the drills. On PYTHONPATH, Python imports this by itself.

While the file `$A3_DOOR/collect` is there, an `a3 collect` that has written its first output under
a temporary name waits before it renames it, and takes as many MiB as the file says; the file
`collect.<Slurm job>` tells that it does. The same holds for approx and eval.

And Snakemake asks Slurm every second; otherwise each look comes ten seconds later than the last.
"""

import os
import sys
import time
from pathlib import Path

rename = Path.replace


def wait_then_rename(self, target):
    """Rename when the door is open."""
    door = Path(os.environ["A3_DOOR"], sys.argv[1])
    if door.exists():
        Path(f"{door}.{os.environ['SLURM_JOB_ID']}").touch()
        taken = b"x" * (int(door.read_text() or 0) << 20)
        while door.exists():
            time.sleep(0.1)
        del taken
    return rename(self, target)


def ask_every_second():
    """Fix the time between two looks."""
    from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

    every_second = property(lambda self: 1, lambda self, value: None)
    RemoteExecutor.next_seconds_between_status_checks = every_second


if "A3_DOOR" in os.environ:
    if Path(sys.argv[0]).name == "a3":
        Path.replace = wait_then_rename
    elif "--profile" in sys.argv:
        ask_every_second()
