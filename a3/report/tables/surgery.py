"""The tables of surgeries: what is kept, what it costs the model, and the factors' parameters."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from a3.artifacts.places import SurgeryPlace
from a3.artifacts.protocols import HARNESS_PROTOCOL, PERPLEXITY_PROTOCOL
from a3.artifacts.runs import PLACE, Run, read_surgeries
from a3.core.files import whole_file
from a3.core.records import Record
from a3.report.tables.columns import Column, markdown_table, numbers, score, short, text_columns
from a3.report.tables.compare import differences
from a3.report.tables.frames import named
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
    out.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows, dtype=object)
    for name, found in (("surgery", frame), ("surgery_layers", pd.DataFrame(layers, dtype=object))):
        with whole_file(out / f"{name}.csv") as temporary:
            found.to_csv(temporary, index=False, lineterminator="\n")
    with whole_file(out / "surgery.md") as temporary:
        temporary.write_text(markdown(read_surgery_table(out / "surgery.csv")), encoding="utf-8")


def read_surgery_table(path: Path) -> pd.DataFrame:
    """surgery.csv, names as text and empty cells as NaN."""
    texts = dict.fromkeys((*PLACE, "prompt", "generation"), str)
    return pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""])


def beside(run: Run, runs: Sequence[Run]) -> Run | None:
    """The row of separate components of the same size, metric and means; None for itself."""
    mode = run.place.mode
    sharing = next((s for s in ("shared-kv", "shared-layers") if s in mode), None)
    if sharing is None:
        return None
    other = mode.replace(sharing, SEPARATE.removeprefix("pca-"))
    same = (other, run.place.size, run.place.calibration)
    places = [(each.place.mode, each.place.size, each.place.calibration) for each in runs]
    return runs[places.index(same)] if same in places else None


def _row(results: Path, dense: Run, run: Run, other: Run | None) -> dict[str, Any]:
    """One row of surgery.csv; `other` is what it is compared to."""
    place = run.place if isinstance(run.place, SurgeryPlace) else SurgeryPlace(run.place.model)
    row: dict[str, Any] = {key: getattr(place, key) for key in PLACE}
    for text, record in run.perplexity.items():
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
    for text, record in run.perplexity.items():
        row |= named(text, {key: record[key] for key in PERPLEXITY_PROTOCOL})
    for task, record in run.harness.items():
        row |= named(task, {key: record[key] for key in HARNESS_PROTOCOL})
    return row | {"weights_sha256": weights["weights_sha256"]}


def _perplexity(text: str, dense: Run, record: Record, other: Run | None) -> dict[str, Any]:
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
        if base is not None and record is not base.perplexity[text]:
            found = differences(base.perplexity[text]["block_nll"], losses)
            row |= {key: found["delta"], f"{key}_stderr": found["delta_stderr"]}
    return row


def _layers(run: Run) -> list[dict[str, Any]]:
    """Rows of surgery_layers.csv of one run."""
    place = {key: getattr(run.place, key) for key in PLACE}
    return [
        place | {"layer": number, "matrix": name, **layer[name]}
        for number, layer in enumerate(run.weights["layers"])
        for name in PROJECTIONS
    ]


# --- for reading ---
def surgery_columns(frame: pd.DataFrame) -> list[Column]:
    """The columns of surgery.csv that people compare, rounded."""
    models, modes, sizes = (frame[key].fillna("").tolist() for key in ("model", "mode", "size"))
    found = [Column("model", models, models, "text"), Column("mode", modes, modes, "key")]
    found.append(Column("size", sizes, sizes, "short"))
    found.append(numbers(frame, "variance explained, at least", "share", "{:.1%}".format))
    for name in PROJECTIONS:
        key = f"{name}.components_mean"
        found.append(numbers(frame, f"{name.upper()} components, mean", key, "{:.1f}".format))
    key = "qkv_if_stored_ratio"
    found.append(numbers(frame, "Q, K, V parameters if stored, of dense", key, "{:.1%}".format))
    for key in [key for key in frame if key.endswith(".perplexity")]:
        text = key.removesuffix(".perplexity")
        signed = "{:+.4f}".format
        delta, to = f"{text}.nll_delta", f"{text}.nll_to_separate"
        found += [
            numbers(frame, f"{text} perplexity", key, short, "_stderr"),
            numbers(frame, f"{text} Δ nll", delta, signed, "_stderr"),
            numbers(frame, f"{text} Δ nll to separate", to, signed, "_stderr"),
        ]
    for key in [key for key in frame if key.endswith(".value")]:
        task = key.removesuffix(".value")
        metric = frame[f"{task}.metric"].iloc[0]
        found.append(numbers(frame, f"{task} {metric}", key, score, "_stderr"))
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
