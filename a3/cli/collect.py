"""Commands for statistics: a3 collect, merge."""

import argparse
from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli import options as values
from a3.cli.arguments import (
    ROW,
    TEXT,
    add,
    add_blocks,
    add_out,
    add_run,
    folder,
)


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    add_collect(commands)
    add_merge(commands)


def collect(
    model: Path, text: Path, out: list[Path], experiments: list[dict[str, str]], **settings: Any
) -> None:
    """Collect statistics."""
    from a3.solutions.plan import check_experiments
    from a3.stages.collect.collect import collect

    if experiments:
        check_experiments(folder(model), experiments)
    collect(folder(model), text, {path.stem: path for path in out}, **settings)


def add_collect(commands: Any) -> None:
    """Arguments of a3 collect."""
    one = add(commands, "collect", collect, "model and text to Rxx files")
    one.add_argument("model", type=Path, help="Hugging Face folder")
    one.add_argument("--text", type=Path, required=True, help=TEXT)
    text_ = "<kind>.safetensors for each statistic wanted: q_blocks, down_diagonal …"
    add_out(one, targets.STATISTICS, text_, nargs="+")
    text_ = "JSON: rows of the table of experiments, refused first where they do not fit the model"
    one.add_argument("--experiments", type=values.rows(*ROW, least=0), default=[], help=text_)
    text_ = "one layer at a time in memory (default: where all weights do not fit)"
    one.add_argument("--stream", action=argparse.BooleanOptionalAction, help=text_)
    one.add_argument(
        "--shard",
        type=values.shard,
        help="only a shard of the blocks: 0of4, 1of4 …; a3 merge adds them",
    )
    add_run(add_blocks(one, tokens=32768, seed=True))


def merge(shards: list[Path], out: Path) -> None:
    """Add the statistics of shards."""
    from a3.stages.collect.merge import merge_shards

    merge_shards(shards, out)


def add_merge(commands: Any) -> None:
    """Arguments of a3 merge."""
    one = add(commands, "merge", merge, "add the statistics of all shards")
    one.add_argument("shards", type=Path, nargs="+", help="one kind's files, in order")
    add_out(one, targets.STATISTICS, "<kind>.safetensors")
