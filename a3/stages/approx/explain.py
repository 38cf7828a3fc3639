"""Why each layer got its rank: the loss predicted there, and what one rank more or less changes.

An allocation's record has, under `explained`, a list by component with one entry a layer (None
where nothing was allocated), which approx copies to the layer's report under `predicted`:

loss, loss_even: nats a token at the allocated rank, and at the rank of the same ratio everywhere
(of a target: of the ratio that keeps as many parameters).
more_saves, less_costs: nats a token for each million parameters that the next larger rank would
add, or the next smaller one remove; None where there is no such rank.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from a3.core.files import read_record
from a3.stages.approx.budget import Curve, at
from a3.stages.approx.limits import PARAMETERS

PER = 1e6

Why = dict[str, float | None]


def explained(
    curves: Sequence[Curve], ranks: Mapping[str, Sequence[Any]], even: Sequence[int]
) -> dict[str, list[Why | None]]:
    """Losses and marginal losses by component and layer.

    `curves` are those of single units, `ranks` of each component a rank a layer or a list of its
    experts', and `even` the rank of each curve at the same ratio everywhere.
    A loss of the whole model is divided by its layers. Of experts in a layer, the losses are added,
    and the largest gain and the smallest cost kept.
    """
    found: dict[str, dict[int, list[Why]]] = {}
    for curve, same in zip(curves, even, strict=True):
        component = curve.components[0]
        for layer, expert in curve.places:
            rank = ranks[component][layer]
            why = reason(curve, rank if expert is None else rank[expert], same)
            found.setdefault(component, {}).setdefault(layer, []).append(why)
    layers = range(1 + max(layer for of_layers in found.values() for layer in of_layers))
    return {
        component: [joined(of_layers[layer]) if layer in of_layers else None for layer in layers]
        for component, of_layers in found.items()
    }


def reason(curve: Curve, rank: int, same: int) -> Why:
    """Loss and marginal losses of one place of a curve at its rank."""
    place, share = int((curve.ranks <= rank).nonzero()[0, 0]), 1 / len(curve.places)
    last = len(curve.ranks) - 1
    return {
        "loss": share * at(curve, rank),
        "loss_even": share * at(curve, same),
        "more_saves": slope(curve, place - 1) if place > 0 else None,
        "less_costs": slope(curve, place) if place < last else None,
    }


def slope(curve: Curve, place: int) -> float:
    """What the step from a rank to the next smaller one costs, in nats for each PER parameters."""
    step = (curve.costs[PARAMETERS][place] - curve.costs[PARAMETERS][place + 1]).item()
    return float(curve.loss[place + 1] - curve.loss[place]) / step * PER


def joined(whys: list[Why]) -> Why:
    """The reasons of a layer's experts in one."""
    more = [why["more_saves"] for why in whys if why["more_saves"] is not None]
    less = [why["less_costs"] for why in whys if why["less_costs"] is not None]
    return {
        "loss": sum(why["loss"] or 0.0 for why in whys),
        "loss_even": sum(why["loss_even"] or 0.0 for why in whys),
        "more_saves": max(more, default=None),
        "less_costs": min(less, default=None),
    }


def read_explained(allocation: Path | None) -> dict[str, list[Why | None]]:
    """What an allocation's record explains; empty without one, or if an earlier a3 wrote it."""
    found: dict[str, Any] = {} if allocation is None else read_record(allocation)
    return found.get("explained", {})


def explain(
    report: dict[str, Any], explanation: dict[str, list[Why | None]], layer: int
) -> dict[str, Any]:
    """A layer's report with what the allocation predicts there."""
    whys = {
        component: of_layers[layer]
        for component, of_layers in explanation.items()
        if layer < len(of_layers)
    }
    return {
        component: said | ({"predicted": whys[component]} if whys.get(component) else {})
        for component, said in report.items()
    }
