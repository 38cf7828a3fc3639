"""Stage allocate: share out one budget over layers and parts by what the model loses in each.

Each solution that can share says, for each rank of a layer, what the model loses to second order
(nats a token): from weights and Rxx alone. The ranks are those of the least sum under the budget.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from a3.errors import A3Error
from a3.files import sha256, write_record
from a3.models.arch import Arch, load_arch
from a3.models.checkpoint import Checkpoint
from a3.provenance import provenance
from a3.solutions import mlp, ov, qk
from a3.solutions.modes import SHARING, Choice, find_mode
from a3.stages.approximate import LayerSolver
from a3.stages.plan import Plan
from a3.statistics import Rxx

# No part of a layer keeps less than this share: a second-order loss says nothing so far away.
LEAST = 0.125
# Bisections of a multiplier, which goes by powers of two from the least to the largest slope.
HALVINGS = 60


@dataclass(frozen=True)
class Curve:
    """Ranks that a part of some layers may have, descending, and the loss (nats a token) at each.

    `parameters` and `cache` are what one rank costs: weights, and numbers cached a token.
    """

    part: str
    layers: range
    ranks: Tensor
    loss: Tensor
    parameters: int
    cache: int


def allocate(
    model_folder: Path,
    rxx_folder: Path,
    plan: Plan,
    out: Path,
    *,
    uniform: tuple[str, ...] = (),
) -> None:
    """Write the ranks of each layer of the parts that share out a ratio (`plan.shared`), and the
    seconds that it took beside them.

    The budget: no more parameters, and no more KV cache, than with that ratio everywhere; FLOPs,
    which are those of weights and attention products, follow. Ranks are multiples of
    `plan.multiple`, and of `uniform` parts the same in all layers. Raises A3Error where nothing is
    shared out, a mode does not fit, or statistics are missing or damaged.
    """
    start = time.perf_counter()
    if not plan.shared:
        raise A3Error("allocate: no part shares out its ratio. Write e.g. --mlp obs~ --ratio 0.2.")
    arch = load_arch(model_folder)
    uniformly = Plan({p: Choice(c.mode, c.size) for p, c in plan.shared.items()})
    ranks = uniformly.ranks(arch)
    require_room(arch, ranks, plan.multiple, uniform)
    statistics = read_statistics(model_folder, rxx_folder, arch, plan)
    solver = LayerSolver(
        arch,
        Checkpoint(model_folder, arch.adapter.prefix),
        statistics,
        {part: choice.mode for part, choice in plan.shared.items()},
        ranks,
    )
    curves = [
        curve
        for layer in tqdm(range(arch.layers), unit="layer", desc="losses by rank")
        for curve in curves_of(solver, layer, plan.multiple)
    ]
    curves = together(curves, uniform)
    budget = cost(curves, [ranks[curve.part] for curve in curves])
    chosen = least_loss(curves, budget)
    found = {part: [0] * arch.layers for part in ranks}
    for curve, rank in zip(curves, chosen, strict=True):
        for layer in curve.layers:
            found[curve.part][layer] = rank
    record = {
        "kind": "allocation",
        "modes": {part: str(choice) for part, choice in plan.shared.items()},
        "ranks": found,
        "uniform_ranks": ranks,
        "multiple": plan.multiple,
        "uniform": list(uniform),
        "budget": dict(zip(("parameters", "cached_numbers"), budget, strict=True)),
        "spent": dict(zip(("parameters", "cached_numbers"), cost(curves, chosen), strict=True)),
        "predicted_nll": sum(at(c, rank) for c, rank in zip(curves, chosen, strict=True)),
        "predicted_nll_uniform": sum(at(curve, ranks[curve.part]) for curve in curves),
        "weights_sha256": arch.weights_sha256,
        "provenance": provenance(
            __name__, statistics={kind: rxx.summary for kind, rxx in statistics.items()}
        ),
    }
    write_record(out, record)
    write_record(out.with_suffix(".timing.json"), {"seconds": time.perf_counter() - start})


def read_statistics(model_folder: Path, rxx_folder: Path, arch: Arch, plan: Plan) -> dict[str, Rxx]:
    """The statistics of the shared parts; raises A3Error as `Rxx` does."""
    config = sha256(model_folder / "config.json")
    model = {"weights_sha256": arch.weights_sha256, "config_sha256": config}
    kinds = {k for part, c in plan.shared.items() for k in find_mode(part, c.mode).kinds}
    return {kind: Rxx(rxx_folder / f"{kind}.safetensors", kind, **model) for kind in sorted(kinds)}


def curves_of(solver: LayerSolver, layer: int, multiple: int) -> Iterator[Curve]:
    """The loss of each shared part of a layer by rank."""
    arch = solver.arch
    attention = solver.weights(layer, of_mlp=False) if {"qk", "ov"} & solver.ranks.keys() else None
    for part in solver.ranks:
        name = solver.layer_mode(part, layer)
        if name != SHARING[part]:
            raise A3Error(
                f"layer {layer} has no RoPE, and {name} does not say what the model loses. Give "
                f"{part} a ratio of its own."
            )
        rxx = [solver.rxx(kind, layer) for kind in find_mode(part, name).kinds]
        full, least = arch.full_rank(part), least_rank(arch, part)
        if part == "qk":
            pairs = arch.rope_dims // 2
            _, loss = qk.fisher_losses(attention, rxx[-1], least // 2)
            # The dimensions that are not rotated stay as long as there are pairs to drop.
            ranks = full - 2 * torch.arange(len(loss))
            require_whole(arch, pairs)
        elif part == "ov":
            _, loss = ov.joint_losses(attention, *rxx, least)
            ranks = full - torch.arange(len(loss))
        else:
            _, loss = mlp.obs_losses(solver.weights(layer, of_mlp=True), *rxx, least)
            ranks = full - torch.arange(len(loss))
        kept = (ranks % multiple == 0) | (ranks == full)
        layers = range(layer, layer + 1)
        yield Curve(part, layers, ranks[kept], loss[kept], *of_one_rank(arch, part))


def least_rank(arch: Arch, part: str) -> int:
    """The least rank that a layer may get."""
    least = max(1, int(LEAST * arch.full_rank(part)))
    return 2 * max(1, least // 2) if part == "qk" else least


def of_one_rank(arch: Arch, part: str) -> tuple[int, int]:
    """Parameters, and numbers cached a token, of one rank of a part in one layer."""
    if part == "mlp":
        inputs = 2 if arch.mlp == "3-layer" else 1
        return (inputs + 1) * arch.hidden_size + inputs * arch.mlp_bias, 0
    heads = arch.heads + arch.kv_heads
    # Gains of norms are one a head; biases of queries, keys and values have their dimensions.
    own = heads * bool(arch.qk_norm) if part == "qk" else 0
    biased = heads if part == "qk" else arch.kv_heads
    return heads * arch.hidden_size + own + biased * arch.qkv_bias, arch.kv_heads


def require_room(
    arch: Arch, ranks: dict[str, int], multiple: int, uniform: tuple[str, ...]
) -> None:
    """Raise A3Error where the same ranks for all layers are none that a layer may get."""
    if others := [part for part in uniform if part not in ranks]:
        raise A3Error(
            f"allocate: uniform {', '.join(others)}: shares out nothing. Leave it out, or write "
            f"its mode with ~."
        )
    for part, rank in ranks.items():
        step = math.lcm(multiple, 2) if part == "qk" else multiple
        least = -(-least_rank(arch, part) // step) * step
        if rank < min(least, arch.full_rank(part)):
            raise A3Error(
                f"allocate: this ratio leaves {part} rank {rank} of {arch.full_rank(part)}, and no "
                f"layer gets less than {least} (an eighth, and a multiple of {step}). Take a "
                "smaller ratio or multiple."
            )


def require_whole(arch: Arch, pairs: int) -> None:
    """Raise A3Error where only a part of a head is rotated: its curve would say too little."""
    if 2 * pairs != arch.head_dim:
        raise A3Error(
            f"qk: {arch.rope_dims} of {arch.head_dim} dimensions of a head are rotated, and ranks "
            "are shared out for whole RoPE only. Give qk a ratio of its own: --qk fisher@0.2."
        )


def at(curve: Curve, rank: int) -> float:
    """The loss at the largest rank of the curve that is no larger than `rank`."""
    return curve.loss[(curve.ranks <= rank).nonzero()[0, 0]].item()


def together(curves: list[Curve], uniform: tuple[str, ...]) -> list[Curve]:
    """One curve in place of all layers' for each part in `uniform`."""
    joined = [curve for curve in curves if curve.part not in uniform]
    for part in uniform:
        own = [curve for curve in curves if curve.part == part]
        count = len(own)
        joined.append(
            Curve(
                part,
                range(count),
                own[0].ranks,
                torch.stack([curve.loss for curve in own]).sum(0),
                count * own[0].parameters,
                count * own[0].cache,
            )
        )
    return joined


def cost(curves: list[Curve], ranks: list[int]) -> tuple[int, int]:
    """Parameters and cached numbers of some ranks."""
    pairs = list(zip(curves, ranks, strict=True))
    return sum(c.parameters * rank for c, rank in pairs), sum(c.cache * rank for c, rank in pairs)


def least_loss(curves: list[Curve], budget: tuple[int, int]) -> list[int]:
    """The rank of each curve: of the least sum of losses within a budget of parameters and cache.

    By Lagrange multipliers: with a price on each parameter, and on each cached number, every curve
    chooses for itself; prices are the lowest that keep to the budget. What is then left of it goes
    where it gains most.
    """

    def choose(price: float, cache_price: float) -> list[int]:
        return [
            int(
                c.ranks[
                    (c.loss + (price * c.parameters + cache_price * c.cache) * c.ranks).argmin()
                ]
            )
            for c in curves
        ]

    def cheapest(cache_price: float) -> list[int]:
        return bisect(lambda price: choose(price, cache_price), curves, budget[0], which=0)

    ranks = bisect(cheapest, curves, budget[1], which=1)
    return fill(curves, ranks, budget)


def bisect(choose: Any, curves: list[Curve], limit: int, which: int) -> list[int]:
    """The ranks at the lowest price, 0 or a power of two, at which a cost is within its limit."""
    if cost(curves, ranks := choose(0.0))[which] <= limit:
        return ranks
    low, high = -80.0, 20.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if cost(curves, choose(2.0**middle))[which] <= limit:
            high = middle
        else:
            low = middle
    ranks = choose(2.0**high)
    if cost(curves, ranks)[which] > limit:
        raise A3Error(
            f"allocate: even with the least ranks, {LEAST:.1%} of each size, the budget is "
            "exceeded. Take a smaller ratio."
        )
    return ranks


def fill(curves: list[Curve], ranks: list[int], budget: tuple[int, int]) -> list[int]:
    """Raise ranks step by step, where a parameter gains most, as long as the budget allows."""
    ranks = list(ranks)
    while True:
        best, which = 0.0, None
        spent = cost(curves, ranks)
        for index, (curve, rank) in enumerate(zip(curves, ranks, strict=True)):
            place = int((curve.ranks == rank).nonzero()[0, 0])
            if place == 0:
                continue
            step = int(curve.ranks[place - 1]) - rank
            fits = (
                spent[0] + step * curve.parameters <= budget[0]
                and spent[1] + step * curve.cache <= budget[1]
            )
            gain = (curve.loss[place] - curve.loss[place - 1]).item() / (step * curve.parameters)
            if fits and gain > best:
                best, which = gain, (index, rank + step)
        if which is None:
            return ranks
        ranks[which[0]] = which[1]
