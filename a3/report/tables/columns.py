"""Columns of the result table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from a3.artifacts.places import LOG, PLACE, Place
from a3.artifacts.protocols import HARNESS_PROTOCOL, PERPLEXITY_PROTOCOL
from a3.solutions.modes import NO_RATIO


# --- for reading ---
@dataclass(frozen=True)
class Column:
    """A column for people: rounded texts, and the values that they sort by (None: nothing there).

    `kind` is number, text, short (a text that is not wrapped), or key: the text that tells one row
    from the next.
    """

    title: str
    texts: list[str]
    values: list[Any]
    kind: str = "number"


def names(frame: pd.DataFrame, measure: str) -> list[str]:
    """Texts (`measure` "perplexity") or tasks ("value") that have columns in results.csv."""
    return [key.removesuffix(f".{measure}") for key in frame if key.endswith(f".{measure}")]


def columns(frame: pd.DataFrame) -> list[Column]:
    """The columns of results.csv that people compare, rounded."""
    found = _names_of_rows(frame)
    deltas = [key for key in frame if key.endswith(("_delta", "_delta_stderr"))]
    frame = frame.copy()
    frame.loc[[place.is_dense for place in _places(frame)], deltas] = float("nan")
    for text in names(frame, "perplexity"):
        found += [
            numbers(frame, f"{text} perplexity", f"{text}.perplexity", short, "_stderr"),
            numbers(frame, f"{text} Δ perplexity", f"{text}.perplexity_delta", _signed),
            numbers(frame, f"{text} Δ nll", f"{text}.nll_delta", "{:+.4f}".format, "_stderr"),
            numbers(frame, f"{text} bits/byte", f"{text}.bits_per_byte", "{:.4f}".format),
        ]
    for task in names(frame, "value"):
        metric = frame[f"{task}.metric"].iloc[0]
        found += [
            numbers(frame, f"{task} {metric}", f"{task}.value", score, "_stderr"),
            numbers(frame, f"{task} Δ {metric}", f"{task}.value_delta", partial(score, sign="+")),
        ]
    return [
        *found,
        numbers(frame, "parameters", "parameters", lambda value: f"{value / 1e6:,.1f} M"),
        numbers(frame, "parameters kept", "parameters_ratio", "{:.1%}".format),
        numbers(frame, "KV cache kept", "kv_bytes_per_token_ratio", "{:.1%}".format),
        numbers(frame, "FLOPs kept", "flops_per_token_ratio", "{:.1%}".format),
        *_bits(frame),
        numbers(frame, "calibration tokens", "calibration_tokens", "{:,.0f}".format),
    ]


def _bits(frame: pd.DataFrame) -> list[Column]:
    """The column of bits, where some row is quantised."""
    if "bits_per_weight" not in frame:
        return []
    return [numbers(frame, "bits a weight of the dense matrices", "bits_per_weight", short)]


def seconds_columns(frame: pd.DataFrame) -> list[Column]:
    """The columns of timings.csv, rounded."""
    units = {"seconds": "s", "tokens_per_second": "tokens/s"}
    found = _names_of_rows(frame)
    for key in frame.columns.drop(list(PLACE)):
        what, _, unit = key.rpartition(".")
        found.append(numbers(frame, f"{what} ({units[unit]})", key, "{:,.1f}".format))
    return found


def comparison_columns(frame: pd.DataFrame) -> list[Column]:
    """The columns of comparisons.csv, rounded: differences to the reference, and verdicts."""
    found = _names_of_rows(frame)
    for key in [key for key in frame if key.endswith("_delta")]:
        name, _, measure = key.removesuffix("_delta").rpartition(".")
        show = partial(score, decimals=4, sign="+")
        found.append(numbers(frame, f"{name} Δ {measure}", key, show, "_stderr"))
        said = frame[f"{name}.{measure}_verdict"].astype(object).fillna("–").tolist()
        found.append(Column(f"{name} verdict", said, said, "short"))
    kept = numbers(frame, "parameters, of the reference's", "parameters_ratio", "{:.1%}".format)
    return [*found, kept]


def seed_columns(frame: pd.DataFrame) -> list[Column]:
    """The columns of seeds.csv, rounded: mean, spread and range over seeds."""
    found = [*_names_of_rows(frame), numbers(frame, "seeds", "seeds", "{:.0f}".format)]
    for text in names(frame, "perplexity_mean"):
        for measure, show in (("perplexity", short), ("nll", "{:.4f}".format)):
            key = f"{text}.{measure}"
            mean = numbers(frame, f"{text} {measure}, mean ± sd", f"{key}_mean", show)
            mean.texts[:] = map(_plus_minus, mean.texts, frame[f"{key}_sd"])
            ends = zip(frame[f"{key}_min"], frame[f"{key}_max"], strict=True)
            range_ = [f"{show(low)} – {show(high)}" for low, high in ends]
            found += [mean, Column(f"{text} {measure}, range", range_, range_, "short")]
        if f"{text}.nll_delta_mean" in frame:
            found += _deltas_by_seed(frame, text)
    return found


def _deltas_by_seed(frame: pd.DataFrame, text: str) -> list[Column]:
    """Differences to the reference: their mean with its error over seeds, and seed by seed."""
    signed = "{:+.4f}".format
    key = f"{text}.nll_delta_"
    mean = numbers(frame, f"{text} Δ nll to reference, mean", f"{key}mean", signed)
    mean.texts[:] = map(_plus_minus, mean.texts, frame[f"{key}stderr"])
    each = [
        numbers(frame, f"{text} Δ nll, seed {other.removeprefix(f'{key}seed_')}", other, signed)
        for other in frame
        if other.startswith(f"{key}seed_")
    ]
    return [mean, *each]


def free_columns(path: Path) -> list[Column]:
    """The columns of a .csv as they are, under their names; none where there is no such file."""
    if not path.is_file():
        return []
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""])
    found = []
    for name in frame:
        if pd.api.types.is_numeric_dtype(frame[name]):
            found.append(numbers(frame, name, name, _plain))
        else:
            texts = frame[name].fillna("").astype(str).tolist()
            kind = "text" if any(column.kind == "key" for column in found) else "key"
            found.append(Column(name, texts, texts, kind))
    return found


def text_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Column]:
    """Columns of plain text from rows; the first is the key."""
    kinds = ("key", *("text" for _ in titles[1:]))
    texts = [[row[i] for row in rows] for i in range(len(titles))]
    return [Column(*cells) for cells in zip(titles, texts, texts, kinds, strict=True)]


def protocol(frame: pd.DataFrame) -> list[Column]:
    """How each model was measured on each text and task, one row each."""
    rows = []
    for model, group in frame.groupby("model", sort=False):
        first = group.iloc[0]
        for keys, measure in ((PERPLEXITY_PROTOCOL, "perplexity"), (HARNESS_PROTOCOL, "value")):
            for name in names(frame, measure):
                there = [key for key in keys if not pd.isna(first[f"{name}.{key}"])]
                said = [f"{key} {_digest(key, first[f'{name}.{key}'])}" for key in there]
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


def place_of(row: Mapping[str, Any]) -> Place:
    """The names of one row of results.csv."""
    return Place(*(row[key] for key in PLACE))


def _places(frame: pd.DataFrame) -> list[Place]:
    return [place_of(row) for _, row in frame.iterrows()]


def _spaced(place: Place) -> str:
    """The method with spaces, which let it wrap."""
    return place.method.replace("+", " + ")


def _names_of_rows(frame: pd.DataFrame) -> list[Column]:
    """Model, method and ratio, and the calibration where there are several."""
    places = _places(frame)
    models, methods = [place.model for place in places], [_spaced(place) for place in places]
    found = [
        Column("model", models, models, "text"),
        Column("method (QK + OV + MLP)", methods, methods, "key"),
        numbers(frame.replace(NO_RATIO, float("nan")), "ratio", "ratio", "{:g}".format),
    ]
    calibrations = [place.calibration for place in places]
    if len({place.calibration for place in places if not place.is_dense}) > 1:
        found.insert(2, Column("calibration", calibrations, calibrations, "text"))
    return found


def numbers(
    frame: pd.DataFrame,
    title: str,
    key: str,
    show: Callable[[Any], str],
    error: str | None = None,
) -> Column:
    """A column of numbers; `error` is the suffix of the column with their standard errors."""
    values = [float(value) for value in frame[key]]
    texts = ["–" if pd.isna(value) else show(value) for value in values]
    if error:
        errors = frame[f"{key}{error}"]
        texts = [_plus_minus(text, e) for text, e in zip(texts, errors, strict=True)]
    return Column(title, texts, [None if pd.isna(value) else value for value in values])


def _plus_minus(text: str, error: float) -> str:
    """Append a standard error, with as many decimals as the number has."""
    if pd.isna(error) or text == "–":
        return text
    if "e" in text:
        return f"{text} ± {error:.2g}"
    return f"{text} ± {error:.{len(text.partition('.')[2])}f}"


def score(value: float, decimals: int = 3, sign: str = "") -> str:
    """A share, or another score of lm-eval's, whose size may be any."""
    return f"{value:{sign}.{decimals}f}" if abs(value) < 1000 else f"{value:{sign}.4g}"


def short(value: float) -> str:
    """Two decimals while they mean something."""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.4g}"


def _plain(value: float) -> str:
    """Whole numbers and large ones without decimals, others to four digits."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else ''}{short(value)}"


def _digest(key: str, value: Any) -> str:
    """The first digits of a hash; other values as they are."""
    return str(value)[:12] if key.endswith(("sha256", "hash")) else str(value)


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
