"""Where a compressed model's loss sits, and why each layer got its rank: from its record alone."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from a3.solutions.modes import COMPONENTS

NAMES = {"qk": "QK, attention scores", "ov": "OV, attention outputs", "mlp": "MLP"}

# A mode with an allocated ratio, as approx.json writes it.
ALLOCATED = re.compile(r"~@(0?\.\d+|0)$")

# Values so many times above the usual largest ones are cut off in charts.
FAR = 4.0

Values = list[float | None]


@dataclass(frozen=True)
class Part:
    """One component of all layers, a value a layer; None where it is not known, or not compressed.

    `kept` is the share of the size that is kept, and `even` what the same ratio everywhere would
    keep (None if no ratio was allocated). The losses are those of a3.stages.approx.explain, nats a
    token, `more_saves` and `less_costs` for each million parameters; `errors` are the relative
    errors of the outputs on the calibration text.
    """

    name: str
    component: str
    kept: list[float]
    even: float | None
    loss: Values
    loss_even: Values
    more_saves: Values
    less_costs: Values
    errors: Values

    @property
    def is_predicted(self) -> bool:
        """Whether the allocation predicted the losses."""
        return any(value is not None for value in self.loss)

    @property
    def price(self) -> float | None:
        """The marginal loss at which the allocation stopped; None if no layer could go both ways.

        It is the middle, on a logarithmic scale, of the layers that could.
        """
        both = [
            (more * less) ** 0.5
            for more, less in zip(self.more_saves, self.less_costs, strict=True)
            if more is not None and less is not None and more > 0 and less > 0
        ]
        return sorted(both)[len(both) // 2] if both else None


def parts_of(record: dict[str, Any]) -> list[Part]:
    """The compressed components of a model, from the content of its approx.json."""
    return [
        part_of(record, component)
        for component in COMPONENTS
        if any(component in layer for layer in record["layers"])
    ]


def part_of(record: dict[str, Any], component: str) -> Part:
    """One component of all layers."""
    base = record["base"]
    full = base["intermediate_size" if component == "mlp" else "head_dim"]
    said = [layer.get(component, {}) for layer in record["layers"]]
    whys = [one.get("predicted", {}) for one in said]
    allocated = ALLOCATED.search(record["modes"][component])
    return Part(
        name=NAMES[component],
        component=component,
        kept=[kept(one, full, base["experts"]) for one in said],
        even=1 - float(allocated[1]) if allocated else None,
        loss=[why.get("loss") for why in whys],
        loss_even=[why.get("loss_even") for why in whys],
        more_saves=[why.get("more_saves") for why in whys],
        less_costs=[why.get("less_costs") for why in whys],
        errors=[one.get("relative_error") for one in said],
    )


def kept(said: dict[str, Any], full: int, experts: int) -> float:
    """The share of its size that a layer keeps of a component, by the layer's report."""
    if "experts" in said or "merged" in said:  # experts are fewer, and none is smaller
        return said["rank"] / experts
    if "expert_ranks" in said:
        return mean(said["expert_ranks"]) / full
    return said.get("rank", full) / full


def total(values: Iterable[float | None]) -> float:
    """The sum of what is known."""
    return sum(value for value in values if value is not None)


def largest(several: Sequence[Values]) -> float:
    """The largest value that is known, or 0."""
    return max((value for values in several for value in values if value is not None), default=0.0)


def ceiling(several: Sequence[Values]) -> float:
    """Where a chart of these values ends: at the largest, or, where a few are far above the others,
    at FAR times what a tenth of them exceeds.
    """
    known = sorted(value for values in several for value in values if value is not None)
    if not known:
        return 0.0
    usual = known[int(0.9 * (len(known) - 1))]
    return known[-1] if usual <= 0 else min(known[-1], FAR * usual)


def span(parts: Sequence[Part]) -> tuple[float, float] | None:
    """The least and largest positive marginal loss; None if there is none."""
    found = [
        value
        for part in parts
        for value in (*part.more_saves, *part.less_costs)
        if value is not None and value > 0
    ]
    return (min(found), max(found)) if found else None
