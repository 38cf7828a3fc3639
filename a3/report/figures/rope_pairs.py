"""Figures of the RoPE pairs that QK keeps: how many KV groups keep each, and which of them."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from a3.artifacts.runs import Run
from a3.report.figures.drawing import (
    Drawing,
    Row,
    choice_of,
    colour_bar,
    colour_map,
    distinct_rows,
    name_model,
    no_frame,
)

FEW_GROUPS = 8  # KV groups that get a colour each

MOST_PANELS = 9  # KV groups that get a map each


def rope_drawings(dense: Run, runs: list[Run]) -> list[Drawing]:
    """Maps of the kept pairs over all KV groups, and of each group where they differ.

    None if QK is dense or has no RoPE.
    """
    maps = _pair_rows(dense, runs)
    if not maps:
        return []
    sizes = len({choice_of(run, "qk").size for run in runs if any(map(_groups, run.layers))})
    shares = [Row(row.label, row.values.mean(1)) for row in maps]
    drawings = [_rope_pairs(dense, shares, wide=min(4, sizes))]
    # NaN equals NaN here: a layer that is left dense is alike in all groups.
    differ = [r for r in maps if not np.array_equal(r.values, r.values[:, :1] + 0 * r.values, True)]
    if differ and dense.weights["kv_heads"] <= MOST_PANELS:
        drawings.append(_rope_groups(dense, differ))
    return drawings


def _pair_rows(dense: Run, runs: list[Run]) -> list[Row]:
    """Maps (layers × groups × pairs) of 1 for a pair that is kept, 0 else, one a mode and size."""
    shape = dense.weights["kv_heads"], dense.weights["rope_dims"] // 2
    found = [
        (run, np.stack([_kept_pairs(layer, shape) for layer in run.layers]))
        for run in runs
        if any(_groups(layer) for layer in run.layers)
    ]
    return distinct_rows(found, "qk")


def _groups(layer: dict[str, Any]) -> list[list[int]]:
    """The pairs that each KV group keeps; none where QK is dense or has no RoPE."""
    return layer.get("qk", {}).get("rope_pairs") or []


def _kept_pairs(layer: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """Whether each group keeps each pair (groups, pairs); NaN where the layer's QK is dense."""
    groups = _groups(layer)
    if not groups:
        return np.full(shape, np.nan)
    return np.stack([np.isin(np.arange(shape[1]), group) for group in groups]).astype(float)


def _rope_pairs(dense: Run, rows: list[Row], wide: int) -> Drawing:
    """One map a mode and size, `wide` beside each other: a line a mode, a column a size."""
    high = -(-len(rows) // wide)
    layers = len(rows[0].values)
    figure = Figure(
        figsize=(1.2 + 3.0 * wide, 1.1 + high * (0.6 + 0.08 * layers)), layout="constrained"
    )
    grid = figure.subplots(high, wide, sharex=True, sharey=True, squeeze=False)
    name_model(figure, dense)
    norm, cmap = _share(dense.weights["kv_heads"])
    for index, (axes, row) in enumerate(zip(grid.flat, rows, strict=False)):
        image = axes.imshow(row.values, aspect="auto", norm=norm, cmap=cmap, origin="upper")
        axes.set_title(row.label, fontsize=10)
        axes.tick_params(labelbottom=index + wide >= len(rows))
        _ticks(axes)
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    _name_axes(figure)
    groups = dense.weights["kv_heads"]
    bar = colour_bar(figure, image, grid, f"KV groups that keep the pair, of {groups}")
    bar.set_ticks(
        [share / groups for share in range(0, groups + 1, -(-groups // FEW_GROUPS))],
        labels=[str(share) for share in range(0, groups + 1, -(-groups // FEW_GROUPS))],
    )
    caption = (
        f"{dense.place.model}: RoPE pairs that QK keeps, by layer. Dark: every KV group of the "
        "layer keeps the pair; white: none does. A column that is white from top to bottom is a "
        "rotation frequency that the model hardly uses. Grey: QK of this layer is dense."
    )
    return Drawing(f"rope-pairs-{dense.place.model}", caption, figure)


def _rope_groups(dense: Run, rows: list[Row]) -> Drawing:
    """A line of maps a mode and size, one map a KV group."""
    layers, wide, _ = rows[0].values.shape
    figure = Figure(
        figsize=(1.2 + max(1.25, 4 / wide) * wide, 1.1 + len(rows) * (0.8 + 0.08 * layers)),
        layout="constrained",
    )
    name_model(figure, dense)
    lines = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    norm, cmap = _share(1)
    for line, row in zip(lines, rows, strict=True):
        line.suptitle(row.label, x=0.01, ha="left", fontsize=10)
        panels = line.subplots(1, wide, sharey=True, squeeze=False)[0]
        for group, axes in enumerate(panels):
            axes.imshow(row.values[:, group], aspect="auto", norm=norm, cmap=cmap)
            axes.set_title(f"group {group}", fontsize=9)
            _ticks(axes)
    _name_axes(figure)
    caption = (
        f"{dense.place.model}: RoPE pairs that each KV group keeps (dark), by layer. Modes that "
        "keep the same pairs in all groups are left out. Grey: QK of this layer is dense."
    )
    return Drawing(f"rope-groups-{dense.place.model}", caption, figure)


def _ticks(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    no_frame(axes)


def _name_axes(figure: Figure) -> None:
    figure.supxlabel("RoPE pair (0 turns fastest)", fontsize=10)
    figure.supylabel("layer", fontsize=10)


def _share(groups: int) -> tuple[Normalize, Colormap]:
    """One step of colour for each possible share while there are few groups."""
    cmap = colour_map("Blues")
    if groups > FEW_GROUPS:
        return Normalize(0, 1), cmap
    edges = (np.arange(groups + 2) - 0.5) / groups
    return BoundaryNorm(edges, cmap.N), cmap
