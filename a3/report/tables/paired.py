"""Paired differences of two runs over the same blocks or items, and what they say."""

import math
from collections.abc import Sequence
from statistics import fmean

import pandas as pd

from a3.artifacts.runs import Run

BETTER, WORSE, SAME = "better", "worse", "no difference"

# A difference is significant from this many standard errors on.
ERRORS = 2


def differences(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Mean of after − before over pairs, and its standard error; NaN for a single pair."""
    found = pd.Series([b - a for a, b in zip(before, after, strict=True)])
    return {"delta": float(found.mean()), "delta_stderr": float(found.sem())}


def losses_apart(before: Run, after: Run, entry: str) -> dict[str, float]:
    """Mean loss of one run less that of another, nats a token, on a text or the mean of a set.

    The texts of a set are given: the standard error is that of the blocks within them.
    """
    found = [
        differences(before.texts[text]["block_nll"], after.texts[text]["block_nll"])
        for text in after.texts_of(entry)
    ]
    return {
        "delta": fmean(each["delta"] for each in found),
        "delta_stderr": error_of_mean([each["delta_stderr"] for each in found]),
    }


def error_of_mean(errors: Sequence[float]) -> float:
    """The standard error of the mean of independent values that have these errors."""
    return math.hypot(*errors) / len(errors)


def verdict(delta: float, delta_stderr: float, lower_is_better: bool | None) -> str:
    """Better, worse or the same; "" if a single pair leaves no standard error.

    Also "" if it is not known (None) whether higher or lower is better.
    """
    if math.isnan(delta_stderr) or lower_is_better is None:
        return ""
    if abs(delta) <= ERRORS * delta_stderr:
        return SAME
    return BETTER if (delta < 0) == lower_is_better else WORSE
