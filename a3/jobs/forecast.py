"""a3 plan: memory, disk, FLOPs and time of jobs, from a model's shapes, before anything runs.

Memory and FLOPs come from `a3.models.cost`. Time is measured: small pieces of one layer with random
weights are run and solved on this machine, and their times are scaled up (a3.jobs.pieces).
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from a3.core.errors import A3Error
from a3.core.memory import GIB, require_memory
from a3.core.progress import LOG
from a3.jobs.settings import settings_of
from a3.jobs.trial import Trial
from a3.models.arch import load_arch
from a3.models.cost import Cost
from a3.solutions.modes import choose
from a3.solutions.plan import Plan
from a3.solutions.target import TRIAL_BLOCKS, TRIALS
from a3.stages.evaluate.fit import BLOCKS

# Tokens that the plan of one model evaluates, as `a3 eval ppl` does by default.
SCORED = 16384

# The function that estimates each stage.
STAGES: dict[str, Callable[..., tuple[Cost, int, float]]] = {
    "collect": Trial.collect,
    "allocate": Trial.allocate,
    "approx": Trial.approx,
    "quantise": Trial.quantise,
    "ppl": Trial.ppl,
    "harness": Trial.harness,
    "speed": Trial.speed,
}

# Floating-point operations of a pass that are worth an estimate, which takes seconds.
MUCH = 2e12

# Memory estimates are at most 1.5 times too high: with less than this share, a job must fail.
CERTAIN = 1 / 1.5


@dataclass(frozen=True)
class Job:
    """`count` equal jobs on the model of a folder.

    `stage` is a name in STAGES; `settings` are those of `settings_of`.
    """

    model: str
    stage: str
    settings: dict[str, Any]
    count: int = 1


@dataclass(frozen=True)
class Estimate:
    """For each of `count` jobs: bytes in memory, bytes that it leaves on disk, FLOPs, seconds."""

    model: str
    stage: str
    count: int
    memory: int
    disk: int
    flops: float
    seconds: float


def stages_of(
    folder: Path, row: dict[str, str], settings: dict[str, Any], scored: int = SCORED
) -> list[Job]:
    """Collect, allocate where ranks are allocated, approx, and perplexity before and after, of one
    model by one row and of so many `scored` tokens."""
    plan = Plan(choose(row))
    known = settings | {"threads": torch.get_num_threads(), "kinds": plan.kinds(), "jobs": 1}

    def job(stage: str, **own: Any) -> Job:
        said = known | own
        return Job(str(folder), stage, {key: said[key] for key in settings_of(stage)})

    return [
        job("collect"),
        *([job("allocate", row=row)] if plan.shared else []),
        job("approx", row=row),
        job("ppl", row={}, tokens=scored),
        job("ppl", row=row, tokens=scored),
    ]


def trials_of(
    folder: Path, row: dict[str, str], settings: dict[str, Any]
) -> tuple[list[Job], list[Job]]:
    """What a largest loss takes besides: once, and for each trial (a3.promise); nothing without."""
    target = Plan(choose(row)).target
    if target is None or target.max_loss is None:
        return [], []
    tokens = TRIAL_BLOCKS * settings["block_length"]
    _, *_, approx, dense, scored = stages_of(folder, row, settings, tokens)
    return [dense], [approx, scored]


def forecast(jobs: list[Job]) -> list[Estimate]:
    """One estimate for each job; raises A3Error for a model or mode that a3 would refuse.

    Raises TypeError for settings that the stage does not have.
    """
    trial_of = cache(Trial)
    estimates = []
    for job in jobs:
        own = dict(job.settings)
        threads, device = own.pop("threads"), own.pop("device")
        torch.set_num_threads(threads)
        trial = trial_of(Path(job.model), device, threads)
        cost, disk, seconds = STAGES[job.stage](trial, **own)
        name = Path(job.model).name
        estimates.append(
            Estimate(name, job.stage, job.count, cost.memory, disk, cost.flops, seconds)
        )
    return estimates


def announce(row: dict[str, str], settings: dict[str, Any], texts: int, folder: Path) -> None:
    """Print in one line what compressing the model of a folder will cost, if that is much.

    With the loss on a few blocks of so many `texts` at the end.
    """
    jobs = stages_of(folder, row, settings, texts * BLOCKS * settings["block_length"])
    arch = load_arch(folder)
    if settings["tokens"] * arch.size["flops_per_token"] < MUCH:
        return
    found = forecast(jobs)
    *own, before, after = found
    statistics, *_, layers = (one.disk for one in own)
    took = {one.stage: one.seconds for one in own} | {"loss": before.seconds + after.seconds}
    once, again = (forecast(own) for own in trials_of(folder, row, settings))
    if again:
        took["trials"] = sum(e.seconds for e in once) + TRIALS * sum(e.seconds for e in again)
    each = ", ".join(f"{stage} {minutes(seconds)}" for stage, seconds in took.items())
    LOG.info(
        f"compress: about {minutes(sum(took.values()))} ({each}), "
        f"{max(one.memory for one in own) / GIB:.1f} GiB of memory and "
        f"{(layers + max(statistics, layers)) / GIB:.1f} GiB on disk"
    )


def table(estimates: list[Estimate], cores: int) -> str:
    """The estimates as a readable table; `cores` jobs run at once."""
    frame = pd.DataFrame(
        {
            "model": e.model,
            "stage": e.stage,
            "jobs": e.count,
            "memory a job": f"{e.memory / GIB:.1f} GiB",
            "disk": f"{e.count * e.disk / GIB:.2f} GiB",
            "TFLOPs": f"{e.count * e.flops / 1e12:.3g}",
            "time a job": minutes(e.seconds),
        }
        for e in estimates
    )
    seconds = sum(e.count * e.seconds for e in estimates) / cores
    disk = sum(e.count * e.disk for e in estimates)
    memory = max(e.memory for e in estimates)
    return (
        f"{frame.to_string(index=False)}\n"
        f"together {minutes(seconds)} with {cores} at once, {disk / GIB:.2f} GiB on disk; "
        f"the largest job takes {memory / GIB:.1f} GiB of memory"
    )


def minutes(seconds: float) -> str:
    """15 s, 12 min, 3.5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def refuse(estimates: list[Estimate], results: Path, here: bool) -> None:
    """Raise A3Error if there is not enough disk or, for jobs that run `here`, memory."""
    place = next(p for p in (results.absolute(), *results.absolute().parents) if p.exists())
    disk, free = sum(e.count * e.disk for e in estimates), shutil.disk_usage(place).free
    if disk > free:
        raise A3Error(
            f"{results}: {disk / GIB:.2f} GiB are to be written, {free / GIB:.2f} GiB are free. "
            "Free some space, put results elsewhere, or take fewer rows."
        )
    advice = {
        "approx": "Raise approx_jobs, so that each holds fewer layers",
        "collect": "Even one layer at a time is too much: lower block_length",
    }
    other = "Take a dtype of fewer bytes"
    for e in estimates if here else ():
        what = f"{e.model}: a job of {e.stage}"
        require_memory(int(e.memory * CERTAIN), what, advice.get(e.stage, other))
