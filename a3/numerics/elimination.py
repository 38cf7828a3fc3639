"""Optimal brain surgeon: drop inputs of a linear map one by one, the others refitted exactly.

For min tr(Xᵀ C X), X = W - W̃, with C (n, n) positive definite and W (n, d), dropping the directions
U (n, k), that is Uᵀ W̃ = 0, costs tr(Vᵀ U (Uᵀ P U)⁻¹ Uᵀ V), where P = C⁻¹ and V are the weights so
far; the best weights that are left are V - P U (Uᵀ P U)⁻¹ Uᵀ V (Hassibi & Stork 1992, "Second order
derivatives for network pruning: Optimal Brain Surgeon", equations 4 and 5, for k = 1; Kurtic et al.
2022, arXiv 2203.07259, equations 5 and 6, for blocks). P - P U (Uᵀ P U)⁻¹ Uᵀ P is then the inverse
of C among what is left, so that a step takes 2 n² k operations, and no C is inverted again. The
steps add up exactly: dropping directions one by one or all at once leaves the same weights.
"""

import torch
from torch import Tensor

from a3.numerics.linalg import inverse

# `eliminate` takes a forty-eighth of the inputs at a time, and then looks at all scores anew.
STEPS = 48


def drop(P: Tensor, V: Tensor, PU: Tensor, UV: Tensor, UPU: Tensor) -> Tensor:
    """Take directions U (…, n, k) out of P (…, n, n) and V (…, n, d), in place; their cost (…).

    `PU` = P U (…, n, k), `UV` = Uᵀ V (…, k, d) and `UPU` = Uᵀ P U (…, k, k) come from the caller,
    who knows what is cheap: where U are columns of the identity, they are slices, and P and V may
    be without these rows already. Leading dimensions are batch dimensions (heads).
    """
    root = torch.linalg.cholesky(UPU)
    moved = torch.cholesky_solve(UV, root)
    V -= PU @ moved
    P -= PU @ torch.cholesky_solve(PU.mT, root)
    return (UV * moved).flatten(-2).sum(-1)


def eliminate(C: Tensor, W: Tensor, count: int, ridge: float) -> tuple[Tensor, Tensor]:
    """Which rows of W (n, d) to drop, first to last, where the others are refitted each time.

    The loss is tr(Xᵀ (C + λ 1) X); row i costs ‖V_i‖² / P_ii. Rows go in blocks of n / STEPS of the
    least cost, each block exactly. Returns the rows (count,) and the loss (count + 1,) by number of
    rows dropped, within a block linear. At most two or three n × n matrices are in memory beside C.
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
