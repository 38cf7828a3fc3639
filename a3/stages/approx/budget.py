"""Allocates ranks: minimises the predicted loss under one budget."""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from a3.core.errors import A3Error
from a3.solutions.modes import EXPERTS
from a3.solutions.plan import LEAST

# Bisection steps for a multiplier, a power of two between the smallest and largest slope.
HALVINGS = 60


# A layer, and the number of its expert, if the component is a mixture's MLP.
Place: TypeAlias = tuple[int, int | None]


@dataclass(frozen=True)
class Curve:
    """Ranks that components may have in some places (layers, or experts of layers), descending, and
    the loss at each.

    All of them get the same rank. Losses are in nats a token. `parameters` and `cache` are the cost
    of one rank: weights, and cached numbers per token.
    """

    components: tuple[str, ...]
    places: tuple[Place, ...]
    ranks: Tensor
    loss: Tensor
    parameters: int
    cache: int


def at(curve: Curve, rank: int) -> float:
    """The loss at the largest rank of the curve that is no larger than `rank`."""
    return curve.loss[(curve.ranks <= rank).nonzero()[0, 0]].item()


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
    return Curve(
        tuple(dict.fromkeys(one for curve in curves for one in curve.components)),
        tuple(dict.fromkeys(place for curve in curves for place in curve.places)),
        ranks,
        torch.stack([curve.loss[torch.isin(curve.ranks, ranks)] for curve in curves]).sum(0),
        sum(curve.parameters for curve in curves),
        sum(curve.cache for curve in curves),
    )


def cost(curves: list[Curve], ranks: list[int]) -> tuple[int, int]:
    """Parameters and cached numbers of some ranks."""
    pairs = list(zip(curves, ranks, strict=True))
    return sum(c.parameters * rank for c, rank in pairs), sum(c.cache * rank for c, rank in pairs)


def least_loss(curves: list[Curve], budget: tuple[int, int]) -> list[int]:
    """The ranks that minimise the total loss within a budget of parameters and cache.

    Uses Lagrange multipliers: given a price per parameter and per cached number, each curve chooses
    its rank independently. Prices are the lowest that keep to the budget. The remaining budget is
    spent where it reduces the loss most.
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


def least_loss_by_rank(curves: list[Curve], which: int, budget: tuple[int, int]) -> list[int]:
    """As `least_loss`, with each rank of one curve tried in turn.

    That curve has a few ranks and each of its steps is a large part of the budget, of which
    Lagrange multipliers would leave much unused.
    """
    best, chosen = torch.inf, None
    for place in range(len(curves[which].ranks)):
        fixed = slice(place, place + 1)
        one = replace(
            curves[which], ranks=curves[which].ranks[fixed], loss=curves[which].loss[fixed]
        )
        tried = [*curves[:which], one, *curves[which + 1 :]]
        least = cost(tried, [int(curve.ranks[-1]) for curve in tried])
        if least[0] > budget[0] or least[1] > budget[1]:
            continue
        ranks = least_loss(tried, budget)
        if (loss := sum(map(at, tried, ranks))) < best:
            best, chosen = loss, ranks
    # Where no rank fits, the error is that of `least_loss`.
    return least_loss(curves, budget) if chosen is None else chosen


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
            f"allocate: even with the smallest ranks, {LEAST:.1%} of each size, the budget is "
            "exceeded. Take a smaller ratio."
        )
    return ranks


def fill(curves: list[Curve], ranks: list[int], budget: tuple[int, int]) -> list[int]:
    """Raise ranks step by step where the gain per parameter is largest, within the budget."""
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
