"""Scores on a set of texts: the mean over the texts, in which each counts the same, and the worst.

The blocks of two runs are the same, so that errors are those of paired differences. The texts are
given: the error of a mean over them is that of the blocks within each.
"""

from operator import mul
from statistics import fmean
from typing import Any

import pandas as pd

from a3.artifacts.runs import Run
from a3.core.records import Record
from a3.report.tables.frames import named
from a3.report.tables.paired import error_of_mean, losses_apart


def set_results(dense: Run, run: Run, name: str) -> dict[str, Any]:
    """Columns of results.csv of a set: the mean, and the text that loses most against dense."""
    record, before = run.perplexity[name], dense.perplexity[name]
    found = losses_apart(dense, run, name)
    lost = {text: run.texts[text]["nll"] - dense.texts[text]["nll"] for text in run.texts_of(name)}
    worst = max(lost, key=lambda text: lost[text])
    return named(
        f"{name}.mean",
        {
            "perplexity": record["perplexity"],
            "perplexity_stderr": record["perplexity_stderr"],
            "perplexity_delta": record["perplexity"] - before["perplexity"],
            "nll_delta": record["nll"] - before["nll"],
            "nll_delta_stderr": found["delta_stderr"],
        },
    ) | named(f"{name}.worst", {"text": worst.removeprefix(f"{name}."), "nll_delta": lost[worst]})


def set_shares(dense: Run, reference: Run, run: Run, name: str) -> dict[str, Any]:
    """Columns of comparisons.csv of a set: the increase of each text's perplexity over dense, as a
    share of the reference's increase; the mean of these shares, and the worst text.

    Nothing where the reference does not increase the perplexity of each text.
    """
    found = {
        text: share(dense.texts[text], reference.texts[text], run.texts[text])
        for text in run.texts_of(name)
    }
    if None in found.values():
        return {}
    shares = {text: each for text, each in found.items() if each is not None}
    columns: dict[str, Any] = {}
    for text, each in shares.items():
        columns |= named(text, each)
    columns |= named(
        f"{name}.mean",
        {
            "share": fmean(each["share"] for each in shares.values()),
            "share_stderr": error_of_mean([each["share_stderr"] for each in shares.values()]),
        },
    )
    worst = max(shares, key=lambda text: shares[text]["share"])
    said = {"text": worst.removeprefix(f"{name}.")} | shares[worst]
    return columns | named(f"{name}.worst", said)


def share(dense: Record, reference: Record, record: Record) -> dict[str, float] | None:
    """(p - d) / (r - d) of the perplexities p, r and d of a row, the reference and the dense model.

    The standard error is by the delta method over blocks, each of which all three have scored.
    None if r is not above d.
    """
    d, r, p = (each["perplexity"] for each in (dense, reference, record))
    if r <= d:
        return None
    span = r - d
    # Derivatives by the mean losses, of which perplexities are the exponentials.
    slopes = (d * (p - r) / span**2, -r * (p - d) / span**2, p / span)
    blocks = zip(*(each["block_nll"] for each in (dense, reference, record)), strict=True)
    effects = pd.Series([sum(map(mul, slopes, block)) for block in blocks])
    return {"share": (p - d) / span, "share_stderr": float(effects.sem())}
