"""Each mode's function by its name."""

from collections.abc import Callable

from a3.solutions import mlp, ov, qk

SOLUTIONS = {"qk": qk, "ov": ov, "mlp": mlp}


def solver_of(component: str, name: str) -> Callable:
    """The function of a mode."""
    return getattr(SOLUTIONS[component], name.replace("-", "_"))
