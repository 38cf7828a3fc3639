"""Memory, disk and time of a3 and a3-plus by the size of a model, as `a3 plan` estimates them here.

    python benchmarks/sizes.py

The paper's calibration (128 blocks of 2048 tokens) in bfloat16, ratio 0.2, from collect to the
written checkpoint: on one core, and on a cluster that runs 16 jobs of one core each, where memory
is that of one job. Disk includes hidden states, which go at the end.
"""

import json
import tempfile
from pathlib import Path

import pandas as pd
from plan import KEYS, ONE, SHAPES

from a3.core.memory import GIB
from a3.jobs.forecast import Job, forecast, minutes
from a3.models.arch import sketch
from a3.rxx.kinds import states_disk
from a3.solutions.modes import PRESETS, choose
from a3.solutions.plan import Plan

MODELS = SHAPES | {"13B": (5120, 13824, 40, 40, 40, 32000)}
TOKENS, BLOCK = 128 * 2048, 2048
WHERE = {"one core": 1, "16 jobs": 16}


def jobs(folder: Path, row: dict[str, str], count: int) -> list[Job]:
    """Collect, losses by rank and approx, one of `count` jobs each."""
    plan = Plan(choose(row))
    passes = {"tokens": TOKENS // count, "block_length": BLOCK, "dtype": "bfloat16"}
    losses = [Job(str(folder), "allocate", ONE | {"row": row})] if plan.shared else []
    return [
        Job(str(folder), "collect", ONE | passes | {"kinds": plan.kinds()}),
        *losses,
        Job(str(folder), "approx", ONE | {"row": row, "jobs": count}),
    ]


def estimates(folder: Path) -> list[tuple[str, ...]]:
    """Rows of the table for the model of a folder."""
    rows = {preset: modes | {"ratio": "0.2"} for preset, modes in PRESETS.items()}
    cases = {
        (preset, where): jobs(folder, row, count)
        for preset, row in rows.items()
        for where, count in WHERE.items()
    }
    # Together, so that each piece is timed once.
    left = forecast([job for case in cases.values() for job in case])
    found = []
    for (preset, where), case in cases.items():
        own, left = left[: len(case)], left[len(case) :]
        count, kinds = WHERE[where], Plan(choose(rows[preset])).kinds()
        # Losses are divided among jobs like layers.
        seconds = sum(one.seconds / (count if one.stage == "allocate" else 1) for one in own)
        # Each job of collect writes whole sums, and each of approx its share of the checkpoint.
        disk = count * (own[0].disk + own[-1].disk)
        disk += states_disk(sketch(folder).to_json(), TOKENS, "bfloat16", kinds)
        memory = max(one.memory for one in own)
        said = (f"{memory / GIB:.1f} GiB", f"{disk / GIB:.0f} GiB", minutes(seconds))
        found.append((folder.name, preset, where, *said))
    return found


def main() -> None:
    """Print the table."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for model, shape in MODELS.items():
            folder = Path(name, model)
            folder.mkdir()
            config = dict(zip(KEYS, shape, strict=True)) | {"model_type": "llama"}
            (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
            rows += estimates(folder)
    columns = ["model", "modes", "where", "memory", "disk", "time"]
    print(pd.DataFrame(rows, columns=columns).to_string(index=False))


if __name__ == "__main__":
    main()
