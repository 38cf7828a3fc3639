"""a3 card --html: one page that shows what happened to a model, from its folder alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from a3.artifacts.card import SIZES, base_card
from a3.artifacts.fit import warning_of
from a3.artifacts.targets import File
from a3.core.errors import A3Error
from a3.core.files import whole_file
from a3.models.arch import is_compressed
from a3.models.checkpoint import Checkpoint
from a3.models.compressed import compressed_record
from a3.report.labels import named
from a3.report.templates import template
from a3.report.where import Part, Values, ceiling, largest, parts_of, span, total
from a3.solutions.modes import COMPONENTS

PAGE = File(suffix=".html")

# Share of the height that lies below the least and above the largest value of a logarithmic chart.
MARGIN = 0.06

# Height of the mark of two equal values, in percent of the chart's.
THIN = 1.6


@dataclass(frozen=True)
class Mark:
    """A rectangle of a chart: x and width in layers, y and height in percent from the top."""

    x: float
    y: float
    width: float
    height: float
    look: str
    said: str


@dataclass(frozen=True)
class Chart:
    """Marks over layers, the labels of the y axis from the top, and a dashed line (percent)."""

    name: str
    marks: list[Mark]
    layers: int
    top: str
    bottom: str
    line: float | None = None


def write_page(folder: Path, out: Path) -> None:
    """Write what happened to a compressed folder's model to `out`, a self-contained .html file.

    Raises A3Error if the folder is not a compressed one with approx.json, a file in it has changed,
    or `out` exists or lies in it.
    """
    PAGE.check(out, [folder], [])
    if not is_compressed(folder):
        raise A3Error(f"{folder}: a dense model, to which nothing happened. Name a compressed one.")
    Checkpoint(folder).verify_all()
    record = compressed_record(folder)
    if "layers" not in record:
        raise A3Error(
            f"{folder}: no approx.json, which says what happened in each layer: another program "
            "saved it again. Name the folder that a3 wrote."
        )
    page = template("happened.html.jinja").render(**content(record))
    with whole_file(out) as temporary:
        temporary.write_text(page, encoding="utf-8")


def content(record: dict[str, Any]) -> dict[str, Any]:
    """What the template shows, from the content of approx.json."""
    base, parts = base_card(record), parts_of(record)
    size = record["size"]
    predicted = [part for part in parts if part.is_predicted]
    return {
        "name": base["name"] or f"a {record['base']['family']} model",
        "preset": named("+".join(record["modes"][one].partition("@")[0] for one in COMPONENTS)),
        "removed": 1 - size["compressed"]["parameters"] / size["dense"]["parameters"],
        "sizes": [
            (name, size["dense"][key], size["compressed"][key])
            for key, name in SIZES.items()
            if size["dense"][key]
        ],
        "parts": [row_of(part, record["modes"][part.component]) for part in parts],
        "whole": sum(total(part.loss) for part in predicted),
        "whole_even": sum(total(part.loss_even) for part in predicted) or None,
        "losses": list(loss_charts(predicted)),
        "cut_off": cut_off(predicted),
        "errors": [] if predicted else list(error_charts(parts)),
        "sizes_by_layer": [kept_chart(part) for part in parts],
        "even": any(part.even is not None for part in parts),
        "marginal": list(marginal_charts(predicted)),
        "loss": record.get("loss"),
        "warning": warning_of(record["loss"]) if "loss" in record else None,
        "perplexity": record.get("perplexity", []),
        "calibration": max(
            record["provenance"].get("statistics", {}).values(),
            key=lambda one: one["tokens"],
            default=None,
        ),
        "healed": record.get("healed"),
        "licence": base.get("license_name") or base.get("license"),
        "weights": record["weights_sha256"],
        "dense_weights": record["base"]["weights_sha256"],
        "code": record["provenance"]["code"],
    }


def row_of(part: Part, mode: str) -> dict[str, Any]:
    """One component's row of the table."""
    least = min(part.kept)
    return {
        "name": part.component.upper(),
        "mode": mode,
        "kept": mean(part.kept),
        "least": least,
        "where": part.kept.index(least),
        "whole": sum(share == 1 for share in part.kept),
        "error": largest([part.errors]),
        "loss": total(part.loss),
        "loss_even": total(part.loss_even),
    }


# --- charts ---
def loss_charts(parts: Sequence[Part]) -> Iterator[Chart]:
    """Predicted loss by layer, at the same ratio everywhere and as allocated; one scale for all."""
    top = ceiling([part.loss for part in parts] + [part.loss_even for part in parts])
    for part in parts:
        marks = []
        for look, values, shift in (("before", part.loss_even, 0.06), ("after", part.loss, 0.5)):
            marks += bars(values, top, look, shift, 0.44, "nats a token")
        yield Chart(part.name, marks, len(part.kept), f"{top:.2g}", "0")


def cut_off(parts: Sequence[Part]) -> list[str]:
    """What the charts of losses cut off, in words."""
    top = ceiling([part.loss for part in parts] + [part.loss_even for part in parts])
    return [
        f"{value:.2g} in layer {layer} of {part.component.upper()}"
        f"{' at the same ratio everywhere' if values is part.loss_even else ''}"
        for part in parts
        for values in (part.loss_even, part.loss)
        for layer, value in enumerate(values)
        if value is not None and value > top
    ]


def error_charts(parts: Sequence[Part]) -> Iterator[Chart]:
    """Relative error by layer, where no loss was predicted."""
    top = largest([part.errors for part in parts])
    for part in parts:
        marks = bars(part.errors, top, "after", 0.1, 0.8, "relative error")
        yield Chart(part.name, marks, len(part.kept), f"{top:.2g}", "0")


def bars(
    values: Values, top: float, look: str, shift: float, width: float, unit: str
) -> list[Mark]:
    """A bar a layer from 0."""
    found = []
    for layer, value in enumerate(values):
        if value is not None and top > 0:
            height = min(100 * max(value, 0) / top, 100)
            said = f"layer {layer}: {value:.3g} {unit}"
            found.append(Mark(layer + shift, 100 - height, width, height, look, said))
            if value > top:  # a gap near its end
                found.append(Mark(layer + shift, 8, width, 4, "gap", said))
    return found


def kept_chart(part: Part) -> Chart:
    """The share of its size that each layer keeps, and what the same ratio everywhere keeps."""
    marks = [
        Mark(
            layer + 0.1, 100 - 100 * share, 0.8, 100 * share, "after", f"layer {layer}: {share:.1%}"
        )
        for layer, share in enumerate(part.kept)
    ]
    line = None if part.even is None else 100 - 100 * part.even
    return Chart(part.name, marks, len(part.kept), "100 %", "0", line)


def marginal_charts(parts: Sequence[Part]) -> Iterator[Chart]:
    """From what one rank more would save to what one less would cost, on one logarithmic scale."""
    ends = span(parts)
    if ends is None:
        return
    low, high = map(math.log, ends)

    def place(value: float) -> float:
        share = 0.5 if high == low else (math.log(value) - low) / (high - low)
        return 100 - 100 * (MARGIN + (1 - 2 * MARGIN) * share)

    for part in parts:
        marks = [
            mark
            for layer, pair in enumerate(zip(part.more_saves, part.less_costs, strict=True))
            if (mark := marginal_mark(layer, *pair, place)) is not None
        ]
        line = None if part.price is None else place(part.price)
        yield Chart(part.name, marks, len(part.kept), f"{ends[1]:.2g}", f"{ends[0]:.2g}", line)


def marginal_mark(layer: int, more: float | None, less: float | None, place: Any) -> Mark | None:
    """The mark of one layer; open to the top where nothing was taken, to the bottom at the end."""
    said = [
        f"{what} {value:.3g}"
        for what, value in (("one rank more saves", more), ("one less costs", less))
        if value is not None
    ]
    known = [place(value) for value in (more, less) if value is not None and value > 0]
    if not known:
        return None
    top, bottom, look = min(known), max(known), "after"
    if more is None:
        top, look = 0.0, "open"
    elif less is None:
        bottom, look = 100.0, "open"
    top = min(top, bottom - THIN)
    text = f"layer {layer}: {', '.join(said)} nats a token for a million parameters"
    return Mark(layer + 0.15, top, 0.7, bottom - top, look, text)
