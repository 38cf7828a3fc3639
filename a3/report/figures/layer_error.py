"""Figures of each layer's relative error."""

from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from a3.artifacts.runs import Run
from a3.report.figures.drawing import (
    Drawing,
    Row,
    colour_bar,
    colour_map,
    distinct_rows,
    name_model,
    no_frame,
)


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
        axes.set_title(component.upper())
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
        f"{dense.place.model}: relative error of each component on the calibration text, by layer; "
        "layer 0 is nearest the input. The error is the lost share of the squared norm, as in the "
        "mode's own objective. Each row is a mode with its compression ratio or rank; darker is "
        "worse; all rows share one colour scale. Grey: not compressed, or no error."
    )
    return Drawing(f"layer-error-{dense.place.model}", caption, figure)


def _scale(values: np.ndarray) -> Normalize:
    """Logarithmic if the positive values span more than a factor of 20, else linear from 0."""
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size and positive.max() > 20 * positive.min():
        return LogNorm(positive.min(), positive.max())
    return Normalize(0, positive.max() if positive.size else 1)
