"""The reproducible part of lm-eval's results: scores, their errors, and values of items."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.metrics import (
    bits_per_byte,
    brier_score,
    mean,
    nanmean,
    perplexity,
    weighted_perplexity,
)
from lm_eval.utils import hash_string

from a3.artifacts.protocols import LOG
from a3.core.errors import A3Error

# A metric's aggregation over a task's items.
Aggregate = Callable[[Sequence[Any]], float]

# Aggregates whose logarithm is the mean of the items' values.
LOGARITHMIC = (perplexity, weighted_perplexity)


def scores(
    task: str,
    found: dict[str, Any],
    aggregates: Mapping[str, Mapping[str, Aggregate]],
    metric: str | None = None,
) -> dict[str, Any]:
    """The reproducible part of lm-eval's results, without dates, machine and timings.

    A score that lm-eval has no number for ("N/A", NaN) is None, as is its standard error. Of a
    group, `value` and `stderr` are lm-eval's aggregate over its tasks, and items are theirs, task
    after task. `item_scores` are one value an item, in the documents' order, whose mean is what
    `item_measure` says: the metric, or its logarithm where the metric is a perplexity; None if
    the metric is no mean over items (bleu, f1, mcc, a median). `aggregates` are the tasks'
    aggregations by metric. Raises A3Error if the task has no such metric.
    """
    # lm-eval calls a score "metric,filter"; the first is the task's main one.
    results, samples = found["results"][task], found["samples"]
    said = {key.removesuffix(",none"): v for key, v in results.items() if "," in key}
    metrics = {key: number(value) for key, value in said.items()}
    known = [key for key in metrics if "_stderr" not in key]
    if not known:
        raise A3Error(f"harness task {task}: it has no score. Name one of its tasks.")
    if metric not in (None, *known):
        raise A3Error(f"harness task {task}: metric is {metric}, expected {' or '.join(known)}.")
    main = metric or known[0]
    name = main.partition(",")[0]
    shots = sorted({found["n-shot"][leaf] for leaf in samples})
    measure, values = items_of(main, metrics[main], samples, aggregates)
    return {
        "task": task,
        "metric": main,
        "value": metrics[main],
        "stderr": metrics.get(f"{name}_stderr{main.removeprefix(name)}"),
        "higher_is_better": found["higher_is_better"].get(task, {}).get(name),
        "metrics": metrics,
        "items": sum(found["n-samples"][leaf]["effective"] for leaf in samples),
        "item_measure": measure,
        "item_scores": values,
        "shots": shots[0] if len(shots) == 1 else shots,
        "version": found["versions"].get(task),
        "task_hash": task_hash([each for leaf in sorted(samples) for each in samples[leaf]]),
        "prompts_sha256": prompts_hash(samples),
        "lm_eval": lm_eval.__version__,
    }


def number(value: Any) -> float | None:
    """A finite number as it is; None for anything else."""
    found = isinstance(value, (Real, np.bool_)) and math.isfinite(value)
    return float(value) if found else None


def items_of(
    main: str,
    value: float | None,
    samples: Mapping[str, list[dict[str, Any]]],
    aggregates: Mapping[str, Mapping[str, Aggregate]],
) -> tuple[str | None, list[float | None] | None]:
    """What the items' values of a score are, and the values; None and None if there are none."""
    name, _, kind = main.partition(",")
    used = {aggregates[leaf].get(name, mean) for leaf in samples}
    values: list[float | None] = []
    for leaf in sorted(samples):
        chosen = [each for each in samples[leaf] if each["filter"] == (kind or "none")]
        raw = [each.get(name) for each in sorted(chosen, key=lambda each: each["doc_id"])]
        values += item_values(raw, aggregates[leaf].get(name, mean))
    logarithmic = used <= set(LOGARITHMIC)
    there = [each for each in values if each is not None]
    if value is None or not there or (logarithmic and value <= 0):
        return None, None
    # Of a group of tasks of unequal sizes, say, the aggregate may be another mean.
    expected = math.log(value) if logarithmic else value
    if not math.isclose(sum(there) / len(there), expected, rel_tol=1e-6, abs_tol=1e-9):
        return None, None
    return (LOG if logarithmic else "") + main, values


def item_values(raw: Sequence[Any], aggregate: Aggregate) -> list[float | None]:
    """A value for each item of a task, so that their mean is its aggregate, or the logarithm of it.

    An item of a rolling log-likelihood is (log-likelihood, words or bytes); its value is weighted
    by the latter. Empty for an aggregate that is no such mean.
    """
    if aggregate in (mean, nanmean):
        return [number(each) for each in raw]
    if aggregate is brier_score:
        return [float(brier_score([each])) for each in raw]
    if aggregate is perplexity:
        return [-float(each) for each in raw]
    if aggregate in (weighted_perplexity, bits_per_byte):
        unit = 1.0 if aggregate is weighted_perplexity else math.log(2)
        share = len(raw) / sum(weight for _, weight in raw) / unit
        return [-float(likelihood) * share for likelihood, _ in raw]
    return []


def task_hash(samples: list[dict[str, Any]]) -> str:
    """What lm-eval's own tracker calls the task's hash: of every document, prompt and target."""
    keys = ("doc_hash", "prompt_hash", "target_hash")
    return hash_string("".join(sample[key] for sample in samples for key in keys))


def prompts_hash(samples: Mapping[str, list[dict[str, Any]]]) -> str:
    """Hash of everything that the model was asked: prompts, answers, generation options."""
    asked = {
        leaf: [each["arguments"] for each in sorted(found, key=lambda each: each["doc_id"])]
        for leaf, found in samples.items()
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
