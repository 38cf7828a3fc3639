"""QK: a smaller head for the attention scores q·k.

Without RoPE a head's scores are one low-rank matrix W_q W_kᵀ (paper section 3.1); with RoPE only
whole pairs of dimensions can go (section 3.4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from a3.linalg import gram, keep_best, relative, shared_subspace, subspace_error
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
    Gq, Gk = weights.grouped(gram(R, weights.q)).sum(1), gram(R, weights.k)
    score = Gq.diagonal(dim1=-2, dim2=-1) * Gk.diagonal(dim1=-2, dim2=-1)
    score = score.unflatten(-1, (2, -1)).sum(-2)  # halves: pair f is (f, f + h / 2)
    if uniform:
        score = score.sum(0, keepdim=True).expand_as(score)
    pairs = keep_best(score, rank // 2)
    columns = torch.cat((pairs, pairs + score.shape[-1]), dim=-1)
    return QKSolution(
        q=weights.grouped(weights.q).take_along_dim(columns[:, None, None], -1).flatten(0, 1),
        k=weights.k.take_along_dim(columns[:, None], -1),
        pairs=pairs,
        relative_error=_dropped_share(Gq, Gk, columns),
    )


def _dropped_share(Gq: Tensor, Gk: Tensor, columns: Tensor) -> float:
    """‖L_D R_D‖² over the dropped columns D, relative to all columns; Gram matrices (G, h, h).

    ‖L_D R_D‖² = tr(Gq[D, D] Gk[D, D]), and the sum over query heads moves into Gq.
    """
    dropped = torch.ones(Gq.shape[:-1], dtype=torch.bool).scatter(-1, columns, False)
    both = dropped[..., :, None] & dropped[..., None, :]
    product = Gq * Gk
    return relative((product * both).sum(), product.sum()).item()
