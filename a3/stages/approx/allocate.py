"""Stage allocate: allocates one budget across layers and components by their predicted loss.

For each layer and rank, a mode that supports allocation predicts the model's second-order loss
(nats per token) from weights and Rxx alone: stage losses, which this stage repeats where it is not
given its files. The chosen ranks minimise the sum under the budget.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from a3.artifacts.eliminations import Eliminations, Unit, expert_of, units_of
from a3.core.devices import require_device
from a3.core.errors import A3Error
from a3.core.files import write_record
from a3.core.provenance import provenance
from a3.models.arch import load_arch
from a3.models.checkpoint import Checkpoint
from a3.models.shape import Arch
from a3.numerics.elimination import Elimination
from a3.solutions.modes import EXPERTS, ONE_SIZE, Choice, eliminating, find_mode
from a3.solutions.plan import Plan, least_rank
from a3.stages.approx.budget import (
    Curve,
    Place,
    at,
    cost,
    least_loss,
    least_loss_by_rank,
    together,
)
from a3.stages.approx.explain import explained
from a3.stages.approx.layers import LayerSolver
from a3.stages.approx.losses import eliminate_layers, is_eliminated
from a3.stages.approx.statistics import read_statistics

# The limited quantities, in the order of `cost`.
COSTS = ("parameters", "cached_numbers")


def allocate(
    model_folder: Path,
    rxx_folder: Path,
    plan: Plan,
    out: Path,
    *,
    uniform: tuple[str, ...] = (),
    losses: list[Path] | None = None,
    device: str = "cpu",
) -> None:
    """Write each layer's ranks of the components with an allocated ratio (`plan.shared`), and the
    seconds that it took beside them.

    The budget allows as many parameters and as much KV cache as with the same ratio everywhere.
    This also limits FLOPs, which come from weights and attention products. Where all heads get one
    size (`plan.one_size`), it is one of parameters alone, because heads that small would lose more
    than MLPs do. Ranks are multiples of `plan.step`; components in `uniform` get the same rank in
    all layers, and with EXPERTS in it, all experts of a layer the same. `losses` are the files that
    stage losses wrote. Raises A3Error if no mode is marked ~, a mode does not fit, statistics are
    missing or damaged, or losses are of something else.
    """
    start = time.perf_counter()
    if not plan.shared:
        raise A3Error("allocate: no mode is marked ~. Write e.g. --mlp obs~ --ratio 0.2.")
    arch = load_arch(model_folder)
    modes = {component: choice.mode for component, choice in plan.shared.items()}
    ranks = Plan({p: Choice(c.mode, c.size) for p, c in plan.shared.items()}).ranks(arch)
    plan.check_sharing(arch)
    require_shared(uniform, plan, arch)
    kinds = {kind for component in modes for kind in find_mode(component, modes[component]).kinds}
    statistics = read_statistics(rxx_folder, sorted(kinds), model_folder, arch)
    dense = Checkpoint(model_folder, arch.adapter.prefix)
    layers = range(arch.layers)
    eliminated = eliminating(modes)
    require_device(device, "float64")
    solver = LayerSolver(arch, dense, statistics, eliminated, ranks, device=device)
    found = eliminations_of(solver, losses)
    curves = [curve for layer in layers for curve in curves_of(arch, layer, found[layer], plan)]
    if modes.get("qk") in ONE_SIZE:
        curves.append(curve_of_model(arch, solver.of_model(modes["qk"]), plan))
    record = {
        "modes": {component: str(choice) for component, choice in plan.shared.items()},
        "uniform_ranks": ranks,
        "multiple": plan.multiple,
        "uniform": list(uniform),
        **solved(curves, uniform, plan.one_size, ranks, arch),
        "weights_sha256": arch.weights_sha256,
        "provenance": provenance(
            __name__, statistics={kind: rxx.summary for kind, rxx in statistics.items()}
        ),
    }
    write_record(out, record)
    write_record(out.with_suffix(".timing.json"), {"seconds": time.perf_counter() - start})


def eliminations_of(
    solver: LayerSolver, losses: list[Path] | None
) -> dict[int, dict[Unit, Elimination]]:
    """The eliminations of all layers, by unit: read from the files of stage losses, or computed."""
    arch, layers = solver.arch, range(solver.arch.layers)
    if not losses:
        return eliminate_layers(solver, layers)
    known = Eliminations(losses, arch, solver.statistics)
    return {
        layer: {
            unit: known.require(layer, unit)
            for one in solver.modes
            if is_eliminated(arch, one, layer)
            for unit in units_of(arch, one)
        }
        for layer in layers
    }


def solved(
    curves: list[Curve],
    uniform: tuple[str, ...],
    one_size: tuple[str, ...],
    uniform_ranks: dict[str, int],
    arch: Arch,
) -> dict[str, Any]:
    """The ranks with the lowest loss, by component and layer (of a mixture's MLP a list of its
    experts'), that cost no more than uniform ranks.

    Components in `uniform` get one rank each, those in `one_size` one for all, whatever the cache.
    Also returns the budget, its used part, the predicted losses of both, and why (`explained`).
    """
    even = [uniform_ranks[curve.components[0]] for curve in curves]
    budget = cost(curves, even)
    joined = together(curves, uniform, one_size)
    if one_size:
        budget = (budget[0], cost(joined, [int(curve.ranks[0]) for curve in joined])[1])
        which = next(i for i, curve in enumerate(joined) if curve.components[0] in one_size)
        chosen = least_loss_by_rank(joined, which, budget)
    else:
        chosen = least_loss(joined, budget)
    ranks: dict[str, dict[Place, int]] = {component: {} for component in uniform_ranks}
    for curve, rank in zip(joined, chosen, strict=True):
        for component in curve.components:
            ranks[component] |= dict.fromkeys(curve.places, rank)
    found = {component: by_layer(component, own, arch) for component, own in ranks.items()}
    return {
        "ranks": found,
        "budget": dict(zip(COSTS, budget, strict=True)),
        "spent": dict(zip(COSTS, cost(joined, chosen), strict=True)),
        "predicted_nll": sum(map(at, joined, chosen)),
        "predicted_nll_uniform": sum(map(at, curves, even)),
        "explained": explained(curves, found, even),
    }


def by_layer(component: str, ranks: dict[Place, int], arch: Arch) -> list[int] | list[list[int]]:
    """The ranks of a component, one a layer, or a list a layer of its experts'.

    Layers without a curve stay as they are.
    """
    full, layers = arch.full_rank(component), range(arch.layers)
    if any(expert is not None for _, expert in ranks):
        experts = range(arch.experts)
        return [[ranks.get((layer, expert), full) for expert in experts] for layer in layers]
    return [ranks.get((layer, None), full) for layer in layers]


def curves_of(
    arch: Arch, layer: int, found: dict[Unit, Elimination], plan: Plan
) -> Iterator[Curve]:
    """The loss of each shared unit of a layer by rank, from what its elimination found."""
    for unit, (_, losses, _) in found.items():
        component, place = unit.partition(".")[0], (layer, expert_of(unit))
        yield curve_of(arch, component, (place,), losses, plan.step(component))


def curve_of_model(arch: Arch, found: Elimination, plan: Plan) -> Curve:
    """The loss of QK by the one rank of all layers."""
    places = tuple((layer, None) for layer in range(arch.layers) if arch.drops_pairs(layer))
    return curve_of(arch, "qk", places, found.losses, plan.step("qk"))


def curve_of(
    arch: Arch, component: str, places: tuple[Place, ...], losses: Tensor, step: int
) -> Curve:
    """The loss of a component in some places by rank; `losses` as of an Elimination."""
    full, least = arch.full_rank(component), least_rank(arch, component)
    ranks = full - (2 if component == "qk" else 1) * torch.arange(len(losses))
    kept = ((ranks % step == 0) | (ranks == full)) & (ranks >= least)
    price = [len(places) * one for one in of_one_rank(arch, component)]
    return Curve((component,), places, ranks[kept], losses.cpu()[kept], *price)


def of_one_rank(arch: Arch, component: str) -> tuple[int, int]:
    """Parameters, and cached numbers per token, for one rank of a component in one layer, or of
    one expert.
    """
    if component == "mlp":
        inputs = 2 if arch.mlp == "3-layer" else 1
        return (inputs + 1) * arch.hidden_size + inputs * arch.mlp_bias, 0
    heads = arch.heads + arch.kv_heads
    # Each rank also has a norm gain per head, and an element of the biases of q, k and v.
    own = heads * bool(arch.qk_norm) if component == "qk" else 0
    biased = heads if component == "qk" else arch.kv_heads
    return heads * arch.hidden_size + own + biased * arch.qkv_bias, arch.kv_heads


def require_shared(uniform: tuple[str, ...], plan: Plan, arch: Arch) -> None:
    """Raise A3Error if what is to be uniform has no mode marked ~."""
    if EXPERTS in uniform and not arch.experts:
        raise A3Error(f"allocate: uniform {EXPERTS}: {arch.family} has no experts. Remove it.")
    needed = dict.fromkeys("mlp" if one == EXPERTS else one for one in uniform)
    if others := [component for component in needed if component not in plan.shared]:
        raise A3Error(
            f"allocate: uniform {', '.join(others)}: has no mode marked ~. Remove it, or write "
            f"its mode with ~."
        )
