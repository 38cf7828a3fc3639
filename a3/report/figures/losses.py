"""Figure of allocated runs: where the predicted loss sits, and what the next rank would cost."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from a3.artifacts.runs import Run
from a3.report.figures.drawing import GREY, Drawing, name_model, run_label, shades
from a3.report.where import Part, Values, ceiling, parts_of, span, total


def losses_drawing(dense: Run, runs: Sequence[Run]) -> Drawing | None:
    """Two panels a component, a colour a run; None if no run's record has predictions."""
    allocated = [
        run
        for run in runs
        if any("predicted" in said for layer in run.layers for said in layer.values())
    ]
    shown = [(run, parts_of(run.weights.data)) for run in allocated]
    if not shown:
        return None
    shown.sort(key=lambda pair: -pair[0].size["parameters"])
    several = len({run.place.calibration for run, _ in shown}) > 1
    every = [part for _, parts in shown for part in parts if part.is_predicted]
    names = list(dict.fromkeys(part.component for part in every))
    figure = Figure(figsize=(10, 1.2 + 2.1 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), 2, sharex=True, sharey="col", squeeze=False)
    name_model(figure, dense)
    for (run, parts), shade in zip(shown, shades(len(shown)), strict=True):
        label = run_label(run, several)
        for part in (part for part in parts if part.is_predicted):
            left, right = grid[names.index(part.component)]
            step(left, part.loss_even, color=shade, linestyle=":", linewidth=1.2)
            step(left, part.loss, color=shade, linewidth=1.8, label=label)
            marginal(right, part, shade)
    for row, name in zip(grid, names, strict=True):
        row[0].set_title(f"{name.upper()}: predicted loss")
        row[1].set_title(f"{name.upper()}: what the next rank costs")
    finish(figure, grid[:, 0], grid[:, 1], every)
    legend(figure, grid[0, 0], any(total(part.loss_even) for part in every))
    caption = (
        f"{dense.place.model}: left, the loss that the allocation predicts for each layer, in nats "
        "a token: dotted if every layer gave up the same share, solid as allocated; lines that "
        "leave the panel are cut off. Right, from what one rank more would save to what one rank "
        "less would cost, in nats a token for each million parameters: the allocation stops where "
        "this is about the same in every layer. Triangles are layers that are left whole, because "
        "already their first rank costs so much. Ranks of QK and OV also cost KV cache."
    )
    return Drawing(f"losses-{dense.place.model}", caption, figure)


def step(axes: Axes, values: Values, **look: object) -> None:
    """One value a layer as a step line, with gaps where there is none."""
    heights = [float("nan") if value is None else value for value in values]
    axes.step(range(len(heights)), heights, where="mid", **look)


def marginal(axes: Axes, part: Part, shade: str) -> None:
    """A line a layer from what more saves to what less costs; a triangle at an open end."""
    for layer, (more, less) in enumerate(zip(part.more_saves, part.less_costs, strict=True)):
        if more is not None and less is not None and more > 0 and less > 0:
            axes.plot([layer, layer], [more, less], color=shade, linewidth=2.6)
            axes.plot(layer, (more * less) ** 0.5, ".", color=shade, markersize=4)
        elif less is not None and less > 0:
            axes.plot(layer, less, "^", color=shade, markersize=4, fillstyle="none")
        elif more is not None and more > 0:
            axes.plot(layer, more, "v", color=shade, markersize=4, fillstyle="none")


def finish(
    figure: Figure, left: Sequence[Axes], right: Sequence[Axes], parts: Sequence[Part]
) -> None:
    """Scales and labels of both columns."""
    top = ceiling([part.loss for part in parts] + [part.loss_even for part in parts])
    for axes in left:
        axes.set_ylim(0, 1.05 * top or None)
        axes.grid(axis="y", color="#e0e0e0")
    for axes in right:
        if span(parts) is not None:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=99))
            axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(axis="y", color="#e0e0e0")
    for column in (left, right):
        column[-1].set_xlabel("layer")
        column[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    left[len(left) // 2].set_ylabel("nats a token")
    right[len(right) // 2].set_ylabel("nats a token for 10⁶ parameters")


def legend(figure: Figure, axes: Axes, even: bool) -> None:
    """The runs, and what dotted lines are, if there are any."""
    handles, labels = axes.get_legend_handles_labels()
    if even:
        handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.2))
        labels.append("the same ratio everywhere")
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=2,
        alignment="left",
        title="method and ratio",
    )
