"""Allocates ranks: minimises the predicted loss within limits of what the model may have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from a3.core.errors import A3Error
from a3.solutions.modes import EXPERTS
from a3.solutions.plan import LEAST

# Prices are powers of two, found by so many halvings of the range of exponents.
EXPONENTS = (-80.0, 20.0)

HALVINGS = 20

# A layer, and the number of its expert, if the component is a mixture's MLP.
Place: TypeAlias = tuple[int, int | None]

# Amounts by quantity (a3.stages.approx.limits): parameters, cached numbers …
Amounts: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class Curve:
    """Ranks that components may have in some places (layers, or experts of layers), descending, and
    the loss at each.

    All of them get the same rank. Losses are in nats a token. `costs` are what the components have
    at each rank, by quantity.
    """

    components: tuple[str, ...]
    places: tuple[Place, ...]
    ranks: Tensor
    loss: Tensor
    costs: Mapping[str, Tensor]


def place_in(curve: Curve, rank: int) -> int:
    """Where in the curve the largest rank is that is no larger than `rank`."""
    return int((curve.ranks <= rank).nonzero()[0, 0])


def at(curve: Curve, rank: int) -> float:
    """The loss at the largest rank of the curve that is no larger than `rank`."""
    return curve.loss[place_in(curve, rank)].item()


def together(
    curves: list[Curve], uniform: tuple[str, ...], one_size: tuple[str, ...] = ()
) -> list[Curve]:
    """Merge the curves of all layers into one, for each component in `uniform`, and for all those
    in `one_size`; with EXPERTS in `uniform`, those of each layer's experts.
    """

    def group(curve: Curve) -> tuple[Any, ...]:
        component, (layer, expert) = curve.components[0], curve.places[0]
        if component in one_size:
            return one_size
        if component in uniform:
            return (component,)
        if EXPERTS in uniform and expert is not None:
            return component, layer
        return component, layer, expert

    groups: dict[tuple[Any, ...], list[Curve]] = {}
    for curve in curves:
        groups.setdefault(group(curve), []).append(curve)
    return [joined(own) for own in groups.values()]


def joined(curves: list[Curve]) -> Curve:
    """One curve for units that get the same rank, of the ranks that all of them may have."""
    ranks = curves[0].ranks
    for curve in curves[1:]:
        ranks = ranks[torch.isin(ranks, curve.ranks)]
    common = [torch.isin(curve.ranks, ranks) for curve in curves]

    def total(each: Sequence[Tensor]) -> Tensor:
        return torch.stack([one[kept] for one, kept in zip(each, common, strict=True)]).sum(0)

    return Curve(
        tuple(dict.fromkeys(one for curve in curves for one in curve.components)),
        tuple(dict.fromkeys(place for curve in curves for place in curve.places)),
        ranks,
        total([curve.loss for curve in curves]),
        {key: total([curve.costs[key] for curve in curves]) for key in curves[0].costs},
    )


def cost(curves: list[Curve], ranks: Sequence[int]) -> Amounts:
    """What the curves' components have at some ranks, or at the largest ranks of the curve below.

    Each is rounded to whole numbers, of which all costs but those of experts' FLOPs are.
    """
    places = [place_in(curve, rank) for curve, rank in zip(curves, ranks, strict=True)]
    return {
        key: round(sum(c.costs[key][i].item() for c, i in zip(curves, places, strict=True)))
        for key in curves[0].costs
    }


class Choices:
    """All curves side by side, so that one product prices every rank of all of them."""

    def __init__(self, curves: list[Curve], limits: Amounts) -> None:
        self.limits = list(limits.values())
        width = max(len(curve.ranks) for curve in curves)
        self.loss = torch.full((len(curves), width), torch.inf, dtype=torch.float64)
        self.costs = torch.zeros(len(limits), len(curves), width, dtype=torch.float64)
        for row, curve in enumerate(curves):
            self.loss[row, : len(curve.ranks)] = curve.loss
            for which, key in enumerate(limits):
                self.costs[which, row, : len(curve.ranks)] = curve.costs[key]

    def at_prices(self, prices: tuple[float, ...]) -> Tensor:
        """Where each curve's loss and price together are least: the place of a rank in each."""
        priced = self.loss.clone()
        for price, costs in zip(prices, self.costs, strict=True):
            if price:
                priced.add_(costs, alpha=price)
        return priced.argmin(1)

    def keeps(self, chosen: Tensor, which: int) -> bool:
        """Whether the ranks at some places are within one of the limits."""
        spent = self.costs[which].gather(1, chosen[:, None]).sum()
        return bool(spent <= self.limits[which] * (1 + 1e-12))

    def cheapest(self, dearer: tuple[float, ...] = ()) -> Tensor:
        """The choice at the lowest prices that keep to all limits; `dearer` are prices of the last
        limits, which are found for each of their own by bisection.
        """
        which = len(self.limits) - 1 - len(dearer)
        if which < 0:
            return self.at_prices(dearer)
        if self.keeps(chosen := self.cheapest((0.0, *dearer)), which):
            return chosen
        low, high = EXPONENTS
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if self.keeps(self.cheapest((2.0**middle, *dearer)), which):
                high = middle
            else:
                low = middle
        chosen = self.cheapest((2.0**high, *dearer))
        if not self.keeps(chosen, which):
            raise A3Error(
                f"allocate: even with the smallest ranks, {LEAST:.1%} of each size, the budget is "
                "exceeded. Take a smaller ratio, or ask for more."
            )
        return chosen

    def filled(self, chosen: Tensor) -> Tensor:
        """Ranks raised step by step within the limits, where the loss falls most for the share of
        the limits that it takes.
        """
        limits = torch.tensor(self.limits, dtype=torch.float64)[:, None]
        place = chosen[:, None].clone()
        while True:
            up = (place - 1).clamp(min=0)
            gain = (self.loss.gather(1, place) - self.loss.gather(1, up))[:, 0]
            own, more = (self.costs.gather(2, at.expand(len(limits), -1, -1)) for at in (place, up))
            step, spent = (more - own)[..., 0], own.sum((1, 2))[:, None]
            taken = (step / limits.clamp(min=1)).sum(0)
            fits = (spent + step <= limits).all(0) & (taken > 0)
            worth = torch.where(fits, gain / taken, 0)
            best = int(worth.argmax())
            if worth[best] <= 0:
                return place[:, 0]
            place[best] -= 1


def least_loss(curves: list[Curve], limits: Amounts) -> list[int]:
    """The ranks that minimise the total loss within limits of some quantities.

    Uses Lagrange multipliers: given a price of each quantity, each curve chooses its rank
    independently. Prices are the lowest that keep to the limits. What remains is spent where it
    reduces the loss most.
    """
    choices = Choices(curves, limits)
    chosen = choices.filled(choices.cheapest()).tolist()
    return [int(curve.ranks[place]) for curve, place in zip(curves, chosen, strict=True)]


def least_loss_by_rank(curves: list[Curve], which: int, limits: Amounts) -> list[int]:
    """As `least_loss`, with each rank of one curve tried in turn.

    That curve has a few ranks and each of its steps is a large part of the budget, of which
    Lagrange multipliers would leave much unused.
    """
    best, chosen = torch.inf, None
    for place in range(len(curves[which].ranks)):
        tried = [*curves[:which], only(curves[which], place), *curves[which + 1 :]]
        least = [min_cost(tried, key) for key in limits]
        if any(one > limit for one, limit in zip(least, limits.values(), strict=True)):
            continue
        ranks = least_loss(tried, limits)
        if (loss := sum(map(at, tried, ranks))) < best:
            best, chosen = loss, ranks
    # Where no rank fits, the error is that of `least_loss`.
    return least_loss(curves, limits) if chosen is None else chosen


def only(curve: Curve, place: int) -> Curve:
    """A curve with one of its ranks."""
    costs = {key: values[place : place + 1] for key, values in curve.costs.items()}
    own = slice(place, place + 1)
    return replace(curve, ranks=curve.ranks[own], loss=curve.loss[own], costs=costs)


def min_cost(curves: list[Curve], key: str) -> float:
    """The least that curves can have of a quantity."""
    return sum(curve.costs[key].min().item() for curve in curves)
