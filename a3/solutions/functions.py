"""Each mode's function by its name."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from a3.numerics.elimination import Elimination
from a3.solutions import mlp, ov, pairs_of_model, qk

SOLUTIONS = {"qk": qk, "ov": ov, "mlp": mlp}


def solver_of(component: str, name: str) -> Callable:
    """The function of a mode."""
    return getattr(SOLUTIONS[component], name.replace("-", "_"))


def losses_of_model(mode: str, C: Tensor, pairs: int, normed: bool) -> Elimination:
    """What a mode of one set of RoPE pairs (ONE_SIZE) drops from all layers, C (L H, 2 F, 2 F).

    F is the number of `pairs`; queries may be `normed`.
    """
    losses = getattr(pairs_of_model, solver_of("qk", mode).__name__ + "_losses")
    return losses(C, pairs, normed)


def losses_of(component: str, weights: Any, statistics: list[Tensor], least: int) -> Elimination:
    """What the mode that eliminates (SHARING) drops of a component down to rank `least`.

    `statistics` are those of the mode's kinds, in their order. RoPE pairs are all ordered.
    """
    if component == "qk":
        return qk.fisher_losses(weights, statistics[2])
    losses = ov.joint_losses if component == "ov" else mlp.obs_losses
    return losses(weights, statistics[0], statistics[1], least)
