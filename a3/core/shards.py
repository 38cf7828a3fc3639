"""Splits blocks or layers into shards, which are named "0of4" to "3of4"."""

import re
from collections.abc import Sequence
from pathlib import Path

from a3.core.errors import A3Error

# Largest size of a file of weights, unless a single layer is larger; a job holds one in memory.
LARGEST_SHARD = 2**30


def share(count: int, shard: str, what: str) -> range:
    """The range of `count` items that belongs to a shard; ranges are as equal as possible.

    Raises A3Error for another spelling, a number out of range, and more shards than items; `what`
    names the items in the message.
    """
    found = re.fullmatch(r"(0|[1-9]\d*)of([1-9]\d*)", shard)
    index, shards = (int(group) for group in found.groups()) if found else (0, 0)
    if index >= shards or shards > count:
        raise A3Error(
            f"shard {shard!r}: expected 0of{count}, or of fewer shards of these {count} {what}, "
            "counted from 0."
        )
    return range(count * index // shards, count * (index + 1) // shards)


def weight_files(shards: int) -> list[str]:
    """Names of a checkpoint's files of weights that is made in several shards, as on the hub."""
    count = shards + 1
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return ["model.safetensors"] if shards == 1 else names


def require_all(found: Sequence[str | None], where: Path, missing: str) -> None:
    """Raise A3Error unless `found` names all shards, in order; `missing` says what to do."""
    if list(found) != [f"{i}of{len(found)}" for i in range(len(found))]:
        raise A3Error(
            f"{where}: the shards are {found}, expected all of {len(found)} in order. {missing}"
        )
