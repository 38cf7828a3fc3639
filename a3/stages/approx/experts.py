"""The statistics of single experts, shrunk towards the mean over the experts of their layer.

The layer's output is Σ_e w_e(x) down_e(h_e(x)), so that all statistics are of z_e = w_e h_e, over
the tokens that reach expert e. Tokens reach several experts; how their errors are correlated is not
in them: the loss is the sum of the experts' own, as that of layers is.
"""

from functools import cache

from torch import Tensor

from a3.models.shape import Arch
from a3.rxx.container import Rxx
from a3.rxx.kinds import KINDS
from a3.solutions.mlp import MEAN_TOKENS, expert_ridge


class ExpertStatistics:
    """The statistics of a mixture's experts, by kind."""

    def __init__(self, arch: Arch, statistics: dict[str, Rxx]) -> None:
        self.arch = arch
        self.statistics = statistics
        self.ridge = cache(self._ridge)

    def counts(self, kind: str, layer: int) -> Tensor:
        """How many tokens reached each expert, (E,)."""
        return self.statistics[kind].counts(layer, self.arch.experts)

    def R(self, kind: str, layer: int, expert: int) -> Tensor:  # noqa: N802
        """E[zᵀz], its diagonal, or E[w z] of one expert, over all tokens; the first two shrunk."""
        shape, form = self.arch.statistic_shape(KINDS[kind]), KINDS[kind].form
        value = self.statistics[kind].R(layer, shape, expert)
        if form == "full":
            value.diagonal().add_(self.ridge(kind, layer))
        elif form == "diagonal":
            value = value + self.ridge(kind, layer)
        return value

    def _ridge(self, kind: str, layer: int) -> Tensor:
        power = self.statistics[kind].diagonal(layer, self.arch.statistic_shape(KINDS[kind]))
        return expert_ridge(power, self.counts(kind, layer))

    def tokens(self, kind: str, layer: int, expert: int) -> float:
        """Tokens of one expert, those included by which its statistics are shrunk."""
        return self.counts(kind, layer)[expert].item() + MEAN_TOKENS

    def share(self, kind: str, layer: int, expert: int) -> float:
        """E[w²] of one expert over all tokens, likewise: what its means are to be divided by."""
        routed = self.statistics[kind].routed(layer, self.arch.experts)
        mean = routed.sum() / self.counts(kind, layer).sum()
        return (routed[expert] + MEAN_TOKENS * mean).item() / self.statistics[kind].tokens
