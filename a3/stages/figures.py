"""Figures of a table: quality against compression, error by layer, kept RoPE pairs."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter

from a3.files import whole_folder, write_json
from a3.results import LOG, Record, Run, read_runs
from a3.stages.bits_figure import bits_drawing
from a3.stages.drawing import (
    COLOURS,
    COMPONENTS,
    DASHES,
    GREY,
    MARKERS,
    STYLE,
    Drawing,
    Row,
    colour_bar,
    colour_map,
    distinct_rows,
    log_if_wide,
    name_model,
    no_frame,
    points,
    save_drawing,
)
from a3.stages.ranks_figure import ranks_drawing
from a3.stages.rope import rope_drawings
from a3.stages.spectra_figure import spectra_drawing

# A model whose perplexity is so many times the best one's is broken, and how much says nothing.
OFF_SCALE = 50


def build_figures(
    results: Path,
    experiments: list[dict[str, str]],
    perplexity: list[str],
    harness: list[str],
    out: Path,
    spectra: Sequence[Path] = (),
) -> None:
    """Write every figure as SVG and PNG into the folder `out`, and captions.json.

    captions.json lists the figures in reading order as {"name", "caption"}. Per model: perplexity
    and harness values against compression, the relative functional error of each component in each
    layer, where whole RoPE pairs are kept, which ones, and the spectra of its calibrations among
    `spectra` (<model>/<calibration>.json).

    Raises:
        A3Error: as `build_tables` does, and for spectra of other weights.
    """
    drawings: list[Drawing] = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        for dense, runs in read_runs(results, experiments, perplexity, harness):
            its_own = [path for path in spectra if path.parent.name == dense.place.model]
            drawings += _model(dense, runs, perplexity, harness, its_own)
        with whole_folder(out) as folder:
            for drawing in drawings:
                save_drawing(drawing, folder)
            captions = [{"name": d.name, "caption": d.caption} for d in drawings]
            write_json(folder / "captions.json", captions)


def _model(
    dense: Run,
    runs: list[Run],
    perplexity: Sequence[str],
    harness: Sequence[str],
    spectra: Sequence[Path],
) -> list[Drawing]:
    """All figures of one model."""
    drawings = []
    # Of quantised rows, how many numbers they have says little.
    whole = [run for run in runs if not run.place.is_quantised]
    if perplexity and (whole or not runs):
        drawings.append(_perplexity(dense, whole, perplexity))
    if harness and (whole or not runs):
        drawings.append(_harness(dense, whole, harness))
    if whole != runs:
        drawings.append(bits_drawing(dense, runs, _perplexities(perplexity) | _scores(harness)))
    errors = {key: _error_rows(runs, key) for key in COMPONENTS}
    if any(errors.values()):
        drawings.append(_layer_error(dense, {key: rows for key, rows in errors.items() if rows}))
    drawings += rope_drawings(dense, runs)
    if ranks := ranks_drawing(dense, runs):
        drawings.append(ranks)
    drawings += [spectra_drawing(dense, path) for path in spectra]
    return drawings


# --- quality against compression ---

Measure = Callable[[Run], tuple[float, float | None]]


def _perplexities(texts: Sequence[str]) -> dict[str, Measure]:
    return {
        text: lambda run, text=text: (
            run.perplexity[text]["perplexity"],
            run.perplexity[text]["perplexity_stderr"],
        )
        for text in texts
    }


def _scores(tasks: Sequence[str]) -> dict[str, Measure]:
    return {
        task: lambda run, task=task: (
            math.nan if run.harness[task]["value"] is None else run.harness[task]["value"],
            run.harness[task]["stderr"],
        )
        for task in tasks
    }


def _perplexity(dense: Run, runs: list[Run], texts: Sequence[str]) -> Drawing:
    figure = _quality(dense, runs, _perplexities(texts), "perplexity", log=texts)
    caption = (
        f"{dense.place.model}: perplexity (lower is better) {_against(runs)}. The dashed "
        "line is the dense model. Bars are one standard error over the blocks of text; "
        "they are shared by all curves, so differences between curves are surer than they suggest. "
        f"Curves that leave the top end beyond {OFF_SCALE} times the best."
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
    """What stands along x."""
    kept = "against the share of the dense model's parameters that is left"
    uniform = [run for run in runs if run.place.nominal is not None]
    if not uniform:
        return kept
    alone = "; rows with sizes of their own stand there only" if uniform != runs else ""
    return f"against the nominal compression ratio, left, and {kept}, right{alone}"


def _quality(
    dense: Run, runs: list[Run], panels: dict[str, Measure], label: str, log: Sequence[str]
) -> Figure:
    """One row a text or task; nominal ratio, if any, on the left, parameters left on the right.

    The panels that `log` names are logarithmic where values span far.
    """
    curves = _curves(runs)
    ratios = {run.place.nominal for run in runs} - {None}
    step = min(0.004, 0.02 / max(len(curves), 1))
    columns = 2 if len(curves) > 6 else 1
    high = 3.0 + 0.1 * max(0, len(curves) - 6)
    legend = 0.6 + 0.22 * -(-len(curves) // columns)
    figure = Figure(figsize=(9, high * len(panels) + legend), layout="constrained")
    wide = 2 if ratios else 1
    grid = figure.subplots(len(panels), wide, sharey="row", sharex="col", squeeze=False)
    for (name, measure), row in zip(panels.items(), grid, strict=True):
        if ratios:
            _curves_on(row[0], dense, curves, measure, lambda run: run.place.nominal, step)
        _curves_on(row[-1], dense, curves, measure, lambda run: _kept(dense, run), 0)
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
    _legend(figure, grid[0][-1], _from_the_top(curves, panels), columns)
    return figure


def _from_the_top(curves: dict[str, list[Run]], panels: dict[str, Measure]) -> list[str]:
    """Labels of the curves in the order of their ends on the first panel, from the top."""
    measure = next(iter(panels.values()))
    ends = {label: measure(curve[-1])[0] for label, curve in curves.items()}
    # Those without a value are last.
    return sorted(ends, key=lambda label: (math.isnan(ends[label]), -ends[label]))


def _legend(figure: Figure, axes: Axes, order: list[str], columns: int) -> None:
    """Markers and lines, without the bars of errors, in the order of the curves' ends."""
    bars, labels = axes.get_legend_handles_labels()
    handles = dict(zip(labels, (bar[0] for bar in bars), strict=True))
    figure.legend(
        [handles[label] for label in ("dense", *order)],
        ["dense", *order],
        loc="outside lower left",
        title="QK + OV + MLP",
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
        curves.setdefault(run.place.method.replace("+", " + ") + suffix, []).append(run)
    return dict(sorted(curves.items()))


def _curves_on(
    axes: Axes,
    dense: Run,
    curves: dict[str, list[Run]],
    measure: Measure,
    place: Callable[[Run], float | None],
    step: float,
) -> None:
    """Draw the dense model's line and one curve a method, all from the dense point.

    Runs that have no place along x are left out; a method keeps its colour.
    Curves stand `step` apart along x, so that the bars of equal ratios do not hide each other.
    """
    axes.axhline(measure(dense)[0], color=GREY, linestyle="--", linewidth=1.2)
    points(
        axes,
        [place(dense)],
        [measure(dense)],
        color=GREY,
        marker="o",
        linestyle="--",
        label="dense",
    )
    for index, (label, curve) in enumerate(curves.items()):
        runs = [run for run in curve if place(run) is not None]
        if not runs:
            continue
        colour = COLOURS[index % len(COLOURS)]
        dash = DASHES[index // len(COLOURS) % len(DASHES)]
        shift = step * (index - (len(curves) - 1) / 2)
        places = [place(run) + shift for run in runs]
        values = [measure(run) for run in runs]
        first = ([place(dense), places[0]], [measure(dense)[0], values[0][0]])
        axes.plot(*first, color=colour, linestyle=dash, linewidth=1.6)
        marker = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
        points(axes, places, values, color=colour, marker=marker, linestyle=dash, label=label)


def _kept(dense: Run, run: Run) -> float:
    return run.size["parameters"] / dense.size["parameters"]


# --- error by layer ---


def _error_rows(runs: list[Run], component: str) -> list[Row]:
    """One row a mode and size of one component; equal rows of several experiments count once."""
    found = [
        (run, np.array([_error(layer, component) for layer in run.layers]))
        for run in runs
        if any(component in layer for layer in run.layers)
    ]
    return distinct_rows(found, component)


def _error(layer: dict[str, Any], component: str) -> float:
    """A layer's relative functional error, NaN where the component was left dense."""
    return layer[component]["relative_error"] if component in layer else np.nan


def _layer_error(dense: Run, errors: dict[str, list[Row]]) -> Drawing:
    heights = [len(rows) for rows in errors.values()]
    figure = Figure(
        figsize=(10, 1.6 + 0.27 * sum(heights) + 0.45 * len(errors)), layout="constrained"
    )
    grid = figure.subplots(
        len(errors), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    name_model(figure, dense)
    values = np.concatenate([row.values for rows in errors.values() for row in rows])
    norm, cmap = _scale(values), colour_map("viridis_r")
    for axes, (component, rows) in zip(grid[:, 0], errors.items(), strict=True):
        image = axes.imshow(
            np.stack([row.values for row in rows]), aspect="auto", norm=norm, cmap=cmap
        )
        axes.set_title(COMPONENTS[component])
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        no_frame(axes)
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(12, integer=True))
    grid[-1, 0].set_xlabel("layer")
    bar = colour_bar(figure, image, grid, "relative functional error")
    bar.formatter = FuncFormatter(lambda value, _: f"{value:g}")
    if isinstance(norm, LogNorm):
        bar.locator = LogLocator(subs=(1, 2, 5), numticks=99)
    bar.minorticks_off()
    caption = (
        f"{dense.place.model}: share of each component's function that is lost on the calibration "
        "text (squared norm, as the mode's own objective measures it), by layer; 0 is nearest the "
        "input. Rows are the component's mode and its compression ratio or rank; darker is worse; "
        "all rows share one scale. Grey: not compressed, or nothing lost."
    )
    return Drawing(f"layer-error-{dense.place.model}", caption, figure)


def _scale(values: np.ndarray) -> Normalize:
    """Logarithmic where positive values span over a factor of twenty, linear from 0 else."""
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size and positive.max() > 20 * positive.min():
        return LogNorm(positive.min(), positive.max())
    return Normalize(0, positive.max() if positive.size else 1)
