"""The figure of a frontier: what a model loses at every size, predicted, corrected and measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from a3.report.figures.drawing import COLOURS, GREY, Drawing, log_if_wide, points
from a3.report.frontiers import Frontier

# What stands along x, by its name in a frontier.
SIZES = {"parameters": "parameters", "cached_numbers": "KV cache"}

# What was measured: its key, how it is filled, and its name.
MEASURED = (
    ("measured", COLOURS[6], "measured, for the correction"),
    ("checks", "white", "measured, to check it"),
)


# Losses so many times smaller than the largest are not drawn.
DEEP = 300


def frontier_drawing(frontier: Frontier) -> Drawing:
    """Loss against parameters, left, and KV cache, right; the latter only if it shrinks."""
    record = frontier.record
    dense, drawn = record["dense.amounts"], record["points"]
    panels = {key: name for key, name in SIZES.items() if shrinks(drawn, key)}
    figure = Figure(figsize=(9 if len(panels) > 1 else 5.5, 4.6), layout="constrained")
    grid = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axes, (key, name) in zip(grid, (panels or SIZES).items(), strict=False):
        curves_on(axes, record.data, key, dense[key])
        axes.set_xlabel(f"{name} kept, of the dense model's")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.invert_xaxis()
        axes.grid(color="#dddddd", linewidth=0.7)
    grid[0].set_title(frontier.title)
    grid[0].set_ylabel("loss over the dense model's, nats a token")
    losses = losses_of(record.data)
    log_if_wide(grid[0], losses)
    if losses:
        grid[0].set_ylim(bottom=max(min(losses) / 1.2, max(losses) / DEEP))
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, handlelength=2.6)
    caption = (
        f"{frontier.title}: the loss at every size, against the parameters and the KV cache that "
        "are left. The dashed line is predicted from the statistics alone; the solid line is "
        f"corrected by what was measured at the filled points, on {record['blocks']} blocks of the "
        "calibration's text that it did not use. Hollow points were measured only to check it. "
        "Bars are one standard error of the paired difference over the blocks."
    )
    return Drawing(f"frontier-{frontier.title.replace(', ', '-')}", caption, figure)


def shrinks(drawn: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether a quantity differs over a frontier's ratios."""
    return len({point["amounts"][key] for point in drawn}) > 1


def losses_of(record: Mapping[str, Any]) -> list[float]:
    """All losses above 0 that are drawn."""
    lines = [point[key] for point in record["points"] for key in ("predicted", "corrected")]
    found = [one["increase"] for key, *_ in MEASURED for one in record[key]]
    return [loss for loss in lines + found if loss > 0]


def curves_on(axes: Axes, record: Mapping[str, Any], key: str, dense: float) -> None:
    """The two lines and the measured points, along the share of a quantity that is kept.

    The dense model and measured losses below 0 have no place on a logarithmic axis.
    """
    drawn = [point for point in record["points"] if point["predicted"] > 0]
    shares = [point["amounts"][key] / dense for point in drawn]
    for loss, colour, dash, width in (
        ("predicted", GREY, "--", 1.2),
        ("corrected", COLOURS[0], "-", 1.8),
    ):
        look = {"color": colour, "linestyle": dash, "linewidth": width, "label": loss}
        axes.plot(shares, [point[loss] for point in drawn], **look)
    amounts = {point["ratio"]: point["amounts"][key] / dense for point in record["points"]}
    for found, fill, label in MEASURED:
        tried = [one for one in record[found] if one["increase"] > 0]
        if tried:
            places = [amounts[one["ratio"]] for one in tried]
            values = [(one["increase"], one["stderr"]) for one in tried]
            look = {"color": COLOURS[6], "markerfacecolor": fill, "marker": "o", "linestyle": ""}
            points(axes, places, values, zorder=3, label=label, **look)
