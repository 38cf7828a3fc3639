"""Rounds numbers for readable tables."""

import math
from typing import Any


def is_empty(cell: Any) -> bool:
    """Whether a cell of a table has nothing in it."""
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def rounded(value: float, decimals: int = 2, sign: str = "") -> str:
    """So many decimals while they mean something: from 1000 on, four digits."""
    return f"{value:{sign}.{decimals}f}" if abs(value) < 1000 else f"{value:{sign}.4g}"


def plain(value: float) -> str:
    """Whole numbers and large ones without decimals, others to four digits."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def plus_minus(text: str, error: float | None) -> str:
    """Append a standard error, if there is one, with as many decimals as the number has."""
    if is_empty(error) or text == "–":
        return text
    if "e" in text:
        return f"{text} ± {error:.2g}"
    return f"{text} ± {error:.{len(text.partition('.')[2])}f}"
