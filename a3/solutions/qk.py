"""QK: a smaller head for the attention scores q·k.

Without RoPE a head's scores are one low-rank matrix W_q W_kᵀ (paper section 3.1); with RoPE only
whole pairs of dimensions can go (section 3.4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from a3.linalg import gram, keep_best, shared_subspace, subspace_error
from a3.models.families import AttentionWeights


@dataclass(frozen=True)
class QKSolution:
    """q (H, d̂, r), k (G, d̂, r); pairs (G, r / 2): kept RoPE pairs, ascending; None without RoPE.

    `relative_error` is the share of Σᵢ ‖R_q^½ W_q,i W_kᵀ R_k^½‖² that is lost, with the R's of the
    mode.
    """

    q: Tensor
    k: Tensor
    pairs: Tensor | None
    relative_error: float


def qk(weights: AttentionWeights, R: Tensor, rank: int) -> QKSolution:
    """Without RoPE: R_q^-½ SVD_r(R_q^½ W_q W_kᵀ R_k^½) R_k^-½, with R (d̂ × d̂) on both sides.

    The query heads of a group share the key factor: one joint SVD of their stacked matrices.
    """
    return _share_keys(weights, gram(R, weights.q), gram(R, weights.k), rank)


def q_only(weights: AttentionWeights, R: Tensor, rank: int) -> QKSolution:
    """As `qk` with R_k = 1."""
    return _share_keys(weights, gram(R, weights.q), weights.k.mT @ weights.k, rank)


def k_only(weights: AttentionWeights, R: Tensor, rank: int) -> QKSolution:
    """As `qk` with R_q = 1."""
    return _share_keys(weights, weights.q.mT @ weights.q, gram(R, weights.k), rank)


def identity(weights: AttentionWeights, R: None, rank: int) -> QKSolution:
    """As `qk` with both R = 1: looks at the weights alone (CLOVER)."""
    return _share_keys(weights, weights.q.mT @ weights.q, weights.k.mT @ weights.k, rank)


def _share_keys(weights: AttentionWeights, Gq: Tensor, Gk: Tensor, rank: int) -> QKSolution:
    """Gq (H, h, h) and Gk (G, h, h) are the Gram matrices of queries and keys."""
    K = weights.grouped(Gq).sum(1)
    E, D = shared_subspace(Gk, K, rank)
    return QKSolution(
        q=(weights.grouped(weights.q) @ D.mT[:, None]).flatten(0, 1),
        k=weights.k @ E,
        pairs=None,
        relative_error=subspace_error(Gk, K, E, D).item(),
    )


def rxx_w_rxx(weights: AttentionWeights, R: Tensor, rank: int) -> QKSolution:
    """CR selection of RoPE pairs, one index for each key head and its query heads.

    Score of pair f: Σ_{j in f} ‖(R^½ W_q)_j‖² ‖(R^½ W_k)_j‖², summed over the query heads of the
    group. R is d̂ × d̂; `rank` is even. Column norms are the diagonal of Wᵀ R W: no square root.
    """
    return _keep_pairs(weights, R, rank, uniform=False)


def rxx_w_rxx_uniform(weights: AttentionWeights, R: Tensor, rank: int) -> QKSolution:
    """As `rxx_w_rxx`, with one index for the whole layer: scores summed over all heads."""
    return _keep_pairs(weights, R, rank, uniform=True)


def _keep_pairs(weights: AttentionWeights, R: Tensor, rank: int, uniform: bool) -> QKSolution:
    """Where only a part of the head is rotated, the rest is low rank, as in `qk`.

    The rank is split between the two, alike for all groups of the layer, where the error is least.
    The new heads hold the kept pairs first.
    """
    Gq, Gk = weights.grouped(gram(R, weights.q)).sum(1), gram(R, weights.k)
    score = _pair_scores(Gq, Gk, weights.rope_dims)
    if uniform:
        score = score.sum(0, keepdim=True).expand_as(score)
    rotated, rest = score.shape[-1], weights.k.shape[-1] - weights.rope_dims
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    for count in range(max(1, (rank - rest + 1) // 2), min(rotated, rank // 2) + 1):
        pairs = keep_best(score, count)
        E, D = _pairs_and_rest(Gq, Gk, pairs, rotated, rank - 2 * count)
        error = subspace_error(Gk, Gq, E, D).item()
        if best is None or error < best[0]:
            best = error, pairs, E, D
    error, pairs, E, D = best
    return QKSolution(
        q=(weights.grouped(weights.q) @ D.mT[:, None]).flatten(0, 1),
        k=weights.k @ E,
        pairs=pairs,
        relative_error=error,
    )


def _pair_scores(Gq: Tensor, Gk: Tensor, rope_dims: int) -> Tensor:
    """CR score of each pair (f, f + rope_dims / 2): Gram matrices (G, h, h) to (G, pairs)."""
    score = Gq.diagonal(dim1=-2, dim2=-1) * Gk.diagonal(dim1=-2, dim2=-1)
    return score[..., :rope_dims].unflatten(-1, (2, -1)).sum(-2)


def _pairs_and_rest(
    Gq: Tensor, Gk: Tensor, pairs: Tensor, rotated: int, rank: int
) -> tuple[Tensor, Tensor]:
    """E (G, h, r), D (G, r, h) that keep the pairs and the best `rank` directions of the rest."""
    h = Gk.shape[-1]
    columns = torch.cat((pairs, pairs + rotated), dim=-1)
    kept = torch.eye(h, dtype=Gk.dtype, device=Gk.device)[columns]
    if rank == 0:
        return kept.mT, kept
    rest = slice(2 * rotated, h)
    E, D = shared_subspace(Gk[:, rest, rest], Gq[:, rest, rest], rank)
    E, D = pad(E, (0, 0, 2 * rotated, 0)), pad(D, (2 * rotated, 0))
    return torch.cat((kept.mT, E), dim=-1), torch.cat((kept, D), dim=-2)
