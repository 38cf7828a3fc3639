"""Columns of readable tables: values of a frame, rounded, with a heading."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from a3.artifacts.places import PLACE, Place
from a3.artifacts.protocols import HARNESS_PROTOCOL, LOG, PERPLEXITY_PROTOCOL
from a3.report.tables.rounding import is_empty, plain, plus_minus, rounded
from a3.solutions.modes import NO_RATIO
from a3.solutions.target import is_target

signed = "{:+.4f}".format
percent = "{:.1%}".format


@dataclass(frozen=True)
class Column:
    """A column for people: rounded texts, and the values that they sort by (None: nothing there).

    `kind` is number, text, short (a text that is not wrapped), or key: the text that tells one row
    from the next.
    """

    title: str
    texts: Sequence[str]
    values: Sequence[Any]
    kind: str = "number"


def words(title: str, texts: Sequence[str], kind: str = "text") -> Column:
    """A column of text, which it is sorted by."""
    return Column(title, texts, texts, kind)


def numbers(
    frame: pd.DataFrame, title: str, key: str, show: Callable[[Any], str], error: str | None = None
) -> Column:
    """A column of the numbers under `key`; `error` is the key of their standard errors."""
    values = [None if is_empty(value) else float(value) for value in frame[key]]
    texts = ["–" if value is None else show(value) for value in values]
    if error:
        texts = [plus_minus(text, e) for text, e in zip(texts, frame[error], strict=True)]
    return Column(title, texts, values)


# --- the tables of results ---
def result_columns(
    frame: pd.DataFrame, perplexity: Sequence[str], harness: Sequence[str]
) -> list[Column]:
    """The columns of results.csv that people compare: of texts, of tasks, and sizes."""
    places = places_of(frame)
    found = _names_of_rows(places)
    deltas = [key for key in frame if key.endswith(("_delta", "_delta_stderr"))]
    frame = frame.copy()
    frame.loc[[place.is_dense for place in places], deltas] = float("nan")
    for entry in perplexity:
        found += _set_columns(frame, entry) if is_set(frame, entry) else _text_columns(frame, entry)
    for task in harness:
        metric, key = frame[f"{task}.metric"].iloc[0], f"{task}.value"
        three = partial(rounded, decimals=3)
        found += [
            numbers(frame, f"{task} {metric}", key, three, f"{key}_stderr"),
            numbers(frame, f"{task} Δ {metric}", f"{key}_delta", partial(three, sign="+")),
        ]
    found += fit_columns(frame)
    found += [
        numbers(frame, "parameters", "parameters", lambda value: f"{value / 1e6:,.1f} M"),
        numbers(frame, "parameters kept", "parameters_ratio", percent),
        numbers(frame, "KV cache kept", "kv_bytes_per_token_ratio", percent),
        numbers(frame, "FLOPs kept", "flops_per_token_ratio", percent),
    ]
    if "bits_per_weight" in frame:
        title = "bits a weight of the dense matrices"
        found.append(numbers(frame, title, "bits_per_weight", rounded))
    if "trained_tokens" in frame:
        found.append(numbers(frame, "trained on tokens", "trained_tokens", "{:,.0f}".format))
    return [*found, numbers(frame, "calibration tokens", "calibration_tokens", "{:,.0f}".format)]


def fit_columns(frame: pd.DataFrame) -> list[Column]:
    """The loss over the dense model's: predicted, on the calibration and on a dev text.

    The last is marked where the model is overfitted. Columns without any value are left out.
    """
    found = []
    titles = {
        "predicted": "predicted Δ nll",
        "calibration": "calibration Δ nll",
        "dev": "dev Δ nll",
    }
    for name, title in titles.items():
        key, error = f"fit.{name}", f"fit.{name}_stderr"
        if key in frame and frame[key].notna().any():
            found.append(numbers(frame, title, key, signed, error if error in frame else None))
    if found and titles["dev"] == found[-1].title:
        marks = [" !" if mark is True else "" for mark in frame["fit.overfitted"]]
        texts = [text + mark for text, mark in zip(found[-1].texts, marks, strict=True)]
        found[-1] = replace(found[-1], texts=texts)
    return found


def _text_columns(frame: pd.DataFrame, text: str) -> list[Column]:
    """The columns of one text."""
    return [
        *_perplexity_columns(frame, text, text),
        numbers(frame, f"{text} bits/byte", f"{text}.bits_per_byte", "{:.4f}".format),
    ]


def _set_columns(frame: pd.DataFrame, entry: str) -> list[Column]:
    """The columns of a set of texts: the mean over them, and the one that loses most."""
    return [
        *_perplexity_columns(frame, f"{entry} mean", f"{entry}.mean"),
        worst_column(frame, f"{entry} worst Δ nll", entry, "nll_delta", signed),
    ]


def _perplexity_columns(frame: pd.DataFrame, title: str, name: str) -> list[Column]:
    """Perplexity and its distance to the dense model's, of a text or of the mean of a set."""
    key, nll = f"{name}.perplexity", f"{name}.nll_delta"
    return [
        numbers(frame, f"{title} perplexity", key, rounded, f"{key}_stderr"),
        numbers(frame, f"{title} Δ perplexity", f"{key}_delta", partial(rounded, sign="+")),
        numbers(frame, f"{title} Δ nll", nll, signed, f"{nll}_stderr"),
    ]


def worst_column(
    frame: pd.DataFrame, title: str, entry: str, key: str, show: Callable[[Any], str]
) -> Column:
    """The worst text of a set and its figure, by which the column is sorted."""
    column = numbers(frame, title, f"{entry}.worst.{key}", show)
    named = zip(frame[f"{entry}.worst.text"], column.texts, strict=True)
    texts = [text if text == "–" else f"{worst} {text}" for worst, text in named]
    return Column(title, texts, column.values)


def is_set(frame: pd.DataFrame, entry: str) -> bool:
    """Whether a perplexity entry is a set of texts; of results.csv or comparisons.csv."""
    return f"{entry}.mean.nll_delta" in frame


def texts_in(frame: pd.DataFrame, entry: str) -> list[str]:
    """The names of an entry's texts in results.csv: its own, or of each text of a set."""
    key = ".token_ids_sha256"
    if not is_set(frame, entry):
        return [entry]
    found = [column.removesuffix(key) for column in frame if column.endswith(key)]
    return [text for text in found if text.startswith(f"{entry}.")]


def by_text_columns(frame: pd.DataFrame, entry: str) -> list[Column]:
    """Perplexity on each text of a set, of results.csv."""
    found = _names_of_rows(places_of(frame))
    for text in texts_in(frame, entry):
        key, title = f"{text}.perplexity", text.removeprefix(f"{entry}.")
        found.append(numbers(frame, title, key, rounded, f"{key}_stderr"))
    key = f"{entry}.mean.perplexity"
    return [*found, numbers(frame, "mean", key, rounded, f"{key}_stderr")]


def share_columns(frame: pd.DataFrame, entry: str) -> list[Column]:
    """The share of the reference's increase on each text of a set, of comparisons.csv."""
    found = _names_of_rows(places_of(frame))
    mean, worst = f"{entry}.mean.share", f"{entry}.worst.share"
    keys = [key for key in frame if key.startswith(f"{entry}.") and key.endswith(".share")]
    for key in [*(key for key in keys if key not in (mean, worst)), mean]:
        title = key.removeprefix(f"{entry}.").removesuffix(".share")
        found.append(numbers(frame, title, key, "{:.2f}".format, f"{key}_stderr"))
    return found


def seconds_columns(frame: pd.DataFrame) -> list[Column]:
    """The columns of timings.csv, rounded."""
    units = {"seconds": "s", "tokens_per_second": "tokens/s"}
    found = _names_of_rows(places_of(frame))
    for key in frame.columns.drop(list(PLACE)):
        what, _, unit = key.rpartition(".")
        found.append(numbers(frame, f"{what} ({units[unit]})", key, "{:,.1f}".format))
    return found


def comparison_columns(frame: pd.DataFrame) -> list[Column]:
    """The columns of comparisons.csv, rounded: differences to the reference, and verdicts."""
    found = _names_of_rows(places_of(frame))
    show = partial(rounded, decimals=4, sign="+")
    keys = [key for key in frame if key.endswith("_delta")]
    sets = [key.removesuffix(".mean.nll_delta") for key in keys if key.endswith(".mean.nll_delta")]
    for key in keys:
        name, _, measure = key.removesuffix("_delta").rpartition(".")
        # Of a set the mean; each text has a table of its own in the report.
        entry = next((one for one in sets if name.startswith(f"{one}.")), None)
        if entry is not None and name != f"{entry}.mean":
            continue
        title = name if entry is None else f"{entry} mean"
        found.append(numbers(frame, f"{title} Δ {measure}", key, show, f"{key}_stderr"))
        said = frame[f"{name}.{measure}_verdict"]
        texts = ["–" if is_empty(one) else one for one in said]
        found.append(words(f"{title} verdict", texts, "short"))
        if entry is not None and f"{name}.share" in frame:
            title, share = f"{entry} share of increase, mean", f"{name}.share"
            found.append(numbers(frame, title, share, "{:.3f}".format, f"{share}_stderr"))
            title = f"{entry} share of increase, worst"
            found.append(worst_column(frame, title, entry, "share", "{:.3f}".format))
    return [*found, numbers(frame, "parameters, of the reference's", "parameters_ratio", percent)]


def seed_columns(frame: pd.DataFrame, perplexity: Sequence[str]) -> list[Column]:
    """The columns of seeds.csv, rounded: mean, spread and range over seeds."""
    found = [*_names_of_rows(places_of(frame)), numbers(frame, "seeds", "seeds", "{:.0f}".format)]
    for entry in perplexity:
        a_set = f"{entry}.mean.nll_mean" in frame
        text, shown = (f"{entry}.mean", f"{entry} mean") if a_set else (entry, entry)
        for measure, show in (("perplexity", rounded), ("nll", "{:.4f}".format)):
            key = f"{text}.{measure}"
            title = f"{shown} {measure}, mean ± sd"
            found.append(numbers(frame, title, f"{key}_mean", show, f"{key}_sd"))
            ends = zip(frame[f"{key}_min"], frame[f"{key}_max"], strict=True)
            texts = [f"{show(low)} – {show(high)}" for low, high in ends]
            found.append(words(f"{shown} {measure}, range", texts, "short"))
        key = f"{text}.nll_delta_"
        if f"{key}mean" in frame:
            title = f"{shown} Δ nll to reference, mean"
            found.append(numbers(frame, title, f"{key}mean", signed, f"{key}stderr"))
        for other in [other for other in frame if other.startswith(f"{key}seed_")]:
            seed = other.removeprefix(f"{key}seed_")
            found.append(numbers(frame, f"{shown} Δ nll, seed {seed}", other, signed))
        for which in ("mean", "worst"):
            key = f"{entry}.{which}.share"
            if f"{key}_mean" in frame:
                title = f"{entry} share of increase, {which}, mean ± sd"
                found.append(numbers(frame, title, f"{key}_mean", "{:.3f}".format, f"{key}_sd"))
    return found


def protocol_columns(
    frame: pd.DataFrame, perplexity: Sequence[str], harness: Sequence[str]
) -> list[Column]:
    """How each model was measured on each text and task, one row each."""
    measured: list[tuple[str, tuple[str, ...]]] = []
    texts = [text for entry in perplexity for text in texts_in(frame, entry)]
    measured += [(text, PERPLEXITY_PROTOCOL) for text in texts]
    measured += [(task, HARNESS_PROTOCOL) for task in harness]
    rows = []
    for model, group in frame.groupby("model", sort=False):
        for name, keys in measured:
            first = {key: group[f"{name}.{key}"].iloc[0] for key in keys}
            said = [f"{k} {_digest(k, value)}" for k, value in first.items() if not is_empty(value)]
            rows.append((model, name, ", ".join(said)))
    return text_columns(("model", "measured on", "protocol"), rows)


def comparison_note(frame: pd.DataFrame) -> str:
    """What comparisons.csv compares, in a few sentences."""
    said = (
        f"Each row against {frame['reference'].iloc[0]} of the same model, calibration and ratio: "
        "Δ is the row's value less the reference's, over the same blocks or items, ± the standard "
        "error of that paired difference. A row is better or worse where Δ exceeds two standard "
        "errors; of twenty rows that do not differ, about one does so by chance."
    )
    if any(key.endswith(".mean.share") for key in frame):
        said += (
            " Share of increase: what a row adds to the dense model's perplexity, divided by what "
            "the reference adds; the mean over texts, and the text with the largest share."
        )
    if any(f".{LOG}" in key for key in frame):
        said += " Of a task's perplexity Δ is of its logarithm, in nats."
    if any(frame[key].isna().all() for key in frame if key.endswith("_delta_stderr")):
        said += " A Δ without ± has no known error, and no verdict."
    return said


def seed_note(frame: pd.DataFrame) -> str:
    """What seeds.csv shows, in a few sentences."""
    said = "The same rows with calibrations that differ in their seed only; sd is over seeds."
    if any(key.endswith("nll_delta_mean") for key in frame):
        said += " Δ nll is to the reference of the same seed; ± its standard error over seeds."
    return said


def places_of(frame: pd.DataFrame) -> list[Place]:
    """The row of results that each row of a frame is."""
    return [Place(**row) for row in frame[list(PLACE)].to_dict("records")]


def spaced(place: Place) -> str:
    """The method with spaces, which let it wrap."""
    return place.method.replace("+", " + ")


def _names_of_rows(places: Sequence[Place]) -> list[Column]:
    """Model, method and ratio, and the calibration where there are several."""
    # Targets are shown as they are, and sorted as if they had no ratio.
    words_of = {p.ratio: p.ratio for p in places if is_target(p.ratio)} | {NO_RATIO: "–"}
    ratios = [None if place.ratio in words_of else float(place.ratio) for place in places]
    shown = [words_of.get(place.ratio) or f"{float(place.ratio):g}" for place in places]
    found = [
        words("model", [place.model for place in places]),
        words("method (QK + OV + MLP)", [spaced(place) for place in places], "key"),
        Column("ratio", shown, ratios),
    ]
    if len({place.calibration for place in places if not place.is_dense}) > 1:
        found.insert(2, words("calibration", [place.calibration for place in places]))
    return found


def _digest(key: str, value: Any) -> str:
    """The first digits of a hash; other values as they are."""
    return str(value)[:12] if key.endswith(("sha256", "hash")) else str(value)


# --- any table ---
def free_columns(frame: pd.DataFrame) -> list[Column]:
    """The columns of a frame as they are, under their names."""
    found: list[Column] = []
    for name in frame:
        if pd.api.types.is_numeric_dtype(frame[name]):
            found.append(numbers(frame, name, name, plain))
        else:
            kind = "text" if any(column.kind == "key" for column in found) else "key"
            found.append(words(name, frame[name].fillna("").astype(str).tolist(), kind))
    return found


def text_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Column]:
    """Columns of plain text from rows; the first is the key."""
    kinds = ("key", *("text" for _ in titles[1:]))
    texts = [[row[i] for row in rows] for i in range(len(titles))]
    return [words(*cells) for cells in zip(titles, texts, kinds, strict=True)]


def markdown_table(found: Sequence[Column]) -> str:
    """Columns as GitHub Markdown."""
    # A text and a task may have one name, and a title.
    rows = zip(*([_escape(text) for text in column.texts] for column in found), strict=True)
    frame = pd.DataFrame(list(rows), columns=[column.title for column in found])
    align = ["right" if column.kind == "number" else "left" for column in found]
    return str(
        frame.to_markdown(index=False, tablefmt="github", disable_numparse=True, colalign=align)
    )


def _escape(text: str) -> str:
    """Keep a name from ending its cell or turning into HTML."""
    return " ".join(text.splitlines()).replace("|", "\\|").replace("<", "&lt;")
