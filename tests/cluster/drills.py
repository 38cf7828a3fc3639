"""Snakemake on Slurm, whose jobs can be held at a door, and what Slurm says of them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from test_workflow import Project

ROOT = Path(__file__).parent.parent.parent
# So that tests are short; the profile's own values suit a busy cluster.
QUICK = ("--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "5")
# The command as the page has it.
PAGE = (ROOT / "docs/cluster.md").read_text()
COMMAND = re.search(r"^ {4}snakemake (--profile \S+/slurm)", PAGE, re.MULTILINE)[1].split()
# The chain of one experiment.
TARGET = "results/eval/tiny/short/rxx-w-rxx+xkv+rxx-w/0.25/ppl/score.json"
CHAIN = ["approx", "collect_together", "eval_ppl"]


def slurm(*words):
    """Lines that one of Slurm's commands prints."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()


def until(what, condition, seconds=600):
    """Wait for a condition; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not after {seconds} s"
        time.sleep(0.2)
    return value


def unlike(path):
    """Whether a file differs between equal runs: seconds do."""
    return "timing" in path.name or path.name in ("timings.csv", "report.html")


class Run:
    """Snakemake, started on Slurm; its jobs can be held at a door."""

    def __init__(self, project, *arguments):
        self.project = project
        self.log = project.folder / f"run.{time.monotonic_ns()}.log"
        paths = os.pathsep.join((str(project.folder), str(Path(__file__).parent / "door")))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "snakemake", *COMMAND, *QUICK, *arguments],
                cwd=project.folder,
                env=os.environ | {"PYTHONPATH": paths, "A3_DOOR": str(project.door)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, status=0):
        """Wait for the end; rules that were started, sorted, and all that was said."""
        assert self.process.wait(900) == status, self.log.read_text()
        output = self.log.read_text()
        return sorted(re.findall(r"^rule (\w+):", output, re.MULTILINE)), output

    def jobs(self):
        """Jobs of the run that Slurm knows, the finished included: a dictionary each, in order."""
        run = re.search(r"SLURM run ID: (\S+)", self.log.read_text())[1]
        fields = {"id": "i", "state": "T", "rule": "k", "memory": "m", "time": "l", "cpus": "C"}
        fields |= {"partition": "P", "gres": "b"}
        pattern = "|".join(f"%{letter}" for letter in fields.values())
        lines = slurm("squeue", "-h", "--states=all", f"--name={run}", f"--format={pattern}")
        found = [dict(zip(fields, line.split("|"), strict=True)) for line in lines]
        for job in found:
            job["rule"] = re.match("rule_(.*?)(_wildcards_.*)?$", job["rule"])[1]
        return sorted(found, key=lambda job: int(job["id"]))

    def held(self, stage, besides=()):
        """Wait until a job stands at the door of a stage; its ID."""

        def waiting():
            assert self.process.poll() is None, self.log.read_text()
            marks = self.project.door.glob(f"{stage}.*")
            return [mark.suffix[1:] for mark in marks if mark.suffix[1:] not in besides]

        return until(f"a job of {stage} at its door", waiting)[0]

    def kill(self):
        """As a machine that dies: Snakemake alone, its jobs go on."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)


class ClusterProject(Project):
    """A tiny project whose stages have doors."""

    def __init__(self, folder):
        super().__init__(folder)
        self.door.mkdir()
        self.runs = []

    @property
    def door(self):
        return self.folder / "door"

    def copy(self, folder):
        """The same project in another folder."""
        copy = object.__new__(ClusterProject)
        copy.folder, copy.runs = folder, []
        shutil.copytree(self.folder, folder)
        return copy

    def start(self, *arguments):
        self.runs.append(Run(self, *arguments))
        return self.runs[-1]

    def shut(self, stage, mebibytes=""):
        (self.door / stage).write_text(str(mebibytes))

    def open(self, stage):
        (self.door / stage).unlink()

    def a3(self, *words):
        """Run a command of a3 in the project's folder."""
        done = subprocess.run(
            [Path(sys.executable).parent / "a3", *words],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    def contents(self):
        """Content of every artifact that equal runs make equal, by its name in the folder."""
        files = self.files()
        return {str(p.relative_to(self.folder)): files[p] for p in files if not unlike(p)}


def check_same(project, undisturbed):
    """Every artifact is as in an undisturbed run, and nothing else is there, hidden or not."""
    found, expected = project.contents(), undisturbed.contents()
    assert [name for name in found if found[name] != expected.get(name)] == []
    assert TARGET in found
