"""Reading, writing and naming of tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from a3.artifacts.places import PLACE
from a3.core.errors import A3Error
from a3.core.files import whole_file


def print_table(out: Path) -> str:
    """The rounded tables of `out`, for the terminal. Raises A3Error when they are not built yet."""
    path, surgery = out / "results.md", out / "surgery.md"
    if not path.is_file():
        raise A3Error(f"{path}: no such file. Build the table first.")
    there = [each for each in (path, surgery) if each.is_file()]
    return "\n".join(each.read_text(encoding="utf-8") for each in there)


def read_table(path: Path) -> pd.DataFrame:
    """Read a .csv of a table back, names as text and empty cells as NaN."""
    if not path.is_file():
        raise A3Error(f"{path}: no such file. Build the table first.")
    return pd.read_csv(path, dtype=dict.fromkeys(PLACE, str), keep_default_na=False, na_values=[""])


def named(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of one text or task: `wikipedia.perplexity`."""
    return {f"{name}.{key}": value for key, value in values.items()}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows`, numbers exactly as they are: object columns keep ints beside empty cells.

    No rows leave the headings of their places.
    """
    frame = pd.DataFrame(rows, dtype=object) if rows else pd.DataFrame(columns=PLACE)
    with whole_file(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")
