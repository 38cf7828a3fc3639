"""Elimination of RoPE pairs by the loss of what their heads are multiplied by.

A pair's contribution to the scores is linear in its two query dimensions, so a factor 1 - e on them
is free at run time. To second order the model loses ½ eᵀ C e, with C the autocorrelation of the
loss's gradients by the factors (a3.stages.collect.gradients). A factor is one of

- complex: real and imaginary part are 1 and 0, and both 0 in a dropped pair;
- real, where queries are normed, since it goes into the norm's gains;
- real, beside weights of pairs in the norm. Dropping a pair of a normed head also takes its power
  out of the norm, which differs from token to token: of a token whose power is mostly in dropped
  pairs, an attention sink say, what stays becomes many times too large. In a norm of weights 1 - e,
  rms² = Σ (1 - e_f) |x_f|² / h, a dropped pair has e = 1, and the weights of the others are
  refitted, for queries and for keys. They are free at run time, too: the projection is multiplied
  by their square roots, and the gains are divided by them.

Factors and weights do not count as correlated. With their correlations, refits trade one for the
other as far as first order holds, and then break the model (docs/log.md).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from a3.numerics.elimination import Elimination, drop
from a3.numerics.linalg import relative

# The ridge of a refit, as a share of the mean square of a gradient.
RIDGE = 1e-2

# The least weight that a refit gives a pair in its norm, where 1 is the dense one.
LEAST_WEIGHT = 0.05


class Pairs(NamedTuple):
    """C (G, heads, parts, F, parts, F) of heads that drop the same pairs.

    `norms` of the heads are weights of norms, the last ones; factors have one or two parts.
    """

    C: Tensor
    norms: int


def pairs_of(C: Tensor, groups: int, heads: int, pairs: int, normed: bool) -> Pairs:
    """C (heads, 2 F, 2 F) by complex factors of F `pairs`, of which `normed` heads have the real.

    Or C (2 heads + groups, F, F): by real factors and by weights in norms of query heads, and by
    weights in norms of the keys, one a group.
    """
    split = C.unflatten(2, (-1, pairs)).unflatten(1, (-1, pairs))
    split = split[:, :1, :, :1] if normed else split
    if len(C) != 2 * heads + groups:
        return Pairs(split.unflatten(0, (groups, -1)), 0)
    own = [one.unflatten(0, (groups, -1)) for one in split.split((heads, heads, groups))]
    return Pairs(torch.cat(own, dim=1), heads // groups + 1)


def eliminate(problem: Pairs) -> Elimination:
    """Pairs of each group in the order in which they are dropped (G, F), and the loss.

    The loss (F,) is ½ eᵀ (C + λ 1) e over all heads, when each group has dropped 0 to F - 1 pairs.
    Optimal brain surgeon (a3.numerics.elimination) of the factors V = 1 - e of each head, of which
    the heads of a group drop the same pair at a time.
    """
    groups, heads, parts, pairs = problem.C.shape[:4]
    P, V = inverse(problem.C), _all_dropped(problem.C)[..., None]
    left = torch.ones(groups, pairs, dtype=torch.bool, device=P.device)
    order, losses = [], [P.new_zeros(())]
    for _ in range(pairs - 1):
        gone = _costs(P, V, left).argmin(-1, keepdim=True)
        order.append(gone)
        left.scatter_(1, gone, False)
        dims = (gone + pairs * torch.arange(parts, device=P.device))[:, None, :, None]
        dims = dims.expand(-1, heads, -1, -1)
        PD = P.gather(3, dims.mT.expand(-1, -1, parts * pairs, -1))
        PDD = PD.gather(2, dims.expand(-1, -1, -1, parts))
        VD = V.gather(2, dims)
        _, Y = drop(*(Z.flatten(0, 1) for Z in (P, V, PD, VD, PDD)))
        losses.append(Y.square().sum() / 2)
    rest = left.nonzero()[:, 1].view(groups, -1)
    whole = problem.C[:, :, 0, :, 0].sum() / 2
    return Elimination(torch.cat((*order, rest), 1), torch.stack(losses).cumsum(0), whole)


def _costs(P: Tensor, V: Tensor, left: Tensor) -> Tensor:
    """What dropping each pair costs, over the heads of its group: (G, F), infinite if not `left`.

    P (G, g, n, n) and V (G, g, n, 1) as in `a3.numerics.elimination.drop`, n = parts · F.
    """
    pairs = left.shape[1]
    parts = P.shape[-1] // pairs
    own = P.unflatten(3, (parts, pairs)).unflatten(2, (parts, pairs))
    own = own.diagonal(dim1=3, dim2=5).permute(0, 1, 4, 2, 3)  # (G, g, F, parts, parts)
    # Dropped pairs are zero in P.
    own = own.where(left[:, None, :, None, None], torch.eye(parts, dtype=P.dtype, device=P.device))
    factors = V.unflatten(2, (parts, pairs))[..., 0].mT  # (G, g, F, parts)
    cost = (factors * torch.linalg.solve(own, factors)).sum((1, 3))
    return cost.masked_fill(~left, torch.inf)


def refit(problem: Pairs, kept: Tensor) -> tuple[Tensor, float]:
    """e (G, heads, parts, F) of least eᵀ (C + λ 1) e that is 1 in dropped pairs; kept (G, p).

    No weight of a norm becomes less than LEAST_WEIGHT: those that would are held there. Also
    returns the share of the loss of dropping all.
    """
    groups, heads, parts, pairs = problem.C.shape[:4]
    P, all_dropped = inverse(problem.C), _all_dropped(problem.C)
    dropped = torch.ones(groups, pairs, dtype=torch.bool, device=P.device)
    dropped = dropped.scatter(1, kept, False).repeat(1, parts)
    e = torch.zeros_like(all_dropped)
    for group in range(groups):
        e[group] = _held(P[group], dropped[group], all_dropped[group])
        for head in range(heads - problem.norms, heads):
            _hold_weights(P[group, head], dropped[group], e[group, head])
    lost = (e * (_square(problem.C) @ e[..., None])[..., 0]).sum()
    share = relative(lost, problem.C[:, :, 0, :, 0].sum())
    return e.unflatten(2, (parts, pairs)), share.item()


def _all_dropped(C: Tensor) -> Tensor:
    """e (G, heads, parts · F) where all pairs are dropped: 1 in the first part of each."""
    e = C.new_zeros(C.shape[:4])
    e[:, :, 0] = 1.0
    return e.flatten(2)


def _held(P: Tensor, held: Tensor, target: Tensor) -> Tensor:
    """The best e (heads, n) that has the `target` where it is `held` (n,); P (heads, n, n)."""
    D = held.nonzero()[:, 0]
    own = P[:, D]
    return (own.mT @ torch.linalg.solve(own[..., D], target[:, D])[..., None])[..., 0]


def _hold_weights(P: Tensor, dropped: Tensor, e: Tensor) -> None:
    """Change e (F,) of one head, in place, until no weight of its norm is too small."""
    most = 1 - LEAST_WEIGHT
    held, target = dropped.clone(), dropped.to(e.dtype)
    while (over := ~held & (e > most)).any():
        held |= over
        target[over] = most
        e.copy_(_held(P[None], held, target[None])[0])


def _square(C: Tensor) -> Tensor:
    """C as square matrices (G, heads, n, n), n = parts · F."""
    return C.flatten(4, 5).flatten(2, 3)


def inverse(C: Tensor) -> Tensor:
    """(C + λ 1)⁻¹ of each head, (G, heads, n, n), n = parts · F."""
    flat = _square(C)
    eye = torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)
    return torch.linalg.inv(flat + ridges_of(flat) * eye)


def ridges_of(C: Tensor) -> Tensor:
    """λ of each head's refit, C (…, n, n) to (…, 1, 1); not 0, also without gradients."""
    mean = C.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return RIDGE * torch.where(mean > 0, mean, 1.0)
