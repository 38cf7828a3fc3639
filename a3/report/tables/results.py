"""Result tables: each compressed result with its dense result and their protocol."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from a3.artifacts.protocols import HARNESS_PROTOCOL, PERPLEXITY_PROTOCOL
from a3.artifacts.runs import Groups, Run, read_runs
from a3.core.errors import A3Error
from a3.core.records import Record, timing
from a3.experiments.rows import check_reference
from a3.report.tables.columns import (
    comparison_columns,
    comparison_note,
    markdown_table,
    protocol_columns,
    result_columns,
    seed_columns,
    seed_note,
)
from a3.report.tables.compare import comparisons, seeds
from a3.report.tables.fit import fit_note, fit_values
from a3.report.tables.frames import frame_of, named, write_csv, write_text
from a3.report.tables.paired import differences
from a3.report.tables.sets import set_results
from a3.rxx.kinds import KINDS, SAMPLED_FORMS
from a3.solutions.modes import COMPONENTS, DENSE

SIZES = ("parameters", "kv_bytes_per_token", "flops_per_token")


def build_tables(
    results: Path,
    experiments: list[dict[str, str]],
    perplexity: list[str],
    harness: list[str],
    out: Path,
    reference: str | None = None,
    fit: bool = False,
) -> None:
    """Write the tables, as .csv in full precision, and results.md (rounded) into `out`.

    results.csv has what was measured; comparisons.csv every row against the `reference`;
    seeds.csv the rows that stand there with several calibration seeds; timings.csv what it took.

    Args:
        results: the folder that all runs write to.
        experiments: rows as {"model", "calibration", "qk", "ov", "mlp", "ratio"}; each model's
            dense row is added and stands first.
        perplexity: names of the texts.
        harness: names of the tasks.
        out: the folder of this table.
        reference: the method that the others are compared to, such as rxx-w-rxx+xkv+rxx-w.
        fit: whether to show the loss on calibration and dev text.

    Raises:
        A3Error: a file is missing, was taken from other weights, or mixes protocols; no row has
            the reference's method.
    """
    check_reference(experiments, reference)
    groups = read_runs(results, experiments, perplexity, harness, fit)
    frames = frames_of(results, groups, reference)
    for name, frame in frames.items():
        write_csv(out / f"{name}.csv", frame)
    write_text(out / "results.md", markdown(frames, perplexity, harness))


def frames_of(results: Path, groups: Groups, reference: str | None) -> dict[str, pd.DataFrame]:
    """The tables of all runs in full precision: results, comparisons, seeds and timings."""
    pairs = [(dense, run) for dense, runs in groups for run in (dense, *runs)]
    rows = [_row(dense, run) for dense, run in pairs]
    if any(run.place.is_quantised for _, run in pairs):
        for row, (dense, run) in zip(rows, pairs, strict=True):
            row["bits_per_weight"] = run.bits_per_weight(dense)
    if any(run.place.is_healed for _, run in pairs):
        for row, (_, run) in zip(rows, pairs, strict=True):
            row["trained_tokens"] = run.weights["healed.tokens"] if run.place.is_healed else None
    return {
        "results": frame_of(rows),
        "comparisons": frame_of(comparisons(groups, reference)),
        "seeds": frame_of(seeds(groups, reference)),
        "timings": frame_of([_seconds(results, run) for _, run in pairs]),
    }


# --- rows ---
def _row(dense: Run, run: Run) -> dict[str, Any]:
    """One row of results.csv: what was measured, then sizes, then the protocol."""
    row: dict[str, Any] = dict(run.place.names)
    for text, record in run.texts.items():
        row |= named(text, _perplexity(dense.texts[text], record))
    for entry in filter(run.is_set, run.perplexity):
        row |= set_results(dense, run, entry)
    for task, record in run.harness.items():
        row |= named(task, _harness(dense.harness[task], record))
    row |= fit_values(run.fit)
    for key in SIZES:
        row[key] = run.size[key]
        row[f"{key}_ratio"] = run.size[key] / dense.size[key]
    row["calibration_tokens"] = _calibration_tokens(run)
    for text, record in run.texts.items():
        row |= named(text, {key: record[key] for key in PERPLEXITY_PROTOCOL})
    for task, record in run.harness.items():
        row |= named(task, {key: record[key] for key in HARNESS_PROTOCOL})
    row["weights_sha256"] = run.weights["weights_sha256"]
    return row


def _calibration_tokens(run: Run) -> int | None:
    """Tokens that the statistics were summed over; None if the modes read none.

    Gradients by activations are of a share of the blocks, and no mode reads them alone.
    """
    tokens = {
        kind: record["tokens"]
        for kind, record in run.statistics.items()
        if KINDS[kind].form not in SAMPLED_FORMS
    }
    if len(set(tokens.values())) > 1:
        raise A3Error(
            f"{run.weights.path}: its statistics were summed over different numbers of tokens "
            f"({tokens}), expected one. Collect them again, then build the checkpoint again."
        )
    return next(iter(tokens.values()), None)


def _perplexity(dense: Record, record: Record) -> dict[str, Any]:
    """Perplexity and its distance to the dense model's.

    The blocks are the same in both runs, so the error of the mean difference of negative log
    likelihood (nats a token) is that of the blocks' differences: far less than the two runs' own.
    """
    paired = differences(dense["block_nll"], record["block_nll"])
    return {
        "perplexity": record["perplexity"],
        "perplexity_stderr": record["perplexity_stderr"],
        "bits_per_byte": record["bits_per_byte"],
        "perplexity_delta": record["perplexity"] - dense["perplexity"],
        "nll_delta": record["nll"] - dense["nll"],
        "nll_delta_stderr": paired["delta_stderr"],
    }


def _harness(dense: Record, record: Record) -> dict[str, Any]:
    """A task's value, its standard error, and its distance to the dense model's.

    None if lm-eval has no such number.
    """
    values = (record["value"], dense["value"])
    return {
        "value": record["value"],
        "value_stderr": record["stderr"],
        "value_delta": None if None in values else record["value"] - dense["value"],
    }


def _seconds(results: Path, run: Run) -> dict[str, Any]:
    """One row of timings.csv. Rows of one calibration share its Rxx, hence the seconds of it."""
    place = run.place
    row: dict[str, Any] = dict(place.names)
    if not place.is_dense:
        for kind in run.statistics:
            row |= named(f"rxx {kind}", _speed(timing(place.rxx(results, kind))))
        spent = Record.read(timing(run.weights.path))
        if losses := place.losses(results):
            row["losses.seconds"] = _all_shards(losses)
        if allocation := place.allocation(results):
            row["allocate.seconds"] = Record.read(timing(allocation))["seconds"]
        stage = "quantise" if place.is_quantised else "heal" if place.is_healed else "approx"
        row[f"{stage}.seconds"] = spent["seconds"]
        for component in COMPONENTS:
            if getattr(place, component) != DENSE and stage == "approx":
                row[f"approx {component}.seconds"] = sum(
                    layer[component] for layer in spent["layers"]
                )
    for text, record in run.perplexity.items():
        row |= named(f"perplexity {text}", _speed(timing(record.path)))
    for task, record in run.harness.items():
        row |= named(f"harness {task}", _speed(timing(record.path)))
    if run.fit is not None:
        row |= named("fit", _speed(timing(run.fit.path)))
    return row


def _all_shards(folder: Path) -> float:
    """Seconds of all shards in a folder; if it holds several divisions, of the finest."""
    found = {path.name.partition(".")[0]: path for path in folder.glob("*.timing.json")}
    count = max((int(number.partition("of")[2]) for number in found), default=0)
    own = [path for number, path in found.items() if number.endswith(f"of{count}")]
    return sum(Record.read(path)["seconds"] for path in own)


def _speed(path: Path) -> dict[str, float]:
    """Seconds, and tokens per second where the stage counts tokens."""
    spent = Record.read(path)
    speed = {"seconds": spent["seconds"]}
    if "tokens_per_second" in spent.data:
        speed["tokens_per_second"] = spent["tokens_per_second"]
    return speed


def markdown(
    frames: Mapping[str, pd.DataFrame], perplexity: Sequence[str], harness: Sequence[str]
) -> str:
    """The tables and their protocol as GitHub Markdown."""
    frame, compared, repeated = (frames[name] for name in ("results", "comparisons", "seeds"))
    said = [
        markdown_table(result_columns(frame, perplexity, harness)),
        "± is one standard error; Δ is the distance to the dense row; Δ nll is in nats a token, "
        "with the error of the paired difference over blocks. Kept shares are of the dense "
        "model's.",
        *fit_note(frame),
    ]
    if len(compared):
        table = markdown_table(comparison_columns(compared))
        said += ["## Comparisons", table, comparison_note(compared)]
    if len(repeated):
        table = markdown_table(seed_columns(repeated, perplexity))
        said += ["## Seeds", table, seed_note(repeated)]
    table = markdown_table(protocol_columns(frame, perplexity, harness))
    return "\n\n".join([*said, table]) + "\n"
