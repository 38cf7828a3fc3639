"""The figure of a table with quantised rows: quality against bits a weight."""

from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from a3.artifacts.runs import Run
from a3.report.figures.drawing import COLOURS, DASHES, GREY, MARKERS, Drawing, log_if_wide
from a3.report.labels import legend_label
from a3.solutions.recipes import parse_quantisation

Measure = Callable[[Run], tuple[float, float | None]]


def bits_drawing(dense: Run, runs: list[Run], panels: Mapping[str, Measure]) -> Drawing:
    """One panel for each entry of `panels`: y label → a run's value and its standard error."""
    curves = curves_of(runs)
    legend = 0.6 + 0.22 * -(-(len(curves) + 1) // 2)
    figure = Figure(figsize=(9, 3.6 * len(panels) + legend), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, measure) in zip(grid, panels.items(), strict=True):
        axes.axhline(measure(dense)[0], color=GREY, linestyle="--", linewidth=1.2, label="dense")
        for index, (label, curve) in enumerate(curves.items()):
            values, errors = zip(*map(measure, curve), strict=True)
            colour = COLOURS[index % len(COLOURS)]
            axes.errorbar(
                [run.bits_per_weight(dense) for run in curve],
                values,
                yerr=[error or 0.0 for error in errors],
                color=colour,
                # Hollow markers for a colour's second curve: it may be a single point, where the
                # line style does not show.
                markerfacecolor=colour if index < len(COLOURS) else "white",
                marker=MARKERS[index % len(MARKERS)],
                linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
                label=label,
                linewidth=1.4,
                elinewidth=0.8,
                markersize=5,
                capsize=2,
            )
        axes.set_ylabel(name)
        axes.set_xscale("log", base=2)
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.xaxis.set_major_formatter("{x:g}")
    log_if_wide(grid[0], values_of(grid[0]))
    grid[0].set_title(dense.place.model)
    grid[-1].set_xlabel("bits for each weight of the dense model's layers, all counted (log scale)")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, handlelength=2.6)
    caption = (
        f"{dense.place.model}: quality against bits per weight. The bits of the layers' matrices, "
        "including exponents, scales and low-rank products, are divided by the number of weights "
        "of these matrices in the dense model. Each curve is one method at several ranks or "
        "ratios; the dashed line is the dense model. Bars are one standard error; the errors of "
        "the curves are correlated."
    )
    return Drawing(f"bits-{dense.place.model}", caption, figure)


def values_of(axes: Axes) -> list[float]:
    """All y values that are drawn."""
    return [value for line in axes.get_lines() for value in line.get_ydata()]


def curves_of(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs of one method, sorted by size: over ranks if the model is whole, else over ratios."""
    curves: dict[str, list[Run]] = {}
    for run in runs:
        place, said_of = run.place, []
        if not place.is_whole:
            said_of.append(legend_label(place.modes))
        if place.is_quantised:
            said = parse_quantisation(place.quantise)
            rank = "" if place.is_whole or not said.rank else f"@{said.rank}"
            said_of.append(f"{said.recipe} {said.method}{rank}")
        curves.setdefault(", ".join(said_of), []).append(run)
    return {
        label: sorted(curve, key=lambda run: run.size["parameters"])
        for label, curve in curves.items()
    }
