"""Paired differences between rows of a table, and statistics of rows over calibration seeds."""

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from a3.artifacts.protocols import HARNESS_PROTOCOL, LOG
from a3.artifacts.runs import Groups, Run
from a3.core.errors import A3Error
from a3.core.records import Record
from a3.report.tables.frames import named
from a3.report.tables.paired import differences, losses_apart, verdict
from a3.report.tables.sets import set_shares

# Keys of a statistics record that do not say how its text was read.
NOT_SETTINGS = {
    "stage",
    "modules",
    "code",
    "libraries",
    "kind",
    "weights_sha256",
    "config_sha256",
    "model",
    "sha256",
}


def comparisons(groups: Groups, reference: str | None) -> list[dict[str, Any]]:
    """Every row against the row of the method `reference` of its model, calibration and ratio.

    Differences are row − reference, paired over the same blocks (nll, nats a token) or items (what
    the items' values are the mean of: the task's metric, or its logarithm where it is a
    perplexity). For a metric that is not a mean over items, the difference of the scores has no
    error and no verdict. A verdict is about the row. Rows without a matching reference are left
    out. Raises A3Error if scores are not one an item.
    """
    if reference is None:
        return []
    return [
        _comparison(dense, run, other)
        for dense, runs in groups
        for run in runs
        if (other := _beside(run, runs, reference)) is not None
    ]


def _beside(run: Run, runs: Sequence[Run], reference: str | None) -> Run | None:
    """The reference of the same calibration and ratio; None for itself, or without a reference."""
    if run.place.method == reference:
        return None
    same = [
        other
        for other in runs
        if other.place.method == reference
        and (other.place.calibration, other.place.ratio) == (run.place.calibration, run.place.ratio)
    ]
    return same[0] if same else None


def _comparison(dense: Run, run: Run, other: Run) -> dict[str, Any]:
    """One row of comparisons.csv."""
    row: dict[str, Any] = run.place.names | {"reference": other.place.method}
    row["parameters_ratio"] = run.size["parameters"] / other.size["parameters"]
    for text, record in run.texts.items():
        row |= _losses(text, differences(other.texts[text]["block_nll"], record["block_nll"]))
        row[f"{text}.blocks"] = record["blocks"]
    for entry in filter(run.is_set, run.perplexity):
        row |= _losses(f"{entry}.mean", losses_apart(other, run, entry))
        row |= set_shares(dense, other, run, entry)
    for task, record in run.harness.items():
        row |= named(task, _harness(other.harness[task], record))
    return row


def _losses(name: str, found: dict[str, float]) -> dict[str, Any]:
    """The columns of a paired difference in nats a token, on a text or on the mean of a set."""
    columns = named(name, {f"nll_{key}": value for key, value in found.items()})
    return columns | {f"{name}.nll_verdict": verdict(**found, lower_is_better=True)}


def _harness(before: Record, after: Record) -> dict[str, Any]:
    """What two results of a task say of each other: nothing where one has no value."""
    measure = after["item_measure"]
    if measure is None or before["item_measure"] != measure:
        return _unpaired(before, after)
    scores = [each["item_scores"] for each in (before, after)]
    _require_items(after, scores)
    # An item that has no value in one of them says nothing.
    pairs = [pair for pair in zip(*scores, strict=True) if None not in pair]
    if not pairs:
        return {}
    found = differences(*zip(*pairs, strict=True))
    higher = False if measure.startswith(LOG) else after["higher_is_better"]
    said = verdict(**found, lower_is_better=None if higher is None else not higher)
    return {
        **{f"{measure}_{key}": value for key, value in found.items()},
        "items": len(pairs),
        f"{measure}_verdict": said,
    }


def _unpaired(before: Record, after: Record) -> dict[str, Any]:
    """The difference of two scores whose error over items nobody knows."""
    metric = after["metric"]
    if before["value"] is None or after["value"] is None:
        return {}
    return {
        f"{metric}_delta": after["value"] - before["value"],
        f"{metric}_delta_stderr": None,
        "items": after["items"],
        f"{metric}_verdict": "",
    }


def _require_items(record: Record, scores: list[list[float]]) -> None:
    """Raise A3Error if the scores of two results are not one an item."""
    if {len(each) for each in scores} != {record["items"]}:
        raise A3Error(
            f"{record.path}: item_scores has {len(scores[1])} scores, that of the reference "
            f"{len(scores[0])}; expected {record['items']} ({HARNESS_PROTOCOL[1]}). Delete both "
            "and build them again."
        )


# --- calibration seeds ---
def settings(record: dict[str, Any]) -> dict[str, Any]:
    """How the text of a statistics record was read, and which."""
    return {key: value for key, value in record.items() if key not in NOT_SETTINGS}


def seeds(groups: Groups, reference: str | None) -> list[dict[str, Any]]:
    """Each method and ratio that stands there with several calibration seeds, over those seeds.

    Mean, standard deviation and range of perplexity and nll on each text and the mean of each set,
    and, with a `reference`, the difference in nll to its row of the same seed: one value a seed,
    and their mean and standard error over seeds; of a set also the share of its increase.
    """
    rows = []
    for dense, runs in groups:
        for by_seed in _repeated(runs):
            first = next(iter(by_seed.values()))
            row: dict[str, Any] = dict(first.place.names)
            row["calibration"] = " ".join(run.place.calibration for run in by_seed.values())
            row["seeds"] = len(by_seed)
            pairs = {
                seed: (run, other)
                for seed, run in by_seed.items()
                if (other := _beside(run, runs, reference)) is not None
            }
            for text in _means(first):
                for key in ("perplexity", "nll"):
                    values = [_means(run)[text][key] for run in by_seed.values()]
                    row |= _spread(f"{text}.{key}", values)
                if pairs:
                    row |= _by_seed(text, pairs)
            for entry in filter(first.is_set, first.perplexity):
                row |= _shares_by_seed(dense, entry, pairs)
            rows.append(row)
    return rows


def _repeated(runs: Sequence[Run]) -> Iterator[dict[int, Run]]:
    """Runs by seed of each method and ratio whose calibrations differ in nothing else."""
    # By calibration, from any of its rows: a mode that reads no statistics has no record of it.
    read = {
        run.place.calibration: settings(record)
        for run in runs
        for record in run.statistics.values()
    }
    groups: dict[tuple[str, ...], dict[int, Run]] = {}
    for run in runs:
        if run.place.calibration not in read:
            continue
        rest = dict(read[run.place.calibration])
        seed = rest.pop("seed")
        key = (run.place.method, run.place.ratio, repr(sorted(rest.items())))
        groups.setdefault(key, {})[seed] = run
    for by_seed in groups.values():
        if len(by_seed) > 1:
            yield dict(sorted(by_seed.items()))


def _means(run: Run) -> dict[str, Record]:
    """Perplexity and nll of each text, and of the mean of each set."""
    sets = filter(run.is_set, run.perplexity)
    return run.texts | {f"{entry}.mean": run.perplexity[entry] for entry in sets}


def _by_seed(text: str, pairs: dict[int, tuple[Run, Run]]) -> dict[str, Any]:
    """The difference in nll to the reference's row of the same calibration, seed by seed."""
    found = {
        seed: _means(run)[text]["nll"] - _means(other)[text]["nll"]
        for seed, (run, other) in pairs.items()
    }
    row = {f"{text}.nll_delta_seed_{seed}": value for seed, value in found.items()}
    row[f"{text}.nll_delta_mean"] = fmean(found.values())
    row[f"{text}.nll_delta_stderr"] = float(pd.Series(list(found.values())).sem())
    return row


def _shares_by_seed(dense: Run, entry: str, pairs: dict[int, tuple[Run, Run]]) -> dict[str, Any]:
    """The spread of a set's shares of the reference's increase; nothing for a single seed."""
    shares = [set_shares(dense, other, run, entry) for run, other in pairs.values()]
    row: dict[str, Any] = {}
    if len(shares) > 1 and all(shares):
        for key in (f"{entry}.mean.share", f"{entry}.worst.share"):
            row |= _spread(key, [each[key] for each in shares])
    return row


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Columns: mean, standard deviation (of a sample) and range."""
    found = {"mean": fmean(values), "sd": stdev(values), "min": min(values), "max": max(values)}
    return {f"{name}_{key}": value for key, value in found.items()}
