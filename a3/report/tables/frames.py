"""Frames of result tables: made of rows, written as .csv, and read back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from a3.artifacts.places import PLACE
from a3.core.errors import A3Error
from a3.core.files import whole_file


def frame_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a frame, values exactly as they are: object columns keep ints beside empty cells.

    No rows leave the headings of their places.
    """
    return pd.DataFrame(rows, dtype=object) if rows else pd.DataFrame(columns=PLACE)


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame in full precision."""
    with whole_file(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")


def write_text(path: Path, text: str) -> None:
    """Write a page of Markdown or HTML."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_csv(path: Path, texts: Sequence[str] = PLACE) -> pd.DataFrame:
    """Read a .csv of a table back: columns `texts` as text, and empty cells as NaN."""
    if not path.is_file():
        raise A3Error(f"{path}: no such file. Build the table first.")
    return pd.read_csv(path, dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=[""])


def print_table(out: Path) -> str:
    """The rounded tables of `out`, for the terminal. Raises A3Error when they are not built yet."""
    path, surgery = out / "results.md", out / "surgery.md"
    if not path.is_file():
        raise A3Error(f"{path}: no such file. Build the table first.")
    there = [each for each in (path, surgery) if each.is_file()]
    return "\n".join(each.read_text(encoding="utf-8") for each in there)


def named(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of one text or task: `wikipedia.perplexity`."""
    return {f"{name}.{key}": value for key, value in values.items()}
