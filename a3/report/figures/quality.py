"""Figures of perplexity and accuracy against size."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from a3.artifacts.protocols import LOG
from a3.artifacts.runs import Run
from a3.core.records import Record
from a3.report.figures.drawing import COLOURS, DASHES, GREY, MARKERS, Drawing, log_if_wide, points
from a3.report.labels import legend_label, legend_title

# A model whose perplexity is so many times the best one's is broken, and how much says nothing.
OFF_SCALE = 50

# Labels of fewer letters fit in three columns.
SHORT = 25

# --- quality against compression ---
Measure = Callable[[Run], tuple[float, float | None]]


def _perplexities(texts: Sequence[str]) -> dict[str, Measure]:
    return {text: partial(_perplexity_on, text) for text in texts}


def _perplexity_on(text: str, run: Run) -> tuple[float, float | None]:
    record = run.perplexity[text]
    return record["perplexity"], record["perplexity_stderr"]


def _scores(tasks: Sequence[str]) -> dict[str, Measure]:
    return {task: partial(_score_on, task) for task in tasks}


def _score_on(task: str, run: Run) -> tuple[float, float | None]:
    record = run.harness[task]
    return math.nan if record["value"] is None else record["value"], record["stderr"]


def _perplexity(dense: Run, runs: list[Run], texts: Sequence[str]) -> Drawing:
    figure = _quality(dense, runs, _perplexities(texts), "perplexity", log=texts)
    caption = (
        f"{dense.place.model}: perplexity (lower is better) {_against(runs)}. The dashed "
        "line is the dense model. Bars are one standard error over the blocks of text; "
        "all curves use the same text, so differences between curves are more certain than the "
        f"bars suggest. The y axis ends at {OFF_SCALE} times the best perplexity."
    )
    return Drawing(f"perplexity-{dense.place.model}", caption, figure)


def _harness(dense: Run, runs: list[Run], tasks: Sequence[str]) -> Drawing:
    perplexities = [task for task in tasks if _is_logarithmic(dense.harness[task])]
    figure = _quality(dense, runs, _scores(tasks), "score", log=perplexities)
    metrics = sorted({dense.harness[task]["metric"] for task in tasks})
    caption = (
        f"{dense.place.model}: harness score ({', '.join(metrics)}) {_against(runs)}. The dashed "
        "line is the dense model. Bars are one standard error over the items."
    )
    return Drawing(f"harness-{dense.place.model}", caption, figure)


def _is_logarithmic(record: Record) -> bool:
    """Whether a task's score is a perplexity."""
    return (record["item_measure"] or "").startswith(LOG)


def _against(runs: list[Run]) -> str:
    """What the x axis shows, for a caption."""
    kept = "against the share of the dense model's parameters that is left"
    uniform = [run for run in runs if run.place.nominal is not None]
    if not uniform:
        return kept
    alone = "; only the right panel has rows with a per-component size" if uniform != runs else ""
    return f"against the nominal compression ratio, left, and {kept}, right{alone}"


def _quality(
    dense: Run, runs: list[Run], panels: dict[str, Measure], label: str, log: Sequence[str]
) -> Figure:
    """One row a text or task; nominal ratio, if any, on the left, parameters left on the right.

    The panels that `log` names are logarithmic where values span far.
    """
    curves = _curves(runs)
    ratios = {ratio for run in runs if (ratio := run.place.nominal) is not None}
    step = min(0.004, 0.02 / max(len(curves), 1))
    # Names of presets are short, lists of modes long.
    columns = 3 if max(map(len, curves), default=0) < SHORT else 2 if len(curves) > 6 else 1
    high = 3.0 + 0.1 * max(0, len(curves) - 6)
    legend = 0.6 + 0.22 * -(-len(curves) // columns)
    figure = Figure(figsize=(9, high * len(panels) + legend), layout="constrained")
    wide = 2 if ratios else 1
    grid = figure.subplots(len(panels), wide, sharey="row", sharex="col", squeeze=False)
    for (name, measure), row in zip(panels.items(), grid, strict=True):
        if ratios:
            _curves_on(row[0], dense, 0.0, curves, measure, lambda run: run.place.nominal, step)
        _curves_on(row[-1], dense, 1.0, curves, measure, lambda run: _kept(dense, run), 0)
        row[0].set_title(f"{dense.place.model}, {name}")
        row[0].set_ylabel(label)
        if name in log:
            values = [measure(run)[0] for run in (dense, *runs)]
            log_if_wide(row[0], values, OFF_SCALE)
        for axes in row:
            axes.grid(axis="y", color="#dddddd", linewidth=0.7)
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if ratios:
        grid[-1][0].set_xticks(sorted({0.0, *ratios}))
        grid[-1][0].set_xlabel("compression ratio c (nominal)")
    grid[-1][-1].set_xlabel("parameters kept, of the dense model's")
    grid[-1][-1].invert_xaxis()
    title = legend_title({run.place.method for run in runs})
    _legend(figure, grid[0][-1], _from_the_top(curves, panels), columns, title)
    return figure


def _from_the_top(curves: dict[str, list[Run]], panels: dict[str, Measure]) -> list[str]:
    """Labels of the curves in the order of their ends on the first panel, from the top."""
    measure = next(iter(panels.values()))
    ends = {label: measure(curve[-1])[0] for label, curve in curves.items()}
    # Those without a value are last.
    return sorted(ends, key=lambda label: (math.isnan(ends[label]), -ends[label]))


def _legend(figure: Figure, axes: Axes, order: list[str], columns: int, title: str) -> None:
    """Markers and lines, without the bars of errors, in the order of the curves' ends."""
    bars, labels = axes.get_legend_handles_labels()
    handles = dict(zip(labels, (bar[0] for bar in bars), strict=True))
    figure.legend(
        [handles[label] for label in ("dense", *order)],
        ["dense", *order],
        loc="outside lower left",
        title=title,
        alignment="left",
        ncols=columns,
        handlelength=2.6,
    )


def _curves(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by method (and calibration, where there are several), the largest model first."""
    several = len({run.place.calibration for run in runs}) > 1
    curves: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: -run.size["parameters"]):
        suffix = f", {run.place.calibration}" if several else ""
        curves.setdefault(legend_label(run.place.method) + suffix, []).append(run)
    return dict(sorted(curves.items()))


def _curves_on(
    axes: Axes,
    dense: Run,
    start: float,
    curves: dict[str, list[Run]],
    measure: Measure,
    place: Callable[[Run], float | None],
    step: float,
) -> None:
    """Draw the dense model's line and one curve a method, all from the dense point at `start`.

    Runs that have no place along x are left out; a method keeps its colour.
    Curves stand `step` apart along x, so that the bars of equal ratios do not hide each other.
    """
    axes.axhline(measure(dense)[0], color=GREY, linestyle="--", linewidth=1.2)
    points(
        axes,
        [start],
        [measure(dense)],
        color=GREY,
        marker="o",
        linestyle="--",
        label="dense",
    )
    for index, (label, curve) in enumerate(curves.items()):
        placed = [(run, x) for run in curve if (x := place(run)) is not None]
        if not placed:
            continue
        colour = COLOURS[index % len(COLOURS)]
        dash = DASHES[index // len(COLOURS) % len(DASHES)]
        shift = step * (index - (len(curves) - 1) / 2)
        places = [x + shift for _, x in placed]
        values = [measure(run) for run, _ in placed]
        first = ([start, places[0]], [measure(dense)[0], values[0][0]])
        axes.plot(*first, color=colour, linestyle=dash, linewidth=1.6)
        marker = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
        points(axes, places, values, color=colour, marker=marker, linestyle=dash, label=label)


def _kept(dense: Run, run: Run) -> float:
    return run.size["parameters"] / dense.size["parameters"]
