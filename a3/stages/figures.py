"""Figures of a table: quality against compression, error by layer, kept RoPE pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter

from a3.files import whole_folder, write_json
from a3.results import Run, read_runs
from a3.solutions.modes import Choice, parse_choice

# Okabe and Ito's colours, told apart by colour-blind readers; markers and dashes tell them apart
# in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
GREY = "#767676"
ABSENT = "#e0e0e0"
STYLE = {
    "svg.hashsalt": "a3",  # identifiers in an SVG are random without it
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a name with two dollar signs is a name
    "legend.frameon": False,
}
FEW_GROUPS = 8  # KV groups that get a colour each
COMPONENTS = {"qk": "QK", "ov": "OV", "mlp": "MLP"}


@dataclass(frozen=True)
class Drawing:
    """A figure, the name of its files and what one sees in it."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Row:
    """A row of a heat map: the layers' errors (layers), or a map of its own (layers × pairs)."""

    label: str
    values: np.ndarray


def build_figures(
    results: Path,
    experiments: list[dict[str, str]],
    perplexity: list[str],
    harness: list[str],
    out: Path,
) -> None:
    """Write every figure as SVG and PNG into the folder `out`, and captions.json.

    captions.json lists the figures in reading order as {"name", "caption"}. Per model: perplexity
    and harness values against compression, the relative functional error of each component in each
    layer, and, where whole RoPE pairs are kept, which ones.

    Raises:
        A3Error: as `build_tables` does.
    """
    drawings: list[Drawing] = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        for dense, runs in read_runs(results, experiments, perplexity, harness):
            drawings += _model(dense, runs, perplexity, harness)
        with whole_folder(out) as folder:
            for drawing in drawings:
                _save(drawing, folder)
            captions = [{"name": d.name, "caption": d.caption} for d in drawings]
            write_json(folder / "captions.json", captions)


def _model(
    dense: Run, runs: list[Run], perplexity: Sequence[str], harness: Sequence[str]
) -> list[Drawing]:
    """All figures of one model."""
    drawings = []
    if perplexity:
        drawings.append(_perplexity(dense, runs, perplexity))
    if harness:
        drawings.append(_harness(dense, runs, harness))
    errors = {key: _error_rows(runs, key) for key in COMPONENTS}
    if any(errors.values()):
        drawings.append(_layer_error(dense, {key: rows for key, rows in errors.items() if rows}))
    pairs = _pair_rows(dense, runs)
    if pairs:
        sizes = len({_choice(run, "qk").size for run in runs if any(map(_groups, run.layers))})
        drawings.append(_rope_pairs(dense, pairs, wide=min(4, sizes)))
    return drawings


def _save(drawing: Drawing, folder: Path) -> None:
    """Write SVG and PNG without dates or versions, so that equal figures are equal files."""
    svg = {"Date": None, "Creator": None}
    drawing.figure.savefig(folder / f"{drawing.name}.svg", metadata=svg)
    drawing.figure.savefig(folder / f"{drawing.name}.png", dpi=160, metadata={"Software": None})


def _choice(run: Run, component: str) -> Choice:
    """Mode and size of a component that this run compresses."""
    return parse_choice(component, getattr(run.place, component), run.place.ratio)


def _shown(size: Decimal | int) -> str:
    """The share that is removed, or the rank that is kept."""
    return f"rank {size}" if isinstance(size, int) else f"{100 * float(size):g}%"


# --- quality against compression ---


def _perplexity(dense: Run, runs: list[Run], texts: Sequence[str]) -> Drawing:
    panels = {
        text: lambda run, text=text: (
            run.perplexity[text]["perplexity"],
            run.perplexity[text]["perplexity_stderr"],
        )
        for text in texts
    }
    figure = _quality(dense, runs, panels, "perplexity", log=True)
    caption = (
        f"{dense.place.model}: perplexity (lower is better) {_against(runs)}. The dashed "
        "line is the dense model. Bars are one standard error over the blocks of text; "
        "they are shared by all curves, so differences between curves are surer than they suggest."
    )
    return Drawing(f"perplexity-{dense.place.model}", caption, figure)


def _harness(dense: Run, runs: list[Run], tasks: Sequence[str]) -> Drawing:
    panels = {
        task: lambda run, task=task: (run.harness[task]["value"], run.harness[task]["stderr"])
        for task in tasks
    }
    figure = _quality(dense, runs, panels, "score", log=False)
    metrics = sorted({dense.harness[task]["metric"] for task in tasks})
    caption = (
        f"{dense.place.model}: harness score ({', '.join(metrics)}) {_against(runs)}. The dashed "
        "line is the dense model. Bars are one standard error over the items."
    )
    return Drawing(f"harness-{dense.place.model}", caption, figure)


def _against(runs: list[Run]) -> str:
    """What stands along x."""
    kept = "against the share of the dense model's parameters that is left"
    uniform = [run for run in runs if run.place.nominal is not None]
    if not uniform:
        return kept
    alone = "; rows with sizes of their own stand there only" if uniform != runs else ""
    return f"against the nominal compression ratio, left, and {kept}, right{alone}"


Measure = Callable[[Run], tuple[float, float | None]]


def _quality(
    dense: Run, runs: list[Run], panels: dict[str, Measure], label: str, log: bool
) -> Figure:
    """One row a text or task; nominal ratio, if any, on the left, parameters left on the right."""
    curves = _curves(runs)
    ratios = {run.place.nominal for run in runs} - {None}
    step = min(0.004, 0.02 / max(len(curves), 1))
    figure = Figure(figsize=(9, 3.0 * len(panels) + 0.6 + 0.22 * len(curves)), layout="constrained")
    wide = 2 if ratios else 1
    grid = figure.subplots(len(panels), wide, sharey="row", sharex="col", squeeze=False)
    for (name, measure), row in zip(panels.items(), grid, strict=True):
        if ratios:
            _curves_on(row[0], dense, curves, measure, lambda run: run.place.nominal, step)
        _curves_on(row[-1], dense, curves, measure, lambda run: _kept(dense, run), 0)
        row[0].set_title(f"{dense.place.model}, {name}")
        row[0].set_ylabel(label)
        if log:
            _log_if_wide(row[0], [measure(run)[0] for run in (dense, *runs)])
        for axes in row:
            axes.grid(axis="y", color="#dddddd", linewidth=0.7)
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if ratios:
        grid[-1][0].set_xticks(sorted({0.0, *ratios}))
        grid[-1][0].set_xlabel("compression ratio c (nominal)")
    grid[-1][-1].set_xlabel("parameters kept, of the dense model's")
    grid[-1][-1].invert_xaxis()
    handles, labels = grid[0][-1].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", title="QK + OV + MLP", alignment="left"
    )
    return figure


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
    _points(
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
        _points(axes, places, values, color=colour, marker=marker, linestyle=dash, label=label)


def _points(
    axes: Axes, places: list[float], values: list[tuple[float, float | None]], **look: Any
) -> None:
    """Values with their standard errors; no bar where there is no error."""
    axes.errorbar(
        places,
        [value for value, _ in values],
        yerr=[0.0 if error is None else error for _, error in values],
        linewidth=1.6,
        elinewidth=1.0,
        markersize=5,
        capsize=2.5,
        **look,
    )


def _kept(dense: Run, run: Run) -> float:
    return run.size["parameters"] / dense.size["parameters"]


def _log_if_wide(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis where the worst is over five times the best."""
    span = max(values) / min(values)
    if span > 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 3) if span > 100 else (1, 2, 3, 5, 7), numticks=99)
        )
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


# --- error by layer ---


def _error_rows(runs: list[Run], component: str) -> list[Row]:
    """One row a mode and size of one component; equal rows of several experiments count once."""
    found = [
        (run, np.array([_error(layer, component) for layer in run.layers]))
        for run in runs
        if any(component in layer for layer in run.layers)
    ]
    return _distinct(found, component)


def _error(layer: dict[str, Any], component: str) -> float:
    """A layer's relative functional error, NaN where the component was left dense."""
    return layer[component]["relative_error"] if component in layer else np.nan


def _distinct(found: list[tuple[Run, np.ndarray]], component: str) -> list[Row]:
    """Label rows by the component's mode and size, and by the rest only where that tells more."""
    several = len({run.place.calibration for run, _ in found}) > 1
    groups: dict[tuple[str, Decimal | int], list[tuple[Run, np.ndarray]]] = {}
    for run, values in found:
        choice = _choice(run, component)
        mode = choice.mode + (f", {run.place.calibration}" if several else "")
        group = groups.setdefault((mode, choice.size), [])
        if not any(np.array_equal(values, other, equal_nan=True) for _, other in group):
            group.append((run, values))
    rows = []
    for (mode, size), group in groups.items():
        for run, values in group:
            note = f" in {run.place.method}" if len(group) > 1 else ""
            rows.append((mode + note, size, values))
    rows.sort(key=lambda row: row[:2])
    return [Row(f"{mode}  {_shown(size)}", values) for mode, size, values in rows]


def _layer_error(dense: Run, errors: dict[str, list[Row]]) -> Drawing:
    heights = [len(rows) for rows in errors.values()]
    figure = Figure(
        figsize=(10, 1.6 + 0.27 * sum(heights) + 0.45 * len(errors)), layout="constrained"
    )
    grid = figure.subplots(
        len(errors), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    _title(figure, dense)
    values = np.concatenate([row.values for rows in errors.values() for row in rows])
    norm, cmap = _scale(values), _colours("viridis_r")
    for axes, (component, rows) in zip(grid[:, 0], errors.items(), strict=True):
        image = axes.imshow(
            np.stack([row.values for row in rows]), aspect="auto", norm=norm, cmap=cmap
        )
        axes.set_title(COMPONENTS[component])
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        _cells(axes)
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(12, integer=True))
    grid[-1, 0].set_xlabel("layer")
    bar = _bar(figure, image, grid, "relative functional error")
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


def _title(figure: Figure, dense: Run) -> None:
    figure.suptitle(dense.place.model, x=0.01, ha="left", fontsize=11)


def _scale(values: np.ndarray) -> Normalize:
    """Logarithmic where positive values span over a factor of twenty, linear from 0 else."""
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size and positive.max() > 20 * positive.min():
        return LogNorm(positive.min(), positive.max())
    return Normalize(0, positive.max() if positive.size else 1)


def _colours(name: str) -> Colormap:
    return matplotlib.colormaps[name].with_extremes(bad=ABSENT)


def _bar(figure: Figure, image: AxesImage, grid: np.ndarray, label: str) -> Colorbar:
    """A slim colour bar along all panels."""
    height = figure.get_figheight()
    bar = figure.colorbar(image, ax=grid, label=label, pad=0.015, aspect=height / 0.2)
    bar.outline.set_visible(False)
    return bar


def _cells(axes: Axes) -> None:
    """No frame and no tick marks around a heat map."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


# --- kept RoPE pairs ---


def _pair_rows(dense: Run, runs: list[Run]) -> list[Row]:
    """Maps (layers × pairs) of the share of KV groups that keep a pair, one a mode and size."""
    pairs = dense.weights["rope_dims"] // 2
    found = [
        (run, np.stack([_kept_pairs(layer, pairs) for layer in run.layers]))
        for run in runs
        if any(_groups(layer) for layer in run.layers)
    ]
    return _distinct(found, "qk")


def _groups(layer: dict[str, Any]) -> list[list[int]]:
    """The pairs that each KV group keeps; none where QK is dense or has no RoPE."""
    return layer.get("qk", {}).get("rope_pairs") or []


def _kept_pairs(layer: dict[str, Any], pairs: int) -> np.ndarray:
    """Share of groups that keep each pair (pairs); NaN where the layer's QK is dense."""
    groups = _groups(layer)
    if not groups:
        return np.full(pairs, np.nan)
    return np.mean([np.isin(np.arange(pairs), group) for group in groups], axis=0)


def _rope_pairs(dense: Run, rows: list[Row], wide: int) -> Drawing:
    """One map a mode and size, `wide` beside each other: a line a mode, a column a size."""
    high = -(-len(rows) // wide)
    layers = len(rows[0].values)
    figure = Figure(
        figsize=(1.2 + 3.0 * wide, 1.1 + high * (0.6 + 0.08 * layers)), layout="constrained"
    )
    grid = figure.subplots(high, wide, sharex=True, sharey=True, squeeze=False)
    _title(figure, dense)
    norm, cmap = _share(dense.weights["kv_heads"])
    for index, (axes, row) in enumerate(zip(grid.flat, rows, strict=False)):
        image = axes.imshow(row.values, aspect="auto", norm=norm, cmap=cmap, origin="upper")
        axes.set_title(row.label, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.tick_params(labelbottom=index + wide >= len(rows))
        _cells(axes)
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    figure.supxlabel("RoPE pair (0 turns fastest)", fontsize=10)
    figure.supylabel("layer", fontsize=10)
    groups = dense.weights["kv_heads"]
    bar = _bar(figure, image, grid, f"KV groups that keep the pair, of {groups}")
    bar.set_ticks(
        [share / groups for share in range(0, groups + 1, -(-groups // FEW_GROUPS))],
        labels=[str(share) for share in range(0, groups + 1, -(-groups // FEW_GROUPS))],
    )
    caption = (
        f"{dense.place.model}: RoPE pairs that QK keeps, by layer. Dark: every KV group of the "
        "layer keeps the pair; white: none does. A column that is white from top to bottom is a "
        "rotation speed that the model hardly uses. Grey: the layer's QK was left dense."
    )
    return Drawing(f"rope-pairs-{dense.place.model}", caption, figure)


def _share(groups: int) -> tuple[Normalize, Colormap]:
    """One step of colour for each possible share while there are few groups."""
    cmap = _colours("Blues")
    if groups > FEW_GROUPS:
        return Normalize(0, 1), cmap
    edges = (np.arange(groups + 2) - 0.5) / groups
    return BoundaryNorm(edges, cmap.N), cmap
