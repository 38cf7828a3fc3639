"""Commands that allocate ranks, and what they read: a3 losses, allocate and frontier."""

from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli.arguments import (
    TEXT,
    add,
    add_components,
    add_device,
    add_losses,
    add_model,
    add_modes,
    add_multiple,
    add_out,
    add_runtime,
    add_rxx,
    add_shard,
    add_target,
    add_text,
    add_threads,
    folder,
    with_target,
)
from a3.cli.options import share
from a3.solutions.modes import COMPONENTS, EXPERTS, choose


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    add_losses_command(commands)
    add_allocate(commands)
    add_frontier(commands)


def losses(model: Path, rxx: Path, out: Path, shard: str | None, device: str, **row: str) -> None:
    """Compute the losses by rank."""
    from a3.stages.approx.losses import losses

    losses(folder(model), rxx, row, out, shard=shard or "0of1", device=device)


def add_losses_command(commands: Any) -> None:
    """Arguments of a3 losses."""
    one = add(
        commands,
        "losses",
        losses,
        "compute the losses by rank of modes that eliminate",
        "Reads a model and its statistics, and writes for each layer in which order fisher, joint "
        "and obs drop RoPE pairs, value directions and MLP channels, and the predicted loss at "
        "each rank. The file serves a3 allocate and a3 approx at every ratio.",
        "a3 losses dense --rxx rxx --preset a3-plus -o losses.safetensors",
    )
    add_model(one)
    add_rxx(one)
    add_components(one)
    add_shard(one)
    add_device(one)
    add_out(one, targets.LOSSES, "FILE", ".safetensors file to write")
    add_threads(one)


def allocate(
    model: Path,
    rxx: Path,
    out: Path,
    multiple: int,
    runtime: str | None,
    uniform: list[str],
    losses: list[Path],
    device: str,
    text: Path | None,
    **row: str,
) -> None:
    """Allocate ranks across layers and components."""
    from a3.solutions.plan import Plan

    plan = Plan(choose(row), multiple=multiple, runtime=runtime)
    options: dict[str, Any] = {"losses": losses, "device": device, "uniform": tuple(uniform)}
    if runtime is not None:
        from a3.runnable import check_runtime, say_whole

        check_runtime(plan, folder(model))
        say_whole(plan, folder(model))
    if plan.target is None:
        from a3.stages.approx.allocate import allocate

        allocate(folder(model), rxx, plan, out, **options)
    else:
        from a3.promise import allocate_within

        allocate_within(folder(model), rxx, plan, text, out, **options)


def add_allocate(commands: Any) -> None:
    """Arguments of a3 allocate."""
    one = add(
        commands,
        "allocate",
        allocate,
        "allocate ranks across layers for modes marked ~",
        "Reads a model and its statistics, and writes the rank of each component in each layer, "
        "which a3 approx --allocation reads. The ratio is that of all of them together.",
        "a3 allocate dense --rxx rxx --preset a3-plus --ratio 0.2 -o ranks.json",
    )
    add_model(one)
    add_rxx(one)
    add_modes(one)
    add_target(one)
    text_ = f"{TEXT}: the calibration's, on what is left of which --max-loss is measured"
    one.add_argument("--text", type=Path, metavar="TEXT", help=text_)
    add_multiple(one)
    add_runtime(one)
    text_ = (
        "components that get the same rank in all layers; experts: all experts of a layer get the "
        "same, and layers differ"
    )
    one.add_argument("--uniform", nargs="+", choices=(*COMPONENTS, EXPERTS), default=[], help=text_)
    add_losses(one)
    add_device(one)
    add_out(one, targets.ALLOCATION, "FILE", "JSON file to write the ranks to")
    add_threads(one)
    one.set_defaults(command=lambda **options: allocate(**with_target(options)))


def frontier(
    model: Path,
    rxx: Path,
    text: Path,
    out: Path,
    losses: list[Path],
    device: str,
    check: list[float],
    html: Path | None,
    **row: str,
) -> None:
    """Predict the loss at every size."""
    from a3.core.files import read_record
    from a3.frontier import frontier, table
    from a3.solutions.plan import Plan

    if html is not None:
        targets.check(targets.PLAIN, {"model": model, "rxx": rxx, "text": text, "out": html})
    plan = Plan(choose(row | {"ratio": "0"}))
    frontier(folder(model), rxx, plan, text, out, losses=losses, device=device, check=check)
    print(table(read_record(out)))
    if html is not None:
        # A page is no part of a frontier, whose rule does not ask for one.
        from a3.report.frontiers import frontier_page

        frontier_page(out, str(model), str(text), html)


def add_frontier(commands: Any) -> None:
    """Arguments of a3 frontier."""
    one = add(
        commands,
        "frontier",
        frontier,
        "predict what a model loses at every size, before it is compressed",
        "Reads a model and its statistics, allocates ranks for ratios up to 0.6, measures the loss "
        "at three of them on what the calibration left of its text, and corrects the predictions "
        "by these. Prints a table and writes ranks and losses of every layer (JSON), which "
        "a3 figures and a3 report draw; with --html, also a page with a slider for the ratio.",
        "a3 frontier dense --rxx rxx --text docs.jsonl --html frontier.html -o frontier.json",
    )
    add_model(one)
    add_rxx(one)
    add_text(one)
    add_components(one, "a3-plus")
    text_ = "ratios at which the loss is measured too, to check the corrected one"
    one.add_argument("--check", type=share, nargs="+", default=[], metavar="RATIO", help=text_)
    add_losses(one)
    add_device(one)
    text_ = "new .html file that shows it, to read offline"
    one.add_argument("--html", type=Path, metavar="FILE", help=text_)
    add_out(one, targets.FRONTIER, "FILE", "JSON file to write")
    add_threads(one)
