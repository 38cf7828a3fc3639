"""Adds the statistics of shards, in order."""

from pathlib import Path

from a3.core.files import read_record, write_record
from a3.rxx.container import Rxx, merge


def merge_shards(paths: list[Path], out: Path) -> None:
    """Add the files of one kind of all shards, in order, to `out`; their seconds likewise.

    Raises A3Error as `a3.rxx.container.merge` does.
    """
    times = [read_record(path.with_suffix(".timing.json")) for path in paths]
    merge([Rxx(path, out.stem) for path in paths], out)
    seconds = sum(time["seconds"] for time in times)
    tokens = sum(time["seconds"] * time["tokens_per_second"] for time in times)
    timing = {"seconds": seconds, "tokens_per_second": tokens / seconds}
    write_record(out.with_suffix(".timing.json"), timing)
