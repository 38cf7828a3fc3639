"""A job of the workflow as one line of text."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import LogRecord
from pathlib import Path
from typing import Any

from a3.solutions.modes import COMPONENTS

# How much of a failed job's log is shown.
TAIL = 20


def perplexity(record: dict[str, Any]) -> str:
    """What a perplexity result says."""
    return f"perplexity {record['perplexity']:,.2f}"


def score(record: dict[str, Any]) -> str:
    """What a harness result says: its main metric."""
    value = record["value"]
    return "" if value is None else f"{record['metric']} {value:.3f}"


# The figure that a job made, from its first output.
FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "eval_ppl": perplexity,
    "eval_harness": score,
}


@dataclass(frozen=True)
class Job:
    """A job as Snakemake announces it; `started` is in seconds since the epoch."""

    rule: str
    wildcards: dict[str, str]
    output: Sequence[str]
    reason: str
    started: float

    @classmethod
    def of(cls, record: LogRecord) -> "Job":
        """The job of a JOB_INFO record."""
        said = vars(record)
        rule, wildcards = said["rule_name"], dict(said["wildcards"] or {})
        return cls(rule, wildcards, said["output"], said["reason"], record.created)

    @property
    def what(self) -> str:
        """The stage: the rule's name as words."""
        return re.sub(r"_together(_\d+)?$", "", self.rule).replace("_", " ")

    @property
    def subject(self) -> str:
        """Model, calibration, modes, ratio and what is scored, as far as the job has them."""
        get = self.wildcards.get
        fields = [get("model"), get("calibration")]
        fields += ["+".join(self.wildcards[c] for c in COMPONENTS if c in self.wildcards)]
        fields += [get(key) for key in ("mode", "ratio", "size", "quantise", "heal")]
        fields += get("run", "").split("/")
        fields += [get(key) for key in ("kind", "text", "task", "speed", "table", "type", "wheel")]
        fields += [(get("shard") or get("shard_folder") or "").rpartition("/")[2]]
        return " ".join(field for field in fields if field)

    @property
    def name(self) -> str:
        """Stage and subject in columns."""
        return f"{self.what:<14} {self.subject}".rstrip()

    @property
    def figure(self) -> str:
        """The result that the finished job wrote, in words; nothing for most stages."""
        if self.rule not in FIGURES:
            return ""
        return FIGURES[self.rule](json.loads(Path(self.output[0]).read_text()))

    @property
    def why(self) -> str:
        """Snakemake's reasons without their lists of files."""
        reasons = [reason.partition(":")[0] for reason in self.reason.split("; ")]
        return ", ".join(reason[:1].lower() + reason[1:] for reason in reasons)


def duration(seconds: float) -> str:
    """Seconds as text: 3.2 s, 41 s, 2 min 05 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def jobs(number: int) -> str:
    """A number of jobs as text."""
    return "1 job" if number == 1 else f"{number} jobs"


def end_of(log: Sequence[str]) -> str:
    """The last lines of a failed job's logs, indented, each log under its path."""
    shown: list[str] = []
    for path in log:
        lines = Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []
        shown.append(f"  the end of {path}:" if lines else f"  {path} is empty")
        shown += [f"    {line}" for line in lines[-TAIL:]]
    return "\n".join(shown)
