"""The figure of a model's spectra on one calibration."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from a3.artifacts.runs import Run
from a3.core.errors import A3Error
from a3.core.records import Record
from a3.report.figures.drawing import Drawing, colour_bar, colour_map, no_frame
from a3.solutions.modes import COMPONENTS

# Smaller values of lost energy are drawn as this value.
LEAST = 1e-4

PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def spectra_drawing(dense: Run, path: Path) -> Drawing:
    """Lost energy by layer and kept rank: maps above, one curve per layer below.

    Raises A3Error if `path` was made of other weights than the dense model's.
    """
    record = _record(dense, path)
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    maps, curves = figure.subplots(2, len(COMPONENTS), squeeze=False, height_ratios=(1.2, 1))
    model, calibration = dense.place.model, path.stem
    figure.suptitle(f"{model}, {calibration}", x=0.01, ha="left", fontsize=11)
    for component, above, below in zip(COMPONENTS, maps, curves, strict=True):
        # The last rank is the full one, where nothing is lost.
        ranks, full = record["ranks"][component][:-1], record["full"][component]
        lost = np.stack([_mean(layer, len(ranks)) for layer in record["lost"][component]])
        shares = np.array(ranks) / full
        image = _map(above, shares, lost)
        depth = _curves(below, shares, lost)
        above.set_title(f"{component.upper()}, of {full}")
        for axes in (above, below):
            axes.set_xlim(0, 1)
            axes.set_xticks((0, 0.25, 0.5, 0.75, 1))
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    maps[0].set_ylabel("layer")
    curves[0].set_ylabel("energy lost")
    bar = colour_bar(figure, image, maps, "energy lost")
    bar.formatter = PLAIN
    bar.minorticks_off()
    layers = ScalarMappable(Normalize(-0.5, len(lost) - 0.5), ListedColormap(depth))
    bar = colour_bar(figure, layers, curves, "layer")
    bar.locator = MaxNLocator(6, integer=True)
    bar.minorticks_off()
    caption = (
        f"{model}, {calibration}: share of the energy (squared norm) that each layer loses at each "
        "kept rank, computed from the statistics alone. Energies are the squared singular values "
        "of the score matrix (QK; with RoPE the scores of the pairs) and of values times outputs "
        "(OV), and the scores of the channels (MLP), averaged over the groups of a layer. Values "
        f"below {LEAST:g} are drawn as {LEAST:g}. Data: spectra/{model}/{path.name}"
    )
    return Drawing(f"spectra-{model}-{calibration}", caption, figure)


def _record(dense: Run, path: Path) -> Record:
    """The spectra of a file; raises A3Error if they are of other weights than the dense run."""
    record = Record.read(path)
    found, expected = record["provenance.weights_sha256"], dense.weights["weights_sha256"]
    if found != expected:
        raise A3Error(
            f"{path}: made of weights whose hash is {found}, but {dense.weights.path} says "
            f"{expected}. Delete it and build it again."
        )
    return record


def _map(axes: Axes, shares: np.ndarray, lost: np.ndarray) -> AxesImage:
    """Lost energy (layers, ranks) as a map; `shares` (ranks) are of the full rank."""
    half = shares[0] / 2
    image = axes.imshow(
        lost.clip(LEAST),
        norm=LogNorm(LEAST, 1),
        cmap=colour_map("viridis_r"),
        aspect="auto",
        # Ranks are the multiples of the first but for their rounding.
        extent=(shares[0] - half, shares[-1] + half, len(lost) - 0.5, -0.5),
    )
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    no_frame(axes)
    return image


def _curves(axes: Axes, shares: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """The same as a curve a layer; returns the layers' colours."""
    depth = matplotlib.colormaps["plasma"](np.linspace(0, 0.9, len(lost)))
    for values, colour in zip(lost, depth, strict=True):
        axes.plot(shares, np.where(values > 0, values, np.nan), color=colour, linewidth=0.9)
    axes.set_yscale("log")
    axes.set_ylim(LEAST, 1)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PLAIN)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_xlabel("rank kept")
    return depth


def _mean(curves: list[list[float]], ranks: int) -> np.ndarray:
    """Mean over a layer's groups or experts at the first ranks (ranks); NaN where there is none."""
    return np.mean(curves, axis=0)[:ranks] if curves else np.full(ranks, np.nan)
