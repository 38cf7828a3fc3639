"""Stage approx: makes a checkpoint with smaller tensors from weights and Rxx.

Layers are solved independently, except for values computed from the statistics of all layers. So
several jobs can each make a shard of the checkpoint, a range of consecutive layers.
a3.stages.approx.assemble joins the shards to a folder.
"""

from pathlib import Path
from typing import Any

from a3.artifacts.eliminations import Eliminations
from a3.artifacts.targets import APPROXIMATED
from a3.core.devices import require_device
from a3.core.files import whole_folder
from a3.core.progress import Bar
from a3.core.provenance import provenance
from a3.core.shards import share
from a3.models.arch import load_arch
from a3.models.checkpoint import Checkpoint
from a3.models.load import load_tokenizer, tensors_of_model
from a3.models.packing import outside, staying
from a3.models.tokenizer import has_tokenizer
from a3.solutions.modes import ALLOCATED, COMPONENTS, DENSE
from a3.solutions.plan import Plan
from a3.stages.approx.allocation import read_allocation
from a3.stages.approx.assemble import assemble_written, file_numbers, in_products
from a3.stages.approx.explain import explain, read_explained
from a3.stages.approx.layers import AnyRanks, LayerSolver
from a3.stages.approx.shards import write_shard
from a3.stages.approx.statistics import made_from, read_statistics


def approximate(
    model_folder: Path,
    rxx_folder: Path,
    plan: Plan,
    out: Path,
    allocation: Path | None = None,
    **solving: Any,
) -> None:
    """Solve every layer and write the compressed Hugging Face folder `out` atomically.

    Reads `<kind>.safetensors` from `rxx_folder` for the kinds that the modes need, and the ranks of
    components with an allocated ratio from `allocation` (a3.stages.approx.allocate). `solving` are
    the last arguments of `solver_for`. Beside weights, config and tokenizer it writes approx.json
    (ranks, errors, sizes, provenance) and timing.json. Weights of more than 1 GiB are written in
    several files. Raises A3Error if a mode does not fit, the statistics are another model's or
    damaged, or weights are not finite.
    """
    write_checkpoint(solver_for(model_folder, rxx_folder, plan, allocation, **solving), plan, out)


def repack(model_folder: Path, out: Path) -> None:
    """Write the dense model as a compressed model with full ranks: the same function."""
    arch = load_arch(model_folder)
    checkpoint = Checkpoint(model_folder, arch.adapter.prefix)
    write_checkpoint(LayerSolver(arch, checkpoint, {}, {}, {}), Plan({}), out)


def write_checkpoint(solver: "LayerSolver", plan: Plan, out: Path) -> None:
    """Solve every layer and write the folder `out` atomically."""
    arch, dense = solver.arch, solver.checkpoint.folder
    if has_tokenizer(dense):
        # Raises before the long work if the folder could not be assembled later.
        load_tokenizer(dense)
    numbers = file_numbers(arch)
    with whole_folder(out, APPROXIMATED.seal, [solver.checkpoint.folder]) as folder:
        shards = [folder / f".{number}.safetensors" for number in numbers]
        for number, path in zip(numbers, shards, strict=True):
            solve_shard(solver, plan, number, path)
        assemble_written(dense, shards, folder)


def approximate_shard(
    model_folder: Path,
    rxx_folder: Path,
    plan: Plan,
    number: str,
    out: Path,
    allocation: Path | None = None,
    **solving: Any,
) -> None:
    """Solve a range of layers, "0of4" to "3of4", and write them to the file `out`.

    The file has all tensors of its layers, including unchanged ones; "0of1" also has those outside
    the layers. A JSON file beside it has their report. Raises A3Error as `approximate` does.
    """
    solver = solver_for(model_folder, rxx_folder, plan, allocation, **solving)
    solve_shard(solver, plan, number, out)


def solver_for(
    model_folder: Path,
    rxx_folder: Path,
    plan: Plan,
    allocation: Path | None,
    *,
    losses: list[Path] | None = None,
    device: str = "cpu",
) -> "LayerSolver":
    """The solver of a model's layers by a plan; raises A3Error as `approximate` does.

    `losses` are files of a3.stages.approx.losses, so that what they have is not computed again.
    Solutions are computed on `device`.
    """
    arch = plan.written(load_arch(model_folder))
    ranks: dict[str, AnyRanks] = dict(plan.ranks(arch))
    if plan.shared:
        ranks |= read_allocation(allocation, arch, plan)
    statistics = read_statistics(rxx_folder, plan.kinds(), model_folder, arch)
    dense = Checkpoint(model_folder, arch.adapter.prefix)
    modes = {component: choice.mode for component, choice in plan.choices.items()}
    require_device(device, "float64")
    known = Eliminations(losses or [], arch, statistics)
    solver = LayerSolver(
        arch, dense, statistics, modes, ranks, plan.inner, known=known, device=device
    )
    for component in modes:
        if modes[component] in ALLOCATED:
            solver.allocate(component)
    solver.explanation = read_explained(allocation if plan.shared else None)
    return solver


def solve_shard(solver: "LayerSolver", plan: Plan, number: str, out: Path) -> None:
    """Solve the layers of one shard and write it."""
    arch, dense = solver.arch, solver.checkpoint
    layers = share(arch.layers, number, "layers")
    known = tensors_of_model(dense.folder)
    tensors = outside(dense, arch, known) if len(layers) == arch.layers else {}
    reports, seconds = [], []
    for layer in Bar(layers, unit="layer", desc="approx"):
        solved, report, took = solver.solve(layer)
        whole = solved | staying(dense, arch, known, layer, solved)
        tensors |= in_products(whole, arch, layer, report)
        reports.append(explain(report, solver.explanation, layer))
        seconds.append(took)
    said = {
        "modes": {component: str(plan.choices.get(component, DENSE)) for component in COMPONENTS},
        "ranks": solver.ranks,
        "provenance": provenance(__name__, **made_from(dense.folder, arch, solver.statistics)),
    }
    write_shard(
        out,
        tensors,
        number=number,
        dtype=plan.stored,
        said=said,
        layers=reports,
        seconds=seconds,
    )
