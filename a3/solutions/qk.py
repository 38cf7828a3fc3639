"""QK: a smaller head for the attention scores q·k.

Without RoPE a head's scores are one low-rank matrix W_q W_kᵀ (paper section 3.1); with RoPE only
whole pairs of dimensions can be removed (section 3.4). The statistics are the autocorrelations of
each head's queries and keys before RoPE, Gq = W_qᵀ R W_q (H, h, h) and Gk (G, h, h).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor
from torch.nn.functional import pad

from a3.models.family import AttentionWeights
from a3.numerics.elimination import Elimination
from a3.numerics.linalg import keep_best, relative, shared_subspace, subspace_error
from a3.solutions.pairs import Pairs, eliminate, pairs_of, refit


@dataclass(frozen=True)
class QKSolution:
    """q (H, d̂, r), k (G, d̂, r); pairs (G, r / 2): kept RoPE pairs, ascending; None without RoPE.

    q_gain (H, r) and k_gain (G, r) of the norms of q and k, None if there are none.
    `relative_error` is the share of Σᵢ ‖R_q^½ W_q,i W_kᵀ R_k^½‖² that is lost, with the R's of the
    mode.
    """

    q: Tensor
    k: Tensor
    pairs: Tensor | None
    relative_error: float
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None


def qk(weights: AttentionWeights, Gq: Tensor, Gk: Tensor, rank: int) -> QKSolution:
    """Without RoPE: R_q^-½ SVD_r(R_q^½ W_q W_kᵀ R_k^½) R_k^-½.

    The query heads of a group share the key factor: one joint SVD of their stacked matrices.
    """
    return _share_keys(weights, Gq, Gk, rank)


def qk_cov(
    weights: AttentionWeights, Gq: Tensor, Gk: Tensor, mean: Tensor, rank: int
) -> QKSolution:
    """Like `qk`, with the covariance of the keys in place of their autocorrelation.

    The mean of the keys adds the same number to all scores of a query, and softmax cancels it, so
    no rank is spent on it. `mean` (G · h,) is E[k].
    """
    common = mean.view(len(Gk), -1)
    return _share_keys(weights, Gq, Gk - common[:, :, None] * common[:, None, :], rank)


def q_only(weights: AttentionWeights, Gq: Tensor, rank: int) -> QKSolution:
    """Like `qk` with R_k = 1."""
    return _share_keys(weights, Gq, weights.k.mT @ weights.k, rank)


def k_only(weights: AttentionWeights, Gk: Tensor, rank: int) -> QKSolution:
    """Like `qk` with R_q = 1."""
    return _share_keys(weights, weights.q.mT @ weights.q, Gk, rank)


def identity(weights: AttentionWeights, rank: int) -> QKSolution:
    """Like `qk` with both R = 1: uses only the weights (CLOVER)."""
    return _share_keys(weights, weights.q.mT @ weights.q, weights.k.mT @ weights.k, rank)


def _share_keys(weights: AttentionWeights, Gq: Tensor, Gk: Tensor, rank: int) -> QKSolution:
    """Gq (H, h, h) and Gk (G, h, h) are the Gram matrices of queries and keys."""
    K = weights.grouped(Gq).sum(1)
    E, D = shared_subspace(Gk, K, rank)
    return _shared(weights, E, D, subspace_error(Gk, K, E, D))


def palu(weights: AttentionWeights, Gk: Tensor, rank: int) -> QKSolution:
    """Low-rank keys, head by head, their second factor fused into the queries.

    Palu (Chang et al. 2024, arXiv 2407.21118, section 3: whitened SVD of W_k; "multi-head"
    decomposition), which without RoPE needs only a smaller head at run time. It uses only the keys:
    `relative_error` is the lost share of Σ ‖R^½ W_k‖².
    """
    alone = torch.eye(Gk.shape[-1], dtype=Gk.dtype, device=Gk.device).expand_as(Gk)
    E, D = shared_subspace(Gk, alone, rank)
    return _shared(weights, E, D, subspace_error(Gk, alone, E, D))


def rxx_w_rxx(weights: AttentionWeights, Gq: Tensor, Gk: Tensor, rank: int) -> QKSolution:
    """CR selection of RoPE pairs, one index for each key head and its query heads.

    Score of pair f: Σ_{j in f} ‖(R^½ W_q)_j‖² ‖(R^½ W_k)_j‖², summed over the query heads of the
    group. `rank` is even. Squared column norms are the diagonals of Gq and Gk: no square root.
    """
    return _keep_pairs(weights, Gq, Gk, rank, pair_scores(weights, Gq, Gk))


def rxx_w_rxx_uniform(weights: AttentionWeights, Gq: Tensor, Gk: Tensor, rank: int) -> QKSolution:
    """Like `rxx_w_rxx`, with one index for the whole layer: scores summed over all heads."""
    score = pair_scores(weights, Gq, Gk)
    return _keep_pairs(weights, Gq, Gk, rank, score.sum(0, keepdim=True).expand_as(score))


def fisher(
    weights: AttentionWeights,
    Gq: Tensor,
    Gk: Tensor,
    C: Tensor,
    rank: int,
    known: Elimination | None = None,
) -> QKSolution:
    """Eliminate RoPE pairs by their effect on the loss; the kept pairs compensate for the others.

    A pair's contribution to the scores is linear in its two query dimensions, so any complex factor
    on them (a rotation and a scale, which commute with RoPE) is free at run time. To second order
    the model loses ½ eᵀ C e where the pairs' factors become 1 - e, with C (H, 2 F, 2 F) the
    autocorrelation of the loss's gradients by them (`a3.stages.collect.gradients`; real parts
    first): e is 1 for a dropped pair, and the others' are refitted. Where queries are normed,
    factors go into the norm's gains and are real. Where the norm is over each head, C is
    (2 H + G, F, F): by factors, and by the pairs' weights in the norms of queries and of keys
    (`a3.solutions.pairs`), since dropping pairs changes the norms. Each group has one set of
    pairs, as in `rxx_w_rxx`, and with partial RoPE one set of other dimensions. `known` is what
    `fisher_losses` returned.
    """
    order = (known or fisher_losses(weights, C)).order
    return _eliminated(weights, Gq, Gk, C, order, rank)


def uniform_global(
    weights: AttentionWeights, Gq: Tensor, Gk: Tensor, C: Tensor, order: Tensor, rank: int
) -> QKSolution:
    """As `fisher`, with one index for the whole model: pairs go in the `order` (F,) of all layers.

    With partial RoPE, the rotated part keeps its share of the rank, so that all layers have the
    same number of pairs.
    """
    share = int(rank * weights.rope_dims / weights.k.shape[-1] / 2 + 0.5)
    return _eliminated(weights, Gq, Gk, C, order.expand(len(weights.k), -1), rank, share)


def uniform_contiguous(
    weights: AttentionWeights, Gq: Tensor, Gk: Tensor, C: Tensor, first: Tensor, rank: int
) -> QKSolution:
    """As `uniform-global`, with pairs that follow one another, so that RoPE stays plain.

    `first` (F,) is the first pair that is kept where 0 to F - 1 pairs are dropped. The frequencies
    θ^(-2j/h) of pairs a to a + r/2 - 1 are those of a RoPE of r dimensions, base θ^(r/h), divided
    by θ^(2a/h). Fits only heads that RoPE rotates whole.
    """
    pairs, kept = len(first), rank // 2
    every = torch.arange(pairs, device=first.device)
    start = first[pairs - kept]
    inside = (every >= start) & (every < start + kept)
    order = torch.cat((every[~inside], every[inside])).expand(len(weights.k), -1)
    return _eliminated(weights, Gq, Gk, C, order, rank)


def _eliminated(
    weights: AttentionWeights,
    Gq: Tensor,
    Gk: Tensor,
    C: Tensor,
    order: Tensor,
    rank: int,
    count: int | None = None,
) -> QKSolution:
    """Pairs dropped in an order (G, F), `count` of them kept if given, and the others refitted."""
    pairs = order.shape[-1]
    last = torch.arange(pairs, dtype=C.dtype, device=C.device).expand_as(order)
    score = torch.zeros_like(last).scatter(-1, order, last)
    solution = _keep_pairs(weights, Gq, Gk, rank, score, count)
    kept = solution.pairs
    assert kept is not None, "_keep_pairs says which"
    problem = _pairs(weights, C)
    e, error = refit(problem, kept)
    solution = replace(solution, relative_error=error)
    if problem.norms:
        return _with_norms(weights, solution, kept, e[:, :, 0])
    return _with_factors(solution, kept, e)


def fisher_losses(weights: AttentionWeights, C: Tensor) -> Elimination:
    """Pairs of each group in the order in which `fisher` drops them, (G, F), and the loss.

    The loss (F,) is ½ eᵀ (C + λ 1) e over all heads, when each group has dropped 0 to F - 1 pairs.
    """
    return eliminate(_pairs(weights, C))


def _pairs(weights: AttentionWeights, C: Tensor) -> Pairs:
    """The problem of a layer's pairs."""
    heads, groups, pairs = len(weights.q), len(weights.k), weights.rope_dims // 2
    return pairs_of(C, groups, heads, pairs, weights.q_gain is not None)


def _with_factors(solution: QKSolution, pairs: Tensor, e: Tensor) -> QKSolution:
    """Multiply kept `pairs` (G, p) of queries, or the norm's gains, by 1 - e (G, g, parts, F)."""
    p = pairs.shape[1]
    kept = e.gather(3, pairs[:, None, None].expand(*e.shape[:3], p)).flatten(0, 1)
    scale = 1 - kept[:, :1]
    if solution.q_gain is not None:
        gain = solution.q_gain.clone()
        gain[:, : 2 * p] *= scale[:, 0].repeat(1, 2)
        return replace(solution, q_gain=gain)
    first, second, rest = solution.q.split((p, p, solution.q.shape[-1] - 2 * p), dim=-1)
    turn = -kept[:, 1:]
    turned = (scale * first - turn * second, scale * second + turn * first, rest)
    return replace(solution, q=torch.cat(turned, dim=-1))


def _with_norms(
    weights: AttentionWeights, solution: QKSolution, pairs: Tensor, e: Tensor
) -> QKSolution:
    """Factors and weights in norms, 1 - e, of the kept `pairs` (G, p); e (G, 2 g + 1, F).

    The norm over r dimensions divides √a x by (Σ a x² / r)^½ where (Σ a x² / h)^½ is meant.
    """
    assert weights.q_gain is not None, "q is normed"
    assert weights.k_gain is not None, "k is normed"
    p, h, heads = pairs.shape[1], weights.k.shape[-1], e.shape[1] // 2
    dims = torch.cat((pairs, pairs + h // 2), dim=1)
    size = (h / (2 * p)) ** 0.5
    kept = 1 - e.gather(2, pairs[:, None].expand(-1, e.shape[1], -1))
    factors, *weighted = (
        own.flatten(0, 1).repeat(1, 2) for own in kept.split((heads, heads, 1), dim=1)
    )
    q_root, k_root = (own.sqrt() for own in weighted)
    q_gain = weights.q_gain.gather(1, dims.repeat_interleave(heads, dim=0))
    return replace(
        solution,
        q=solution.q * q_root[:, None],
        k=solution.k * k_root[:, None],
        q_gain=q_gain * factors / q_root * size,
        k_gain=weights.k_gain.gather(1, dims) / k_root * size,
    )


def modegpt(weights: AttentionWeights, Gq: Tensor, Gk: Tensor, rank: int) -> QKSolution:
    """CR selection by ‖C_q^½ e_j‖ ‖C_k^½ e_j‖ (MoDeGPT, Lin et al. 2024, arXiv 2408.09632,
    algorithm 2), C the autocorrelations of queries and keys.

    Of dimensions, or, where they are rotated, of RoPE pairs, whose scores are the sums of their
    dimensions'; over the query heads of a group likewise.
    """
    if weights.rope_dims:
        return _keep_pairs(weights, Gq, Gk, rank, pair_scores(weights, Gq, Gk, power=0.5))
    kept = keep_best(_scores(weights, Gq, Gk, power=0.5), rank)
    D = torch.eye(Gk.shape[-1], dtype=Gk.dtype, device=Gk.device)[kept]
    K = weights.grouped(Gq).sum(1)
    return _shared(weights, D.mT, D, subspace_error(Gk, K, D.mT, D))


def abs_w(weights: AttentionWeights, Gq: Tensor, Gk: Tensor, rank: int) -> QKSolution:
    """Like `rxx_w_rxx` with R = 1: keeps the RoPE pairs of the largest weights."""
    power = torch.ones(weights.o.shape[-1], dtype=Gk.dtype, device=Gk.device)
    return _keep_pairs(weights, Gq, Gk, rank, _magnitudes(weights, power))


def wanda(
    weights: AttentionWeights, Gq: Tensor, Gk: Tensor, power: Tensor, rank: int
) -> QKSolution:
    """Like `rxx_w_rxx` with only the diagonal of R, which is all that Wanda uses.

    Wanda's importance of a weight is |w_ij| ‖x_i‖ (Sun et al. 2023, arXiv 2306.11695, equation 1);
    a column's is the root of its squares' sum, and a pair's that of CR: products of query and key
    columns. (Sums of both in place of products drop keys that are few and large, and with them the
    model: docs/log.md.) `power` (d,) is E[x_i²] of the attention input; biases do not count.
    """
    return _keep_pairs(weights, Gq, Gk, rank, _magnitudes(weights, power))


def _magnitudes(weights: AttentionWeights, power: Tensor) -> Tensor:
    """Σ_j (Σ_i w_q,ij² ‖x_i‖²) (Σ_i w_k,ij² ‖x_i‖²) over the group's heads, (G, pairs)."""
    q, k = (power @ W[:, : len(power)].square() for W in (weights.q, weights.k))
    score = q.unflatten(0, (len(k), -1)).sum(1) * k
    return score[:, : weights.rope_dims].unflatten(-1, (2, -1)).sum(-2)


def _shared(weights: AttentionWeights, E: Tensor, D: Tensor, error: Tensor) -> QKSolution:
    """Keys W_k E and queries W_q Dᵀ, with E (G, h, r) and D (G, r, h)."""
    return QKSolution(
        q=(weights.grouped(weights.q) @ D.mT[:, None]).flatten(0, 1),
        k=weights.k @ E,
        pairs=None,
        relative_error=error.item(),
    )


def _keep_pairs(
    weights: AttentionWeights,
    Gq: Tensor,
    Gk: Tensor,
    rank: int,
    score: Tensor,
    share: int | None = None,
) -> QKSolution:
    """Keep the pairs of the best `score` (G, pairs).

    Where only a part of the head is rotated, the rest is low rank, as in `qk`. The rank is split
    between the two, alike for all groups of the layer, where the error is least, or so that `share`
    pairs stay if that is possible. The new heads hold the kept pairs first. Where q and k are
    normed, Gq and Gk are those of the normed vectors before the norm's gains.
    """
    mq, mk = (G.diagonal(dim1=-2, dim2=-1) for G in (Gq, Gk))
    Gq, Gk = with_gains(weights, Gq, Gk)
    Gq = weights.grouped(Gq).sum(1)
    rotated, rest = score.shape[-1], weights.k.shape[-1] - weights.rope_dims
    counts: Sequence[int] = range(max(1, (rank - rest + 1) // 2), min(rotated, rank // 2) + 1)
    if share is not None:
        counts = [min(max(share, counts[0]), counts[-1])]

    def keep(count: int) -> tuple[float, Tensor, Tensor, Tensor]:
        pairs = keep_best(score, count)
        E, D = _pairs_and_rest(Gq, Gk, pairs, rotated, rank - 2 * count)
        return subspace_error(Gk, Gq, E, D).item(), pairs, E, D

    error, pairs, E, D = min(map(keep, counts), key=itemgetter(0))
    gains = {}
    if weights.q_gain is not None and weights.k_gain is not None:
        of_head = E.repeat_interleave(len(weights.q) // len(weights.k), dim=0)
        gains["q_gain"] = _gains(weights.q_gain, mq, of_head, weights.norm)
        gains["k_gain"] = _gains(weights.k_gain, mk, E, weights.norm)
    return QKSolution(
        q=(weights.grouped(weights.q) @ D.mT[:, None]).flatten(0, 1),
        k=weights.k @ E,
        pairs=pairs,
        relative_error=error,
        **gains,
    )


def with_gains(weights: AttentionWeights, Gq: Tensor, Gk: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices after the gains of the norms of q and k, where there are any."""
    if weights.q_gain is None or weights.k_gain is None:
        return Gq, Gk
    return scaled(Gq, weights.q_gain), scaled(Gk, weights.k_gain)


def scaled(G: Tensor, gain: Tensor) -> Tensor:
    """Gram matrices (..., h, h) of vectors whose dimensions are multiplied by gain (..., h)."""
    return G * gain[..., :, None] * gain[..., None, :]


def _gains(gain: Tensor, power: Tensor, kept: Tensor, norm: str | None) -> Tensor:
    """Gains (heads, r) of norms over the kept dimensions; gain and power (heads, h).

    A norm over r dimensions divides by their own root mean square, rms_S, where the dense one
    divides by that of all, so its output is too large by rms / rms_S, which differs from token to
    token. Its square t² = (rms_S / rms)² is the mean of the normed powers over the kept dimensions;
    the constant c² that is nearest to t² in least squares is E[t²], a mean of `power` = E[q̂²],
    and c goes into the gains: one a head, or one a layer where the norm is over all heads.
    `kept` (heads, h, r) has one 1 a column.
    """
    dims = (-2, -1) if norm == "layer" else (-1,)
    share = (power[..., None, :] @ kept)[..., 0, :].mean(dims, keepdim=True)
    scalar = relative(share, power.mean(dims, keepdim=True)).sqrt()
    return (gain[..., None, :] @ kept)[..., 0, :] * scalar


def _scores(weights: AttentionWeights, Gq: Tensor, Gk: Tensor, power: float) -> Tensor:
    """CR score (‖C_q^½ e_j‖² ‖C_k^½ e_j‖²)^power of each dimension j, summed over the group's
    query heads: Gram matrices (H, h, h) and (G, h, h) to (G, h)."""
    Gq, Gk = with_gains(weights, Gq, Gk)
    mq, mk = (G.diagonal(dim1=-2, dim2=-1).clamp(min=0) ** power for G in (Gq, Gk))
    return mq.unflatten(0, (len(mk), -1)).sum(1) * mk


def pair_scores(weights: AttentionWeights, Gq: Tensor, Gk: Tensor, power: float = 1.0) -> Tensor:
    """Sum of the scores of each pair (f, f + rope_dims / 2): (G, pairs)."""
    score = _scores(weights, Gq, Gk, power)
    return score[:, : weights.rope_dims].unflatten(-1, (2, -1)).sum(-2)


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
