"""The tables of surgeries: kept components, loss of quality, and the factors' parameters."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from a3.artifacts.places import SURGERY_PLACE
from a3.artifacts.protocols import HARNESS_PROTOCOL, PERPLEXITY_PROTOCOL
from a3.artifacts.runs import SurgeryRun, read_surgeries
from a3.core.records import Record
from a3.report.tables.columns import (
    Column,
    markdown_table,
    numbers,
    percent,
    signed,
    text_columns,
    words,
)
from a3.report.tables.frames import frame_of, named, read_csv, write_csv, write_text
from a3.report.tables.paired import differences
from a3.report.tables.rounding import rounded
from a3.solutions.surgeries import PROJECTIONS, SEPARATE

TITLES = ("mode", "size", "what it says")


def build_surgery_table(
    results: Path,
    surgeries: list[dict[str, str]],
    perplexity: list[str],
    harness: list[str],
    out: Path,
) -> None:
    """Write surgery.csv (full precision), surgery.md (rounded) and surgery_layers.csv into `out`.

    Differences in nll are paired over blocks: to the dense model,
    and to pca-separate with the same metric and means, of the same size. surgery_layers.csv has
    one row for each row, layer and matrix. Raises A3Error as `read_runs` does.
    """
    rows, layers = [], []
    for dense, runs in read_surgeries(results, surgeries, perplexity, harness):
        rows.append(_row(results, dense, dense, None))
        for run in runs:
            rows.append(_row(results, dense, run, beside(run, runs)))
            layers += _layers(run)
    frame = frame_of(rows)
    write_csv(out / "surgery.csv", frame)
    write_csv(out / "surgery_layers.csv", frame_of(layers))
    write_text(out / "surgery.md", markdown(frame))


def read_surgery_table(path: Path) -> pd.DataFrame:
    """surgery.csv, names as text and empty cells as NaN."""
    return read_csv(path, (*SURGERY_PLACE, "prompt", "generation"))


def beside(run: SurgeryRun, runs: Sequence[SurgeryRun]) -> SurgeryRun | None:
    """The row of separate components of the same size, metric and means; None for itself."""
    mode = run.place.mode
    sharing = next((s for s in ("shared-kv", "shared-layers") if s in mode), None)
    if sharing is None:
        return None
    other = mode.replace(sharing, SEPARATE.removeprefix("pca-"))
    same = (other, run.place.size, run.place.calibration)
    places = [(each.place.mode, each.place.size, each.place.calibration) for each in runs]
    return runs[places.index(same)] if same in places else None


def _row(
    results: Path, dense: SurgeryRun, run: SurgeryRun, other: SurgeryRun | None
) -> dict[str, Any]:
    """One row of surgery.csv; `other` is what it is compared to."""
    place = run.place
    row: dict[str, Any] = dict(place.names)
    for text, record in run.texts.items():
        row |= named(text, _perplexity(text, dense, record, other))
    for task, record in run.harness.items():
        row |= named(task, {"value": record["value"], "value_stderr": record["stderr"]})
    weights = run.weights
    if not place.is_dense:
        row["share"] = weights["share"]
        for name in PROJECTIONS:
            counts = [layer[name]["principal_components"] for layer in weights["layers"]]
            row |= {f"{name}.components_mean": fmean(counts)}
            row |= {f"{name}.components_min": min(counts), f"{name}.components_max": max(counts)}
        stored = weights["if_stored"]
        row["qkv_if_stored"] = stored["qkv"]
        row["qkv_if_stored_ratio"] = stored["qkv"] / stored["qkv_dense"]
        row["parameters_if_stored"] = stored["parameters"]
    row["parameters_in_file"] = run.size["parameters"]
    generation = Record.read(place.generation(results))
    row |= {"prompt": generation["prompt"], "generation": generation["text"]}
    for text, record in run.texts.items():
        row |= named(text, {key: record[key] for key in PERPLEXITY_PROTOCOL})
    for task, record in run.harness.items():
        row |= named(task, {key: record[key] for key in HARNESS_PROTOCOL})
    return row | {"weights_sha256": weights["weights_sha256"]}


def _perplexity(
    text: str, dense: SurgeryRun, record: Record, other: SurgeryRun | None
) -> dict[str, Any]:
    """Perplexity, and its differences in nats a token, paired over blocks."""
    losses = record["block_nll"]
    row = {
        "perplexity": record["perplexity"],
        "perplexity_stderr": record["perplexity_stderr"],
        "nll_delta": None,
        "nll_delta_stderr": None,
        "nll_to_separate": None,
        "nll_to_separate_stderr": None,
    }
    for key, base in (("nll_delta", dense), ("nll_to_separate", other)):
        if base is not None and record is not base.texts[text]:
            found = differences(base.texts[text]["block_nll"], losses)
            row |= {key: found["delta"], f"{key}_stderr": found["delta_stderr"]}
    return row


def _layers(run: SurgeryRun) -> list[dict[str, Any]]:
    """Rows of surgery_layers.csv of one run."""
    return [
        run.place.names | {"layer": number, "matrix": name, **layer[name]}
        for number, layer in enumerate(run.weights["layers"])
        for name in PROJECTIONS
    ]


# --- for reading ---
def surgery_columns(frame: pd.DataFrame) -> list[Column]:
    """The columns of surgery.csv that people compare, rounded."""
    found = [
        words("model", frame["model"].tolist()),
        words("mode", frame["mode"].tolist(), "key"),
        words("size", frame["size"].fillna("").tolist(), "short"),
        numbers(frame, "variance explained, at least", "share", percent),
    ]
    for name in PROJECTIONS:
        key = f"{name}.components_mean"
        found.append(numbers(frame, f"{name.upper()} components, mean", key, "{:.1f}".format))
    key = "qkv_if_stored_ratio"
    found.append(numbers(frame, "Q, K, V parameters if stored, of dense", key, percent))
    for key in [key for key in frame if key.endswith(".perplexity")]:
        text = key.removesuffix(".perplexity")
        delta, to = f"{text}.nll_delta", f"{text}.nll_to_separate"
        found += [
            numbers(frame, f"{text} perplexity", key, rounded, f"{key}_stderr"),
            numbers(frame, f"{text} Δ nll", delta, signed, f"{delta}_stderr"),
            numbers(frame, f"{text} Δ nll to separate", to, signed, f"{to}_stderr"),
        ]
    for key in [key for key in frame if key.endswith(".value")]:
        task = key.removesuffix(".value")
        metric = frame[f"{task}.metric"].iloc[0]
        show = partial(rounded, decimals=3)
        found.append(numbers(frame, f"{task} {metric}", key, show, f"{key}_stderr"))
    return found


def generation_columns(frame: pd.DataFrame) -> list[Column]:
    """The text that each row generates."""
    keys = ("mode", "size", "generation")
    # A cell is one line.
    cells = frame[list(keys)].fillna("").map(lambda text: " ".join(text.split()))
    rows = cells.to_numpy().tolist()
    return text_columns(TITLES, rows)


def surgery_note(frame: pd.DataFrame) -> str:
    """What surgery.csv shows, in a few sentences."""
    return (
        "W_q, W_k and W_v of every layer rebuilt from their leading principal components, in the "
        "dense shapes. Size: the share of the variance that every set of components explains, or "
        "the share of the parameters of Q, K and V that all factors and means together may take "
        "if they were stored; the files hold the dense shapes. Components of shared sets count in "
        "each of their matrices. ± is one standard error; Δ nll, in nats a token and paired over "
        "blocks, is to the dense row, and to separate components of the same size and metric. The "
        f"prompt is {frame['prompt'].iloc[0]!r}; the likeliest token follows each time."
    )


def markdown(frame: pd.DataFrame) -> str:
    """The table as GitHub Markdown."""
    paragraphs = [markdown_table(surgery_columns(frame)), surgery_note(frame)]
    return "\n\n".join([*paragraphs, markdown_table(generation_columns(frame))]) + "\n"
