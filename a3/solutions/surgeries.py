"""PCA surgery: its modes, and the notation of sizes.

An ablation in the dense shapes, after edwinhere/surgery: W_q, W_k and W_v are rebuilt from their
leading principal components. The Snakefile imports this at every start, so it imports nothing
heavy; a3.solutions.pca has the numerics.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

from a3.core.errors import A3Error

# The projections that are rebuilt.
PROJECTIONS = ("q", "k", "v")

# The statistic that is the metric of modes with one.
METRIC = "attention_input"

# The baseline at equal size, in which each matrix has its own components.
SEPARATE = "pca-separate"

VARIANCE, PARAMETERS = "variance", "parameters"

SIZE = re.compile(rf"({VARIANCE}|{PARAMETERS})@(1|0\.[0-9]*[1-9])")


@dataclass(frozen=True)
class Surgery:
    """What shares components, in what metric, and whether the mean is added back.

    `shared` is nothing (every matrix has components of its own), kv (K and V of a layer) or layers
    (K and V of all layers; Q of all layers). With the metric R = E[xᵀx] of the layer's input,
    variance is that of the outputs x W; without, of the weights themselves.
    """

    shared: str = ""
    metric: bool = False
    mean: bool = True

    def stacks(self, layers: int) -> list[list[tuple[int, str]]]:
        """Which matrices, as (layer, name), have components together."""
        if self.shared == "layers":
            return [[(i, name) for i in range(layers) for name in names] for names in ("q", "kv")]
        names = ("q", "kv") if self.shared == "kv" else PROJECTIONS
        return [[(i, name) for name in together] for i in range(layers) for together in names]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Statistics that it reads."""
        return (METRIC,) if self.metric else ()


SURGERIES = {
    SEPARATE: Surgery(),
    "pca-shared-kv": Surgery("kv"),
    "pca-shared-layers": Surgery("layers"),
    "pca-separate-rxx": Surgery(metric=True),
    "pca-shared-kv-rxx": Surgery("kv", metric=True),
    "pca-shared-layers-rxx": Surgery("layers", metric=True),
    # As in edwinhere/surgery: the mean is subtracted and not added back.
    "pca-separate-no-mean": Surgery(mean=False),
    "pca-shared-kv-no-mean": Surgery("kv", mean=False),
}


@dataclass(frozen=True)
class Size:
    """How much to keep, in (0, 1]: a share of the variance, or of the parameters of Q, K and V.

    Of parameters, those are counted that would be stored if the factors were.
    """

    of: str
    share: Decimal

    def __str__(self) -> str:
        """As a table spells it: `variance@0.9`."""
        return f"{self.of}@{self.share}"


def find_surgery(name: str) -> Surgery:
    """The surgery of a mode; raises A3Error, listing those that exist, for a name not known."""
    if name not in SURGERIES:
        raise A3Error(f"surgery mode {name!r} is not known. Modes: {', '.join(SURGERIES)}.")
    return SURGERIES[name]


def parse_size(text: str) -> Size:
    """`variance@0.9` or `parameters@0.5`; raises A3Error for another spelling.

    Paths hold the size as it is spelled, and a checkpoint has one path.
    """
    found = SIZE.fullmatch(text)
    if found is None:
        raise A3Error(
            f"surgery size is {text!r}; expected {VARIANCE}@0.9, which keeps the components that "
            f"explain that share, or {PARAMETERS}@0.5, which keeps as many as that share of the "
            "parameters can hold. The share is above 0 and at most 1, without trailing zeros."
        )
    return Size(found[1], Decimal(found[2]))
