"""The losses of a model's components by rank, and the ranks that lose least within limits."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from a3.artifacts.eliminations import Eliminations, Unit, expert_of, units_of
from a3.core.devices import require_device
from a3.core.errors import A3Error
from a3.models.arch import load_arch
from a3.models.checkpoint import Checkpoint
from a3.models.shape import Arch
from a3.numerics.elimination import Elimination
from a3.solutions.modes import EXPERTS, ONE_SIZE, eliminating, find_mode
from a3.solutions.plan import Plan
from a3.solutions.taken import HEADS
from a3.stages.approx.budget import (
    Amounts,
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
from a3.stages.approx.limits import (
    CACHED,
    FLOPS,
    PARAMETERS,
    asked,
    costs_of,
    dense_amounts,
    folder_bytes,
)
from a3.stages.approx.losses import eliminate_layers, is_eliminated
from a3.stages.approx.statistics import read_statistics

# How finely the ratio is found at which a loss is predicted: so many halvings.
HALVINGS = 10


# Ranks, the full one first, and what one unit of a component has at each, by quantity.
Sizes: TypeAlias = tuple[Tensor, dict[str, Tensor]]


class Allocator:
    """Allocates ranks of one model by one plan, within any limits."""

    def __init__(
        self,
        model_folder: Path,
        rxx_folder: Path,
        plan: Plan,
        *,
        uniform: tuple[str, ...] = (),
        losses: list[Path] | None = None,
        device: str = "cpu",
        file_bytes: int | None = None,
    ) -> None:
        """Reads or computes the loss of each component of each layer by rank.

        `losses` are the files that stage losses wrote; components in `uniform` get the same rank in
        all layers, and with EXPERTS in it, all experts of a layer the same. `file_bytes` are those
        of the dense model's GGUF file, where the target is one. Raises A3Error if no mode is marked
        ~, a mode does not fit, statistics are missing or damaged, or losses are of something else.
        """
        if not plan.shared:
            raise A3Error("allocate: no mode is marked ~. Write e.g. --mlp obs~ --ratio 0.2.")
        self.arch = arch = plan.written(load_arch(model_folder))
        uniform = tuple(dict.fromkeys((*uniform, *plan.uniform)))
        self.plan, self.uniform = plan, uniform
        modes = {component: choice.mode for component, choice in plan.shared.items()}
        self.even = Plan(plan.shared).ranks(arch)
        plan.check_sharing(arch)
        require_shared(uniform, plan, arch)
        kinds = {kind for one in modes for kind in find_mode(one, modes[one]).kinds}
        self.statistics = read_statistics(rxx_folder, sorted(kinds), model_folder, arch)
        dense = Checkpoint(model_folder, arch.adapter.prefix)
        require_device(device, "float64")
        solver = LayerSolver(
            arch, dense, self.statistics, eliminating(modes), self.even, device=device
        )
        found, sizes = eliminations_of(solver, losses), sizes_of(arch, plan)
        curves = [one for layer in found for one in curves_of(layer, found[layer], sizes)]
        if modes.get("qk") in ONE_SIZE:
            curves.append(curve_of_model(arch, solver.of_model(modes["qk"]), sizes))
        self.curves, self.joined = curves, together(curves, uniform, plan.one_size)
        self.full = cost(curves, [arch.full_rank(curve.components[0]) for curve in curves])
        if file_bytes is None:
            file_bytes = folder_bytes(model_folder, arch, plan.stored)
        self.dense = dense_amounts(arch, file_bytes)

    def at_ratio(self, ratio: float | None = None) -> Amounts:
        """The limits of a ratio: as many parameters and as much KV cache as it leaves everywhere.

        Without one, those of the plan's, whose ranks are rounded. Where all heads get one size
        (`plan.one_size`), parameters alone are limited, because heads that small would lose more
        than MLPs do, and where heads have to stay whole, because no other component has a cache.
        """
        free = self.plan.one_size or {*self.plan.whole(self.arch)} & {*HEADS}
        limited = (PARAMETERS,) if free else (PARAMETERS, CACHED)
        if ratio is None:
            # Ranks of a ratio need not be among those that a curve may have.
            places = Counter(curve.components[0] for curve in self.curves for _ in curve.places)
            left = [
                {key: count * cost for key, cost in self.of_even(component).items()}
                for component, count in places.items()
            ]
            return {key: round(sum(one[key].item() for one in left)) for key in limited}
        return {key: (1 - ratio) * self.full[key] for key in limited}

    def of_even(self, component: str) -> dict[str, Tensor]:
        """What one unit of a component has at the rank that the ratio leaves everywhere."""
        return costs_of(self.arch, component, torch.tensor([self.even[component]]))

    def asked(self) -> Amounts:
        """The limits of the plan's target, to what its curves' components have."""
        if self.plan.target is None:
            return {}
        limits = asked(self.plan.target, self.dense)
        if FLOPS in limits:
            limits[FLOPS] -= self.arch.layers  # of each layer they are rounded to whole numbers
        return {
            key: min(allowed - self.dense[key] + self.full[key], self.full[key])
            for key, allowed in limits.items()
        }

    def least_loss(self, limits: Amounts) -> list[int]:
        """The rank of each curve of `joined` that together lose least within limits."""
        if self.plan.one_size:
            heads = self.plan.one_size
            which = next(i for i, one in enumerate(self.joined) if one.components[0] in heads)
            return least_loss_by_rank(self.joined, which, limits)
        return least_loss(self.joined, limits)

    def within_loss(self, most: float) -> list[int]:
        """The ranks of the largest ratio that is predicted to lose no more than `most`.

        Besides, they keep to the target's other limits; if these alone are predicted to lose more,
        their ranks.
        """
        chosen = self.least_loss(self.asked()) if self.asked() else self.whole()
        if self.predicted(chosen) > most:
            return chosen
        low, high = 0.0, self.largest_ratio
        for _ in range(HALVINGS):
            ratio = (low + high) / 2
            tried = self.least_loss(lower(self.at_ratio(ratio), self.asked()))
            if self.predicted(tried) <= most:
                low, chosen = ratio, tried
            else:
                high = ratio
        return chosen

    @property
    def largest_ratio(self) -> float:
        """The ratio that only the smallest ranks keep to."""
        least = cost(self.joined, [int(curve.ranks[-1]) for curve in self.joined])
        return 1 - max(least[key] / self.full[key] for key in self.at_ratio(0) if least[key])

    def whole(self) -> list[int]:
        """The ranks of the dense model."""
        return [int(curve.ranks[0]) for curve in self.joined]

    def predicted(self, chosen: list[int]) -> float:
        """The predicted loss of ranks of `joined`, in nats a token."""
        return sum(map(at, self.joined, chosen))

    def amounts(self, chosen: list[int]) -> Amounts:
        """What the whole model has of each quantity at ranks of `joined`."""
        own = cost(self.joined, chosen)
        return {key: self.dense[key] - self.full[key] + own[key] for key in own}

    def ranks(self, chosen: list[int]) -> dict[str, list[int] | list[list[int]]]:
        """The ranks by component and layer, of a mixture's MLP a list a layer of its experts'."""
        ranks: dict[str, dict[Place, int]] = {component: {} for component in self.even}
        for curve, rank in zip(self.joined, chosen, strict=True):
            for component in curve.components:
                ranks[component] |= dict.fromkeys(curve.places, rank)
        return {component: by_layer(component, own, self.arch) for component, own in ranks.items()}

    def evenly(self, chosen: list[int]) -> list[int]:
        """The rank of each of `curves` at the same ratio everywhere: the plan's, or, of a target,
        the one that has as many parameters as ranks of `joined`.
        """
        if self.plan.target is None:
            even = [self.even[curve.components[0]] for curve in self.curves]
        else:
            kept = cost(self.joined, chosen)[PARAMETERS] / self.full[PARAMETERS]
            even = [round(kept * int(curve.ranks[0])) for curve in self.curves]
        # No smaller rank may be allowed.
        least = [int(curve.ranks[-1]) for curve in self.curves]
        return list(map(max, least, even))

    def record(self, chosen: list[int], limits: Amounts) -> dict[str, Any]:
        """What a file of allocated ranks says of ranks of `joined`."""
        spent, even, ranks = cost(self.joined, chosen), self.evenly(chosen), self.ranks(chosen)
        return {
            "modes": {component: str(choice) for component, choice in self.plan.shared.items()},
            "uniform_ranks": self.even,
            "multiple": self.plan.multiple,
            "runtime": self.plan.runtime,
            "uniform": list(self.uniform),
            "ranks": ranks,
            "budget": limits,
            "spent": {key: spent[key] for key in {PARAMETERS: 0, CACHED: 0} | limits},
            "predicted_nll": self.predicted(chosen),
            "predicted_nll_uniform": sum(map(at, self.curves, even)),
            "explained": explained(self.curves, ranks, even),
            "weights_sha256": self.arch.weights_sha256,
        }


def lower(one: Amounts, other: Amounts) -> Amounts:
    """The lower of two limits of each quantity."""
    return {
        key: min(limits[key] for limits in (one, other) if key in limits) for key in one | other
    }


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


def by_layer(component: str, ranks: dict[Place, int], arch: Arch) -> list[int] | list[list[int]]:
    """The ranks of a component, one a layer, or a list a layer of its experts'.

    Layers without a curve stay as they are.
    """
    full, layers = arch.full_rank(component), range(arch.layers)
    if any(expert is not None for _, expert in ranks):
        experts = range(arch.experts)
        return [[ranks.get((layer, expert), full) for expert in experts] for layer in layers]
    return [ranks.get((layer, None), full) for layer in layers]


def sizes_of(arch: Arch, plan: Plan) -> dict[str, Sizes]:
    """Of each shared component the ranks that it may have, and what one unit has at each."""
    type_ = plan.target.gguf if plan.target else None
    ranks = {one: torch.tensor(plan.allowed(arch, one)) for one in plan.shared}
    return {one: (own, costs_of(arch, one, own, type_)) for one, own in ranks.items()}


def curves_of(
    layer: int, found: dict[Unit, Elimination], sizes: dict[str, Sizes]
) -> Iterator[Curve]:
    """The loss of each shared unit of a layer by rank, from what its elimination found."""
    for unit, (_, losses, _) in found.items():
        component = unit.partition(".")[0]
        yield curve_of(component, ((layer, expert_of(unit)),), losses, sizes)


def curve_of_model(arch: Arch, found: Elimination, sizes: dict[str, Sizes]) -> Curve:
    """The loss of QK by the one rank of all layers."""
    places = tuple((layer, None) for layer in range(arch.layers) if arch.drops_pairs(layer))
    return curve_of("qk", places, found.losses, sizes)


def curve_of(
    component: str, places: tuple[Place, ...], losses: Tensor, sizes: dict[str, Sizes]
) -> Curve:
    """The loss of a component in some places by rank; `losses` as of an Elimination."""
    ranks, costs = sizes[component]
    dropped = (ranks[0] - ranks) // (2 if component == "qk" else 1)
    own = {key: len(places) * cost for key, cost in costs.items()}
    return Curve((component,), places, ranks, losses.cpu()[dropped].double(), own)


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
