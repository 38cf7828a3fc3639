"""What all figures share: their look, their files, and the rows of heat maps."""

import hashlib
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from a3.artifacts.runs import Run
from a3.core.files import whole_folder, write_json
from a3.report.labels import legend_label
from a3.solutions.modes import Choice, parse_choice
from a3.solutions.target import Target

# Okabe and Ito's colours, told apart by colour-blind readers, and five more of Tol's for tables of
# many methods; markers tell them apart in grey.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#882255", "#999933", "#332288", "#AA4499", "#44AA99"),
)

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "h", "*")

DASHES = ("-", "--", "-.", ":")

# Light to dark, the more is removed.
SHADES = ("#6baed6", "#3182bd", "#08519c", "#08306b", "#000000")

GREY = "#767676"

ABSENT = "#e0e0e0"

STYLE: dict[str, Any] = {
    "svg.hashsalt": "a3",  # identifiers in an SVG are random without it
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a name with two dollar signs is a name
    "legend.frameon": False,
}

# Options for writing figures: no dates or versions, so that equal figures give identical files.
FORMATS: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None, "Creator": None}},
    "png": {"dpi": 160, "metadata": {"Software": None}},
}


CLIP = re.compile(r'<clipPath id="(\w+)">\s*(.*?)\s*</clipPath>', re.DOTALL)


@dataclass(frozen=True)
class Drawing:
    """A figure, the name of its files and its caption."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Row:
    """A row of a heat map: one value per layer (layers), or a whole map (layers × …)."""

    label: str
    values: np.ndarray


def styled() -> AbstractContextManager[None]:
    """A context in which figures have a3's style, independent of the user's matplotlibrc."""
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})


def save_drawings(drawings: Sequence[Drawing], out: Path) -> None:
    """Write figures into the folder `out`, and captions.json, which lists them in reading order."""
    with whole_folder(out) as folder:
        for drawing in drawings:
            for kind in FORMATS:
                save_figure(drawing.figure, folder / f"{drawing.name}.{kind}", kind)
        captions = [{"name": d.name, "caption": d.caption} for d in drawings]
        write_json(folder / "captions.json", captions)


def save_figure(figure: Figure, path: Path, kind: str) -> None:
    """Write a figure in one of FORMATS; equal figures give byte-identical files."""
    figure.savefig(path, format=kind, **FORMATS[kind])
    if kind == "svg":
        path.write_text(name_clips(path.read_text()))


def name_clips(svg: str) -> str:
    """Name each clip rectangle of an SVG by its written position.

    matplotlib hashes the exact position, whose last digits differ between processes.
    """
    for name, rectangle in CLIP.findall(svg):
        svg = svg.replace(name, "p" + hashlib.sha256(rectangle.encode()).hexdigest()[:10])
    return svg


def choice_of(run: Run, component: str) -> Choice:
    """Mode and size of a component that this run compresses."""
    return parse_choice(component, getattr(run.place, component), run.place.ratio)


def shown(size: Decimal | int | Target) -> str:
    """The share that is removed, the rank that is kept, or what the model had to meet."""
    if isinstance(size, Target):
        return str(size)
    return f"rank {size}" if isinstance(size, int) else f"{100 * float(size):g}%"


def distinct_rows(found: list[tuple[Run, np.ndarray]], component: str) -> list[Row]:
    """Rows of a heat map, each distinct row once.

    The label is the component's mode and size; the whole method is added only if rows would
    otherwise have the same label.
    """
    several = len({run.place.calibration for run, _ in found}) > 1
    groups: dict[tuple[str, Decimal | int | Target], list[tuple[Run, np.ndarray]]] = {}
    for run, values in found:
        choice = choice_of(run, component)
        mode = choice.name + (f", {run.place.calibration}" if several else "")
        group = groups.setdefault((mode, choice.size), [])
        if not any(np.array_equal(values, other, equal_nan=True) for _, other in group):
            group.append((run, values))
    rows = []
    for (mode, size), group in groups.items():
        for run, values in group:
            note = f" in {legend_label(run.place.method)}" if len(group) > 1 else ""
            rows.append((mode + note, size, values))
    rows.sort(key=lambda row: (row[0], *in_order(row[1])))
    return [Row(f"{mode}  {shown(size)}", values) for mode, size, values in rows]


def in_order(size: Decimal | int | Target) -> tuple[bool, Decimal | int | str]:
    """Sorts sizes: numbers, then targets by their text."""
    return (True, str(size)) if isinstance(size, Target) else (False, size)


def name_model(figure: Figure, dense: Run) -> None:
    """The model's name above a figure."""
    figure.suptitle(dense.place.model, x=0.01, ha="left", fontsize=11)


def run_label(run: Run, several: bool) -> str:
    """Method and ratio of a run for a legend; with `several` calibrations also which one."""
    calibration = f", {run.place.calibration}" if several else ""
    return f"{legend_label(run.place.method)}{calibration}  {run.place.ratio}"


def shades(count: int) -> list[str]:
    """A shade for each of several runs, the largest model first; beyond the last all are black."""
    return [SHADES[min(i, len(SHADES) - 1)] for i in range(count)]


def colour_map(name: str) -> Colormap:
    """A colour map of matplotlib, with grey for missing values."""
    return matplotlib.colormaps[name].with_extremes(bad=ABSENT)


def colour_bar(figure: Figure, image: ScalarMappable, grid: np.ndarray, label: str) -> Colorbar:
    """A slim colour bar along all panels."""
    height = figure.get_figheight()
    bar = figure.colorbar(image, ax=grid, label=label, pad=0.015, aspect=height / 0.2)
    bar.outline.set_visible(False)
    return bar


def no_frame(axes: Axes) -> None:
    """No frame and no tick marks around a heat map."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def points(
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


def log_if_wide(axes: Axes, values: list[float], limit: float = math.inf) -> None:
    """Make the y axis logarithmic if the largest value is over five times the smallest.

    The axis ends at `limit` times the smallest value. NaN is ignored; if a value is 0 or less, the
    axis does not change.
    """
    values = [value for value in values if not math.isnan(value)]
    span = max(values) / min(values) if values and min(values) > 0 else 1.0
    if span > 5:
        axes.set_yscale("log")
        if span > limit:
            axes.set_ylim(min(values) / 1.2, limit * min(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7), numticks=99))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
