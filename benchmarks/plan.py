"""What `a3 plan` expects against what jobs took: time and memory, from a results folder.

    make study-attention
    python benchmarks/plan.py results

Each job of collect, approx and eval ppl has left its seconds and its peak memory beside its log, as
Snakemake measures them. The estimates are made now, on the machine that ran them, one thread each.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from a3.artifacts.places import Place
from a3.core.files import read_record
from a3.jobs.forecast import Job, forecast
from a3.rxx.container import Rxx
from a3.solutions.modes import COMPONENTS

ONE = {"threads": 1, "device": "cpu"}


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
    options.add_argument("results", type=Path)
    found = list(jobs(options.parse_args().results))
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
