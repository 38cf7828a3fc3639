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

from a3.artifacts.eliminations import Eliminations
from a3.core.devices import require_device
from a3.core.errors import A3Error
from a3.core.files import write_record
from a3.core.provenance import provenance
from a3.models.arch import Arch, load_arch
from a3.models.checkpoint import Checkpoint
from a3.numerics.elimination import Elimination
from a3.solutions.modes import ONE_SIZE, Choice, eliminating, find_mode
from a3.solutions.plan import Plan, least_rank
from a3.stages.approx.budget import (
    Curve,
    at,
    cost,
    least_loss,
    least_loss_by_rank,
    together,
)
from a3.stages.approx.layers import LayerSolver
from a3.stages.approx.losses import eliminate_layers
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
    all layers. `losses` are the files that stage losses wrote. Raises A3Error if no mode is marked
    ~, a mode does not fit, statistics are missing or damaged, or losses are of something else.
    """
    start = time.perf_counter()
    if not plan.shared:
        raise A3Error("allocate: no mode is marked ~. Write e.g. --mlp obs~ --ratio 0.2.")
    arch = load_arch(model_folder)
    modes = {component: choice.mode for component, choice in plan.shared.items()}
    ranks = Plan({p: Choice(c.mode, c.size) for p, c in plan.shared.items()}).ranks(arch)
    plan.check_sharing(arch)
    require_shared(uniform, plan)
    kinds = {kind for component in modes for kind in find_mode(component, modes[component]).kinds}
    statistics = read_statistics(rxx_folder, sorted(kinds), model_folder, arch)
    dense = Checkpoint(model_folder, arch.adapter.prefix)
    layers = range(arch.layers)
    eliminated = eliminating(modes)
    require_device(device, "float64")
    solver = LayerSolver(arch, dense, statistics, eliminated, ranks, device=device)
    if losses:
        known = Eliminations(losses, arch, statistics)
        found = {layer: {one: known.require(layer, one) for one in eliminated} for layer in layers}
    else:
        found = eliminate_layers(solver, layers)
    curves = [curve for layer in layers for curve in curves_of(arch, layer, found[layer], plan)]
    if modes.get("qk") in ONE_SIZE:
        curves.append(curve_of_model(arch, solver.of_model(modes["qk"]), plan))
    record = {
        "modes": {component: str(choice) for component, choice in plan.shared.items()},
        "uniform_ranks": ranks,
        "multiple": plan.multiple,
        "uniform": list(uniform),
        **solved(curves, uniform, plan.one_size, ranks, arch.layers),
        "weights_sha256": arch.weights_sha256,
        "provenance": provenance(
            __name__, statistics={kind: rxx.summary for kind, rxx in statistics.items()}
        ),
    }
    write_record(out, record)
    write_record(out.with_suffix(".timing.json"), {"seconds": time.perf_counter() - start})


def solved(
    curves: list[Curve],
    uniform: tuple[str, ...],
    one_size: tuple[str, ...],
    uniform_ranks: dict[str, int],
    layers: int,
) -> dict[str, Any]:
    """The ranks with the lowest loss, by component and layer, that cost no more than uniform ranks.

    Components in `uniform` get one rank each, those in `one_size` one for all, whatever the cache.
    Also returns the budget, its used part, and the predicted losses of both.
    """
    even = [uniform_ranks[curve.components[0]] for curve in curves]
    budget = cost(curves, even)
    groups = [(component,) for component in uniform if component not in one_size]
    joined = together(curves, [*groups, *([one_size] if one_size else [])])
    if one_size:
        # The joined curve is the last one.
        budget = (budget[0], cost(joined, [int(curve.ranks[0]) for curve in joined])[1])
        chosen = least_loss_by_rank(joined, len(joined) - 1, budget)
    else:
        chosen = least_loss(joined, budget)
    ranks = {component: [0] * layers for component in uniform_ranks}
    for curve, rank in zip(joined, chosen, strict=True):
        for component in curve.components:
            ranks[component][curve.layers.start : curve.layers.stop] = [rank] * len(curve.layers)
    return {
        "ranks": ranks,
        "budget": dict(zip(COSTS, budget, strict=True)),
        "spent": dict(zip(COSTS, cost(joined, chosen), strict=True)),
        "predicted_nll": sum(map(at, joined, chosen)),
        "predicted_nll_uniform": sum(map(at, curves, even)),
    }


def curves_of(arch: Arch, layer: int, found: dict[str, Elimination], plan: Plan) -> Iterator[Curve]:
    """The loss of each shared component of a layer by rank, from what its elimination found."""
    for component, (_, losses, _) in found.items():
        yield curve_of(arch, component, range(layer, layer + 1), losses, plan.step(component))


def curve_of_model(arch: Arch, found: Elimination, plan: Plan) -> Curve:
    """The loss of QK by the one rank of all layers."""
    return curve_of(arch, "qk", range(arch.layers), found.losses, plan.step("qk"))


def curve_of(arch: Arch, component: str, layers: range, losses: Tensor, step: int) -> Curve:
    """The loss of a component of some layers by rank; `losses` as of an Elimination."""
    full, least = arch.full_rank(component), least_rank(arch, component)
    ranks = full - (2 if component == "qk" else 1) * torch.arange(len(losses))
    kept = ((ranks % step == 0) | (ranks == full)) & (ranks >= least)
    price = [len(layers) * one for one in of_one_rank(arch, component)]
    return Curve((component,), layers, ranks[kept], losses.cpu()[kept], *price)


def of_one_rank(arch: Arch, component: str) -> tuple[int, int]:
    """Parameters, and cached numbers per token, for one rank of a component in one layer."""
    if component == "mlp":
        inputs = 2 if arch.mlp == "3-layer" else 1
        return (inputs + 1) * arch.hidden_size + inputs * arch.mlp_bias, 0
    heads = arch.heads + arch.kv_heads
    # Each rank also has a norm gain per head, and an element of the biases of q, k and v.
    own = heads * bool(arch.qk_norm) if component == "qk" else 0
    biased = heads if component == "qk" else arch.kv_heads
    return heads * arch.hidden_size + own + biased * arch.qkv_bias, arch.kv_heads


def require_shared(uniform: tuple[str, ...], plan: Plan) -> None:
    """Raise A3Error if a component that is to be uniform has no mode marked ~."""
    if others := [component for component in uniform if component not in plan.shared]:
        raise A3Error(
            f"allocate: uniform {', '.join(others)}: has no mode marked ~. Remove it, or write "
            f"its mode with ~."
        )
