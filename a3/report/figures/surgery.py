"""Figures of surgeries: perplexity against what is kept, and the dimensions by layer and matrix."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from a3.artifacts.runs import SurgeryRun, read_surgeries
from a3.report.figures.drawing import (
    COLOURS,
    GREY,
    MARKERS,
    Drawing,
    colour_bar,
    colour_map,
    log_if_wide,
    name_model,
    no_frame,
    points,
    save_drawings,
    styled,
)
from a3.solutions.surgeries import PROJECTIONS, SURGERIES, VARIANCE, parse_size

# The colour shows which matrices share components; line and marker show the metric and the mean.
SHARINGS = ("", "kv", "layers")


def build_surgery_figures(
    results: Path,
    surgeries: Sequence[Mapping[str, str]],
    perplexity: Sequence[str],
    harness: Sequence[str],
    out: Path,
) -> None:
    """Write every figure as SVG and PNG into the folder `out`, and captions.json.

    Raises A3Error as `build_surgery_table` does.
    """
    drawings: list[Drawing] = []
    with styled():
        for dense, runs in read_surgeries(results, surgeries, perplexity, harness):
            if perplexity:
                drawings.append(perplexity_drawing(dense, runs, perplexity))
            by_variance = [run for run in runs if parse_size(run.place.size).of == VARIANCE]
            if by_variance:
                drawings.append(dimensions_drawing(dense, by_variance))
        save_drawings(drawings, out)


def perplexity_drawing(dense: SurgeryRun, runs: list[SurgeryRun], texts: Sequence[str]) -> Drawing:
    """One row a text: against the explained variance, left, and the factors' parameters, right."""
    figure = Figure(figsize=(10, 3.6 * len(texts) + 1.1), layout="constrained")
    grid = figure.subplots(len(texts), 2, sharey="row", sharex="col", squeeze=False)
    by_variance = [run for run in runs if parse_size(run.place.size).of == VARIANCE]
    for text, (left, right) in zip(texts, grid, strict=True):
        curves_on(left, dense, by_variance, text, lambda run: run.weights["share"])
        curves_on(right, dense, runs, text, stored_share)
        left.set_title(f"{dense.place.model}, {text}")
        left.set_ylabel("perplexity")
        log_if_wide(left, [run.perplexity[text]["perplexity"] for run in (dense, *runs)])
        for axes in (left, right):
            axes.grid(axis="y", color="#dddddd", linewidth=0.7)
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.invert_xaxis()
    grid[-1][0].set_xlabel("variance explained, at least")
    grid[-1][1].set_xlabel("parameters of Q, K, V if factors were stored, of dense")
    handles, labels = grid[0][1].get_legend_handles_labels()
    lines = [handle[0] for handle in handles]
    figure.legend(lines, labels, loc="outside lower left", ncols=3, handlelength=2.6)
    caption = (
        f"{dense.place.model}: perplexity (lower is better) after W_q, W_k and W_v are rebuilt "
        "from their leading principal components. Left: against the share of the variance that "
        "the components explain; this is the variance of the weights or, with -rxx, of their "
        "outputs, so the two are not comparable. Right: against the parameters of Q, K and V if "
        "factors and means were stored; this panel has all rows. The dashed line is the dense "
        "model. Bars are one standard error over the blocks of text; all curves use the same "
        "text, so differences between curves are more certain than the bars suggest."
    )
    return Drawing(f"surgery-perplexity-{dense.place.model}", caption, figure)


def stored_share(run: SurgeryRun) -> float:
    """Parameters of Q, K and V if factors were stored, of the dense ones."""
    return run.weights["if_stored.qkv"] / run.weights["if_stored.qkv_dense"]


def curves_on(
    axes: Axes,
    dense: SurgeryRun,
    runs: list[SurgeryRun],
    text: str,
    place: Callable[[SurgeryRun], float],
) -> None:
    """The dense model's line, and one curve a mode, most kept first."""
    axes.axhline(dense.perplexity[text]["perplexity"], color=GREY, linestyle="--", linewidth=1.2)
    for mode, surgery in SURGERIES.items():
        curve = sorted((run for run in runs if run.place.mode == mode), key=place, reverse=True)
        if not curve:
            continue
        records = [run.perplexity[text] for run in curve]
        values = [(each["perplexity"], each["perplexity_stderr"]) for each in records]
        index = SHARINGS.index(surgery.shared)
        look = {"color": COLOURS[index], "marker": MARKERS[index + 3 * surgery.metric]}
        look |= {"linestyle": "--" if surgery.metric else "-" if surgery.mean else ":"}
        look |= {} if surgery.mean else {"markerfacecolor": "white"}
        points(axes, [place(run) for run in curve], values, label=mode, **look)


def dimensions_drawing(dense: SurgeryRun, runs: list[SurgeryRun]) -> Drawing:
    """A column a matrix, a row a mode and share: how many components each layer keeps."""
    order = [run for mode in SURGERIES for run in runs if run.place.mode == mode]
    figure = Figure(figsize=(11, 1.6 + 0.2 * len(order)), layout="constrained")
    grid = figure.subplots(1, len(PROJECTIONS), sharey=True, squeeze=False)
    name_model(figure, dense)
    counts = {
        name: np.array(
            [[layer[name]["principal_components"] for layer in run.layers] for run in order]
        )
        for name in PROJECTIONS
    }
    top = max(values.max() for values in counts.values())
    for axes, (name, values) in zip(grid[0], counts.items(), strict=True):
        image = axes.imshow(values, aspect="auto", vmin=0, vmax=top, cmap=colour_map("viridis"))
        axes.set_title(name.upper())
        axes.set_yticks(range(len(order)), [label(run) for run in order])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("layer")
        no_frame(axes)
    colour_bar(figure, image, grid, "components")
    caption = (
        f"{dense.place.model}: number of principal components that explain a share of the "
        "variance, by layer and matrix. Matrices that share a set show the same number. A query "
        f"matrix has {dense.weights['heads'] * dense.weights['head_dim']} outputs, a key or value "
        f"matrix {dense.weights['kv_heads'] * dense.weights['head_dim']}, of "
        f"{dense.weights['hidden_size']} inputs."
    )
    return Drawing(f"surgery-dimensions-{dense.place.model}", caption, figure)


def label(run: SurgeryRun) -> str:
    """Mode and share of a row."""
    return f"{run.place.mode}  {100 * float(parse_size(run.place.size).share):g}%"
