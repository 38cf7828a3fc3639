"""The figure of a set of texts: what each method loses on each text."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from a3.artifacts.runs import Run
from a3.report.figures.drawing import COLOURS, GREY, MARKERS, Drawing, log_if_wide, name_model
from a3.report.labels import legend_label, legend_title
from a3.report.tables.paired import differences, losses_apart

# Width that the points of one text take, of the distance between two texts.
SPREAD = 0.5


def set_drawing(dense: Run, runs: Sequence[Run], entry: str) -> Drawing:
    """One panel a ratio, one column a text, one point a row: its loss less the dense model's."""
    panels: dict[str, list[Run]] = {}
    for run in runs:
        if run.place.nominal is not None:
            panels.setdefault(run.place.ratio, []).append(run)
    methods = list(dict.fromkeys(run.place.method for found in panels.values() for run in found))
    legend = 0.6 + 0.22 * len(methods)
    figure = Figure(figsize=(9, 2.6 * len(panels) + legend), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    names = [text.removeprefix(f"{entry}.") for text in dense.texts_of(entry)]
    for axes, ratio in zip(grid, sorted(panels, key=float), strict=True):
        points_on(axes, dense, panels[ratio], entry, methods)
        axes.set_title(f"ratio {ratio}")
        axes.set_ylabel("Δ nll (nats a token)")
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    grid[-1].set_xticks(range(len(names) + 1), [*names, "mean"])
    handles = dict(
        pair
        for axes in grid
        for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True)
    )
    figure.legend(
        [handles[method] for method in methods],
        [legend_label(method) for method in methods],
        loc="outside lower left",
        title=legend_title(methods),
        alignment="left",
    )
    name_model(figure, dense)
    caption = (
        f"{dense.place.model}: loss on each text of {entry} less the dense model's, and the mean "
        "over texts, by ratio (lower is better). Each point is a row; those of one method differ "
        "in their calibration. Bars are one standard error of the paired difference over blocks."
    )
    return Drawing(f"{entry}-{dense.place.model}", caption, figure)


def points_on(
    axes: Axes, dense: Run, runs: Sequence[Run], entry: str, methods: Sequence[str]
) -> None:
    """Draw the rows of one ratio: the texts at 0, 1 …, then the mean."""
    texts = dense.texts_of(entry)
    axes.axvline(len(texts) - 0.5, color=GREY, linewidth=0.8)
    values: list[float] = []
    for run in runs:
        index = methods.index(run.place.method)
        shift = SPREAD * ((index + 0.5) / len(methods) - 0.5)
        found = [
            differences(dense.texts[text]["block_nll"], run.texts[text]["block_nll"])
            for text in texts
        ]
        found.append(losses_apart(dense, run, entry))
        axes.errorbar(
            [place + shift for place in range(len(found))],
            [each["delta"] for each in found],
            yerr=[each["delta_stderr"] for each in found],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="none",
            markersize=4,
            elinewidth=0.8,
            label=run.place.method,
        )
        values += [each["delta"] for each in found]
    log_if_wide(axes, values)
