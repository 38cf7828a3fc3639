"""Commands for statistics: a3 collect, merge."""

from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli import options as values
from a3.cli.arguments import (
    ANY_MODEL,
    ROW,
    add,
    add_blocks,
    add_model,
    add_out,
    add_rows,
    add_run,
    add_shard,
    add_stream,
    add_text,
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
    one = add(
        commands,
        "collect",
        collect,
        "collect statistics of activations (Rxx)",
        "Reads a model and a text, runs the model over blocks of the text, and writes one file for "
        "each kind of statistic (with --shard, of a shard of the blocks). docs/modes.md says which "
        "kinds a mode needs.",
        "a3 collect dense --text docs.jsonl -o rxx/q_blocks.safetensors rxx/k_blocks.safetensors",
    )
    add_model(one, ANY_MODEL)
    add_text(one)
    text_ = "<kind>.safetensors of each statistic: q_blocks, down_diagonal …"
    add_out(one, targets.STATISTICS, "FILE", text_, nargs="+")
    add_rows(one, type=values.rows(*ROW, least=0), default=[])
    add_stream(one)
    add_shard(one)
    add_run(add_blocks(one, tokens=32768, seed=True))


def merge(shards: list[Path], out: Path) -> None:
    """Add the statistics of shards."""
    from a3.stages.collect.merge import merge_shards

    merge_shards(shards, out)


def add_merge(commands: Any) -> None:
    """Arguments of a3 merge."""
    one = add(
        commands,
        "merge",
        merge,
        "add the statistics of all shards",
        "Reads what a3 collect --shard wrote of one kind of statistic, and writes the sum.",
        "a3 merge shards/0of2/q_blocks.safetensors shards/1of2/q_blocks.safetensors "
        "-o rxx/q_blocks.safetensors",
    )
    text_ = "files of one kind of statistic, in order"
    one.add_argument("shards", type=Path, nargs="+", metavar="SHARD", help=text_)
    add_out(one, targets.STATISTICS, "FILE", "<kind>.safetensors")
