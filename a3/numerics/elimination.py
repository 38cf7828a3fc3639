"""Optimal brain surgeon: drop inputs of a linear map one by one and refit the others exactly.

For min tr(Xᵀ C X), X = W - W̃, with C (n, n) positive definite and W (n, d), dropping the
directions U (n, k), that is Uᵀ W̃ = 0, costs tr(Vᵀ U (Uᵀ P U)⁻¹ Uᵀ V), where P = C⁻¹ and V are the
present weights; the best remaining weights are V - P U (Uᵀ P U)⁻¹ Uᵀ V (Hassibi & Stork 1992,
"Second order derivatives for network pruning: Optimal Brain Surgeon", equations 4 and 5, for k = 1;
Kurtic et al. 2022, arXiv 2203.07259, equations 5 and 6, for blocks). P - P U (Uᵀ P U)⁻¹ Uᵀ P is
then the inverse of C restricted to the remaining inputs. So a step takes 2 n² k operations, and C
is not inverted again. The steps are exact: dropping directions one by one or all at once gives the
same weights.
"""

import torch
from torch import Tensor

from a3.numerics.linalg import inverse

# `eliminate` drops 1/48 of the inputs at a time and then recomputes all scores.
STEPS = 48


def drop(P: Tensor, V: Tensor, PU: Tensor, UV: Tensor, UPU: Tensor) -> Tensor:
    """Take directions U (…, n, k) out of P (…, n, n) and V (…, n, d), in place; their cost (…).

    The caller passes `PU` = P U (…, n, k), `UV` = Uᵀ V (…, k, d) and `UPU` = Uᵀ P U (…, k, k),
    because it can compute them cheaply: if U are columns of the identity, they are slices, and P
    and V may already lack these rows. Leading dimensions are batch dimensions (heads).
    """
    root = torch.linalg.cholesky(UPU)
    moved = torch.cholesky_solve(UV, root)
    V -= PU @ moved
    P -= PU @ torch.cholesky_solve(PU.mT, root)
    return (UV * moved).flatten(-2).sum(-1)


def eliminate(C: Tensor, W: Tensor, count: int, ridge: float) -> tuple[Tensor, Tensor]:
    """The order in which to drop rows of W (n, d), if the others are refitted each time.

    The loss is tr(Xᵀ (C + λ 1) X); row i costs ‖V_i‖² / P_ii. Rows are dropped in blocks of the n /
    STEPS cheapest ones, and each block is exact. Returns the rows (count,) and the loss (count +
    1,) by number of dropped rows, interpolated linearly within a block. At most three n × n
    matrices are in memory besides C.
    """
    P = inverse(C, ridge)
    left = torch.arange(len(C), device=C.device)
    rows, costs, V = [], [], W
    while count > 0:
        taken = min(max(1, len(C) // STEPS), count)
        score = V.square().sum(1) / P.diagonal()
        order = torch.sort(score, stable=True).indices
        gone, stay = order[:taken], order[taken:].sort().values
        across, own, lost = P[gone][:, stay], P[gone][:, gone], V[gone]
        P, V = P[stay[:, None], stay], V[stay]
        cost = drop(P, V, across.T, lost, own)
        costs += [cost / taken] * taken
        rows.append(left[gone])
        left, count = left[stay], count - taken
    if not rows:
        return left[:0], C.new_zeros(1)
    return torch.cat(rows), torch.cat((C.new_zeros(1), torch.stack(costs).cumsum(0)))
