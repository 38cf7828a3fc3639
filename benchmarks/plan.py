"""What `a3 plan` takes, and what it expects against what jobs took.

    python benchmarks/plan.py
    make study-attention
    python benchmarks/plan.py results

Without an argument: seconds and memory of `a3 plan`, one thread, for the shapes of models of all
sizes, of which there is only config.json, by preset; and of every mode in one of them.

With a folder of results: each job of collect, approx and eval ppl has left its seconds and its peak
memory beside its log, as Snakemake measures them. The estimates are made now, on the machine that
ran them, one thread each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from a3.artifacts.places import Place
from a3.core.files import read_record
from a3.jobs.forecast import Job, forecast
from a3.rxx.container import Rxx
from a3.solutions.modes import COMPONENTS, DENSE, MODES, PRESETS

ONE = {"threads": 1, "device": "cpu"}

# Hidden and intermediate size, query and key/value heads, layers: SmolLM2-135M, Llama-3.2-1B,
# Llama-3.1-8B and 70B.
SHAPES = {
    "135M": (576, 1536, 9, 3, 30, 49152),
    "1B": (2048, 8192, 32, 8, 16, 128256),
    "8B": (4096, 14336, 32, 8, 32, 128256),
    "70B": (8192, 28672, 64, 8, 80, 128256),
}

KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
KEYS = (*KEYS, "num_hidden_layers", "vocab_size")


def own_costs(work: Path) -> pd.DataFrame:
    """Seconds and memory of `a3 plan` itself: each preset, and each mode that fits, alone."""
    rows = []
    for name, shape in SHAPES.items():
        config = dict(zip(KEYS, shape, strict=True)) | {"model_type": "llama"}
        (work / name).mkdir()
        (work / name / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
        rows += [(name, preset, modes) for preset, modes in PRESETS.items()]
        rows.append((name, "svd-llm", dict.fromkeys(COMPONENTS, "svd-llm")))
    for component in COMPONENTS:
        for mode, about in MODES[component].items():
            if {"gqa-rope", "3-layer"} & set(about.fits):
                alone = dict.fromkeys(COMPONENTS, DENSE) | {component: mode}
                rows.append(("8B", f"{component} {mode}", alone))
    found = []
    for name, what, modes in rows:
        words = [word for one, mode in modes.items() for word in (f"--{one}", mode)]
        found.append((name, what, *own_cost(["plan", str(work / name), *words])))
    return pd.DataFrame(found, columns=["model", "modes", "wall s", "CPU s", "MiB"])


def own_cost(words: list[str]) -> tuple[float, float, float]:
    """Wall and CPU seconds of a command of a3, and MiB; the disk may be too small for its plan."""
    command = [sys.executable, "-m", "a3", *words, "--ratio", "0.2", "--threads", "1"]
    start = time.perf_counter()
    job = subprocess.Popen(
        [*command, "--elsewhere"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, _, used = os.wait4(job.pid, 0)
    wall = time.perf_counter() - start
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def jobs(results: Path) -> Iterator[tuple[Job, pd.Series]]:
    """Each job that left a benchmark, and what it took."""
    for path in sorted((results / "logs").rglob("*.benchmark.tsv")):
        took = pd.read_csv(path, sep="\t").iloc[0]
        sort, model, *rest = path.relative_to(results / "logs").parts
        folder = str(results / "models" / model)
        if sort == "rxx" and rest[-1] == "together.benchmark.tsv":
            files = sorted((results / "rxx" / model / rest[0]).glob("*.safetensors"))
            record = Rxx(files[0], files[0].stem).record
            settings = {key: record[key] for key in ("tokens", "block_length", "dtype")}
            yield Job(folder, "collect", ONE | settings | {"kinds": [f.stem for f in files]}), took
        elif sort == "checkpoints":
            ratio = rest[-1].removesuffix(".benchmark.tsv")
            yield (
                Job(folder, "approx", ONE | {"row": row(model, *rest[:2], ratio), "jobs": 1}),
                took,
            )
        elif sort == "eval" and rest[-2] == "ppl":
            name = rest[-1].replace(".benchmark.tsv", ".json")
            record = read_record(results / "eval" / model / Path(*rest[:-1]) / name)
            tokens = record["blocks"] * record["block_length"]
            settings = {key: record[key] for key in ("block_length", "dtype")} | {"tokens": tokens}
            modes = {} if rest[0] == "dense" else row(model, *rest[:3])
            yield Job(folder, "ppl", ONE | settings | {"row": modes}), took


def row(*names: str) -> dict[str, str]:
    """Modes and ratio of a compressed row by the names of its path."""
    place = Place.parse("/".join(names))
    return {key: getattr(place, key) for key in (*COMPONENTS, "ratio")}


def main() -> None:
    """Compare and print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("results", type=Path, nargs="?")
    results = options.parse_args().results
    if results is None:
        with tempfile.TemporaryDirectory() as name:
            print(own_costs(Path(name)).round(1).to_string(index=False))
        return
    found = list(jobs(results))
    estimates = forecast([job for job, _ in found])
    frame = pd.DataFrame(
        {
            "model": e.model,
            "stage": e.stage,
            "seconds": took["s"],
            "expected s": e.seconds,
            "MiB": took["max_rss"],
            "expected MiB": e.memory / 2**20,
        }
        for e, (_, took) in zip(estimates, found, strict=True)
    )
    frame["time ratio"] = frame["expected s"] / frame["seconds"]
    frame["memory ratio"] = frame["expected MiB"] / frame["MiB"]
    groups = frame.groupby(["model", "stage"])
    means = groups[["seconds", "expected s", "MiB", "expected MiB"]].mean()
    ratios = groups[["time ratio", "memory ratio"]].agg(["min", "max"])
    ratios.columns = [" ".join(column) for column in ratios.columns]
    print(pd.concat([groups.size().rename("jobs"), means, ratios], axis=1).round(2).to_string())


if __name__ == "__main__":
    main()
