"""Figures of the paper's tables."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from a3.experiments.paper import Row, Table
from a3.report.figures.drawing import COLOURS, GREY
from a3.report.tables.paper_comparison import Compared, measures_of, telling

# --- figure ---
HOLLOW = {"facecolors": "white", "edgecolors": GREY, "linewidths": 1.3, "zorder": 3}

FILLED = {"facecolors": COLOURS[0], "edgecolors": COLOURS[0], "zorder": 4}

LOG = 10  # A wider range than this is drawn on a logarithmic scale.


def drawn(table: Table, found: list[Compared]) -> Figure:
    """Ours and published figures as dots: a band for each model, axes in it for each measure."""
    groups = [
        [one for one in found if one.cell.model == model]
        for model in dict.fromkeys(one.cell.model for one in found)
    ]
    measures = [measures_of(table, group) for group in groups]
    heights = [0.9 + 0.19 * len({one.cell.row for one in group}) for group in groups]
    wide = max(map(len, measures))
    figure = Figure(figsize=(max(2.2 + 2.6 * wide, 7), 0.5 + sum(heights)), layout="constrained")
    figure.suptitle(f"{table.spec['title']}: ours (filled), published (hollow)", fontsize=11)
    bands = figure.subfigures(len(groups), height_ratios=heights, squeeze=False)[:, 0]
    for group, names, band in zip(groups, measures, bands, strict=True):
        band.suptitle(group[0].cell.model, fontweight="bold", fontsize=10, x=0.01, ha="left")
        rows, keys = list(dict.fromkeys(one.cell.row for one in group)), telling(group)
        line = band.subplots(1, wide, squeeze=False)[0]
        for axes, measure in zip(line, names, strict=False):
            dots(axes, [one for one in group if one.cell.measure == measure], rows)
            axes.set_title(measure, fontsize=9)
            axes.set_yticks(range(len(rows)), [])
        labels = [" ".join(getattr(row, key) for key in keys) for row in rows]
        line[0].set_yticks(range(len(rows)), labels)
        for axes in line[len(names) :]:
            axes.set_axis_off()
    return figure


def dots(axes: Axes, cells: list[Compared], rows: list[Row]) -> None:
    """One measure of one model: filled ours, hollow published, a line between the two."""
    values = []
    for one in cells:
        y = rows.index(one.cell.row)
        both = [value for value in (one.published, one.ours) if value is not None]
        values += both
        if one.published is not None:
            axes.scatter([one.published], [y], s=44, **HOLLOW)
        if one.ours is not None:
            axes.scatter([one.ours], [y], s=22, **FILLED)
        if len(both) == 2:
            axes.hlines(y, min(both), max(both), color=GREY, linewidth=1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="both", color="#e4e4e4", linewidth=0.7)
    axes.tick_params(labelsize=8, length=0)
    perplexity = cells[0].cell.quantity in ("perplexity", "delta")
    if perplexity and values and min(values) > 0 and max(values) > LOG * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        wide = max(values) > 300 * min(values)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
