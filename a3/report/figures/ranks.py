"""Figure of the ranks that layers got where one budget was allocated across them."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from a3.artifacts.runs import Run
from a3.report.figures.drawing import Drawing, name_model, run_label, shades
from a3.solutions.modes import COMPONENTS, SHARED


def ranks_drawing(dense: Run, runs: Sequence[Run]) -> Drawing | None:
    """What each layer keeps of each component, a line a run; None if no run was allocated."""
    shared = [
        run
        for run in runs
        if any(SHARED in getattr(run.place, component) for component in COMPONENTS)
    ]
    if not shared:
        return None
    several = len({run.place.calibration for run in shared}) > 1
    shared.sort(key=lambda run: -run.size["parameters"])
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    grid = figure.subplots(len(COMPONENTS), 1, sharex=True, sharey=True)
    name_model(figure, dense)
    for axes, component in zip(grid, COMPONENTS, strict=True):
        for run, shade in zip(shared, shades(len(shared)), strict=True):
            values = kept(run, component)
            axes.step(
                range(len(values)), values, where="mid", color=shade, label=run_label(run, several)
            )
        axes.set_title(component.upper())
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#e0e0e0")
    grid[1].set_ylabel("share of the size that is kept")
    grid[-1].set_xlabel("layer")
    grid[0].legend(loc="upper left", bbox_to_anchor=(1, 1), title="method and ratio")
    caption = (
        f"{dense.place.model}: the head sizes of QK and OV and the intermediate size that each "
        "layer keeps, if one budget of parameters and KV cache is allocated across layers and "
        "components."
    )
    return Drawing(f"ranks-{dense.place.model}", caption, figure)


def kept(run: Run, component: str) -> list[float]:
    """The share of a component's size that each layer keeps."""
    full = run.weights["base"]["intermediate_size" if component == "mlp" else "head_dim"]
    return [layer.get(component, {}).get("rank", full) / full for layer in run.layers]
