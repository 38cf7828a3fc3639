"""OV: a smaller head for the attention output (paper section 3.2)."""

from dataclasses import dataclass

from torch import Tensor

from a3.linalg import shared_subspace, subspace_error
from a3.models.family import AttentionWeights


@dataclass(frozen=True)
class OVSolution:
    """v (G, d̂, r), o (H, r, d); the share of Σᵢ ‖R^½ W_v W_o,i‖² that is lost."""

    v: Tensor
    o: Tensor
    relative_error: float


def xkv(weights: AttentionWeights, Gv: Tensor, rank: int) -> OVSolution:
    """Joint SVD over the query heads of a group, with the attention input's R.

    Gv = W_vᵀ R W_v (G, h, h) is the autocorrelation of the values.
    """
    return _solve(weights, Gv, rank)


def identity(weights: AttentionWeights, rank: int) -> OVSolution:
    """As `xkv` with R = 1: looks at the weights alone (CLOVER)."""
    return _solve(weights, weights.v.mT @ weights.v, rank)


def axkv(weights: AttentionWeights, S: Tensor, rank: int) -> OVSolution:
    """As `xkv` with R_p, the autocorrelation of the attention-weighted input.

    W_vᵀ R_p,i W_v is the autocorrelation of head i's slice of the o_proj input: S (H, h, h).
    The heads of a group share one value factor, so their mean takes its place (exact for MHA).
    """
    return _solve(weights, weights.grouped(S).mean(1), rank)


def _solve(weights: AttentionWeights, G: Tensor, rank: int) -> OVSolution:
    """G (groups, h, h) is the Gram matrix of the values; K sums W_o,i W_o,iᵀ over the group."""
    o = weights.grouped(weights.o)
    K = (o @ o.mT).sum(1)
    E, D = shared_subspace(G, K, rank)
    return OVSolution(
        v=weights.v @ E,
        o=(D[:, None] @ o).flatten(0, 1),
        relative_error=subspace_error(G, K, E, D).item(),
    )
