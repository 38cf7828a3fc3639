"""The column `quantise` of a table: a recipe of number formats, a method, a rank.

This module does not import torch, because the workflow reads it at every start.
"""

import re
from dataclasses import dataclass
from typing import Any

from a3.core.errors import A3Error

AS_IT_IS = "none"

# Of a layer's entry: the weight, the input (and the middle of x A B), both factors and the bias.
FORMATS = ("W", "x", "A", "B", "bias")

# Operands of attention's two products: q kᵀ and p v.
PRODUCTS = ("q", "k", "p", "v")

# Written in a table for a row that is not quantised.
PLAIN = "-"

# The form of the statistics that each method reads, besides full ones for reporting errors.
METHODS = {"none": None, "lqer-svd": None, "lqer-act": "peak", "qera": "full"}

# The input of each projection, by the names of statistics.
INPUTS = {
    **dict.fromkeys("qkv", "attention_input"),
    "o": "o_proj_input",
    **dict.fromkeys(("gate", "up"), "mlp_input"),
    "down": "down_input",
}


@dataclass(frozen=True)
class Quantisation:
    """One cell of a table: `w4a8+qera@32`."""

    recipe: str
    method: str
    rank: int

    def kinds(self) -> list[str]:
        """Statistics that are read."""
        return kinds_read(self.method)


def parse_quantisation(cell: str) -> Quantisation:
    """Parse a cell of the column `quantise`; raises A3Error for an invalid one."""
    found = re.fullmatch(r"([\w.-]+)\+([a-z-]+)(?:@([1-9]\d{0,5}))?", cell)
    if found is None:
        raise A3Error(
            f"quantise is {cell!r}; expected a recipe, a method and its rank, such as "
            f"w4a8+qera@32, or w4a8+none, or {PLAIN} for a row that is not quantised."
        )
    recipe, method, rank = found.groups()
    check_method(method, None if rank is None else int(rank))
    return Quantisation(recipe, method, int(rank or 0))


def check_method(method: str, rank: int | None) -> None:
    """Raise A3Error for an unknown method, a missing rank, or an unused rank."""
    if method not in METHODS:
        raise A3Error(
            f"method {method!r} of quantisation is not known. Methods: {', '.join(METHODS)}."
        )
    if rank is not None and rank < 1:
        raise A3Error(f"rank of the repair is {rank}; expected 1 or more.")
    if (rank is None) != (method == "none"):
        raise A3Error(
            f"method {method!r} has {'no rank' if rank is None else f'rank {rank}'}. All methods "
            "but none need a rank, such as qera@32."
        )


def kinds_read(method: str) -> list[str]:
    """Statistics that a method reads, and those that its layers' errors are reported by."""
    sites = dict.fromkeys(INPUTS.values())
    peaks = [f"{site}_peak" for site in sites] if METHODS[method] == "peak" else []
    return [*sites, *peaks]


def complete_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with `none` for every format that it does not name.

    Raises A3Error for unknown keys and invalid regular expressions.
    """
    layers, products = recipe.get("layers"), recipe.get("products", {})
    if not isinstance(layers, list) or not isinstance(products, dict):
        raise A3Error(f"recipe {recipe}: expected a list `layers`, and `products`. Correct it.")
    known = {"recipe": (recipe, {"layers", "products"}), "products": (products, set(PRODUCTS))}
    known |= {f"layers.{i}": (one, {"match", "rank", *FORMATS}) for i, one in enumerate(layers)}
    for where, (found, keys) in known.items():
        if unknown := sorted(found.keys() - keys):
            raise A3Error(
                f"recipe: unknown key {unknown[0]!r} at {where}; expected one of "
                f"{', '.join(sorted(keys))}."
            )
    for one in layers:
        check_expression(one.get("match"))
    return {
        "layers": [dict.fromkeys(FORMATS, AS_IT_IS) | one for one in layers],
        "products": dict.fromkeys(PRODUCTS, AS_IT_IS) | products,
    }


def check_expression(match: Any) -> None:
    """Raise A3Error unless this is a regular expression."""
    try:
        re.compile(match)
    except (re.error, TypeError) as error:
        raise A3Error(
            f"recipe: match is {match!r}, not a regular expression ({error}). It has to fit the "
            "whole name of a module, such as model.layers.0.self_attn.q_proj."
        ) from error


def entry_for(recipe: dict[str, Any], module: str) -> dict[str, Any] | None:
    """What a recipe says of a module: its first entry whose expression matches the whole name."""
    return next((e for e in recipe["layers"] if re.fullmatch(e["match"], module)), None)


def formats_of(recipe: dict[str, Any]) -> list[str]:
    """Every number format that a complete recipe names."""
    found = [one[key] for one in recipe["layers"] for key in FORMATS]
    return sorted({*found, *recipe["products"].values()})
