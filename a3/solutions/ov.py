"""OV: a smaller head for the attention output (paper section 3.2)."""

from dataclasses import dataclass

import torch
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


def modegpt(weights: AttentionWeights, Gv: Tensor, rank: int) -> OVSolution:
    """MoDeGPT's type III (Lin et al. 2024, arXiv 2408.09632, algorithm 3): two SVDs in a row, of
    C^½ W_v = U Σ Vᵀ and of Σ Vᵀ W_o, which are one of C^½ W_v W_o: the same as `xkv`.
    """
    return _solve(weights, Gv, rank)


def palu(weights: AttentionWeights, Gv: Tensor, rank: int) -> OVSolution:
    """Low-rank values, head by head, their second factor fused into the output projection.

    Palu (Chang et al. 2024, arXiv 2407.21118, section 3: whitened SVD of W_v; "multi-head"
    decomposition). It does not look at W_o, which `relative_error` does, as in `xkv`.
    """
    alone = torch.eye(Gv.shape[-1], dtype=Gv.dtype, device=Gv.device).expand_as(Gv)
    return _shrink(weights, Gv, *shared_subspace(Gv, alone, rank))


def _solve(weights: AttentionWeights, G: Tensor, rank: int) -> OVSolution:
    """G (groups, h, h) is the Gram matrix of the values."""
    return _shrink(weights, G, *shared_subspace(G, _outputs(weights), rank))


def _outputs(weights: AttentionWeights) -> Tensor:
    """Σ W_o,i W_o,iᵀ over the heads of each group, (groups, h, h)."""
    o = weights.grouped(weights.o)
    return (o @ o.mT).sum(1)


def _shrink(weights: AttentionWeights, G: Tensor, E: Tensor, D: Tensor) -> OVSolution:
    """Values W_v E and outputs D W_o, with E (groups, h, r) and D (groups, r, h)."""
    return OVSolution(
        v=weights.v @ E,
        o=(D[:, None] @ weights.grouped(weights.o)).flatten(0, 1),
        relative_error=subspace_error(G, _outputs(weights), E, D).item(),
    )
