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

from typing import NamedTuple

import torch
from torch import Tensor

# `eliminate` drops 1/48 of the inputs at a time and then recomputes all scores.
STEPS = 48

# float32 is trusted if the losses of so many columns, computed anew in float64, agree within this.
CHECKED, AGREEMENT = 16, 1e-5

# Number of rows of C that are scaled in float64 at a time: few, so that they stay in the cache.
CHUNK = 128


class Elimination(NamedTuple):
    """What is dropped in which order, and what that costs.

    `order` says what is dropped first; its form differs by component. `losses` (dropped + 1,) is
    the loss, ridge included, when so much is dropped. `whole` is the loss if all is dropped,
    without the ridge: the scale of relative errors.
    """

    order: Tensor
    losses: Tensor
    whole: Tensor


def drop(P: Tensor, V: Tensor, PU: Tensor, UV: Tensor, UPU: Tensor) -> tuple[Tensor, Tensor]:
    """Take directions U (b, n, k) out of a batch of P (b, n, n) and V (b, n, d), in place.

    Returns X (b, n, k) and Y (b, k, d): P has lost X Xᵀ and V has lost X Y, and the cost is ‖Y‖².
    The caller passes `PU` = P U (b, n, k), `UV` = Uᵀ V (b, k, d) and `UPU` = Uᵀ P U (b, k, k),
    because it can compute them cheaply.
    """
    root = torch.linalg.cholesky(UPU)
    X = torch.linalg.solve_triangular(root, PU.mT, upper=False).mT
    Y = torch.linalg.solve_triangular(root, UV, upper=False)
    V.baddbmm_(X, Y, alpha=-1)
    P.baddbmm_(X, X.mT, alpha=-1)
    return X, Y


def eliminate(C: Tensor, W: Tensor, count: int, ridge: float) -> Elimination:
    """The order in which to drop rows of W (n, d), if the others are refitted each time.

    The loss is tr(Xᵀ (C + λ 1) X), C (n, n) and W in float64; row i costs ‖V_i‖² / P_ii. Rows are
    dropped in blocks of the n / STEPS cheapest ones, and each block is exact; losses within a block
    are interpolated linearly. The order (count,) has the numbers of the dropped rows.

    Computed in float32, with inputs scaled to equal size, so that the rounding of a row's cost
    grows only with what the other rows explain of it. The losses of CHECKED columns are then
    computed from their definition in float64. If they differ by more than AGREEMENT, or a factor is
    not positive definite in float32, all is computed in float64.
    """
    try:
        return _eliminate(C, W, count, ridge, torch.float32)
    except torch.linalg.LinAlgError:
        return _eliminate(C, W, count, ridge, torch.float64)


def _eliminate(C: Tensor, W: Tensor, count: int, ridge: float, dtype: torch.dtype) -> Elimination:
    """`eliminate` in one dtype; raises LinAlgError where float32 is not enough.

    P is not changed: what was dropped is kept as X, P less X Xᵀ being the present inverse. Of it a
    step needs only the diagonal and the dropped rows.
    """
    n = len(C)
    power = C.diagonal() + ridge
    P = torch.cholesky_inverse(torch.linalg.cholesky(_scaled(C, power, dtype)))
    V = W * power.sqrt()[:, None]
    unit = V.square().mean().sqrt()
    unit = torch.where(unit > 0, unit, 1.0)
    V = (V / unit).to(dtype)
    left, diagonal = torch.arange(n, device=C.device), P.diagonal().clone()
    X, done = P.new_empty(n, count), 0
    rows, costs, sizes = [left[:0]], [V.new_zeros(V.shape[1], dtype=torch.float64)], []
    while done < count:
        taken = min(max(1, n // STEPS), count - done)
        stay = n - done - taken
        scores = torch.linalg.vector_norm(V, dim=1).square() / diagonal
        gone = torch.sort(scores, stable=True).indices[:taken]
        own, V_gone, X_gone = P[left[gone]], V[gone], X[gone, :done]
        root = own[:, left[gone]].addmm_(X_gone, X_gone.T, alpha=-1)
        root = torch.linalg.cholesky(root)
        rows.append(left[gone])
        # The last rows take the places of the dropped ones, so that no others are moved.
        last = torch.arange(stay, stay + taken, device=C.device)
        free, last = gone[gone < stay], last[~torch.isin(last, gone)]
        for Z in (left, diagonal, V, X[:, :done]):
            Z[free] = Z[last]
        left, diagonal, V = left[:stay], diagonal[:stay], V[:stay]
        across = own[:, left].addmm_(X_gone, X[:stay, :done].T, alpha=-1)
        across = torch.linalg.solve_triangular(root, across, upper=False)
        lost = torch.linalg.solve_triangular(root, V_gone, upper=False)
        V.addmm_(across.T, lost, alpha=-1)
        X[:stay, done : done + taken] = across.T
        diagonal -= across.square().sum(0)
        costs.append(lost.double().square().sum(0))
        sizes.append(taken)
        done += taken
    # What is left belongs to the inverse of C restricted to it, so that its loss needs no inverse.
    V = V.double() * unit / power.sqrt()[left][:, None]
    rest = (V * (C[left][:, left] @ V)).sum(0) + ridge * V.square().sum(0)
    lost = torch.stack(costs) * unit.square()
    whole = lost.sum(0) + rest
    if dtype == torch.float32:
        _require_agreement(C, W, ridge, left, V, lost.sum(0), whole)
    sizes = torch.tensor(sizes, dtype=torch.long, device=C.device)
    steps = (lost[1:].sum(1) / sizes).repeat_interleave(sizes)
    losses = torch.cat((steps.new_zeros(1), steps.cumsum(0)))
    return Elimination(torch.cat(rows), losses, _without_ridge(whole.sum(), C, W, ridge))


def _scaled(C: Tensor, power: Tensor, dtype: torch.dtype) -> Tensor:
    """C + λ 1 with its diagonal, `power`, scaled to 1; in another dtype, of which C has no copy."""
    scale = power.rsqrt()
    scaled = torch.empty_like(C, dtype=dtype)
    for start in range(0, len(C), CHUNK):
        rows = slice(start, start + CHUNK)
        scaled[rows] = C[rows] * scale[rows, None] * scale
    scaled.diagonal().fill_(1.0)
    return scaled


def _require_agreement(
    C: Tensor, W: Tensor, ridge: float, left: Tensor, V: Tensor, lost: Tensor, whole: Tensor
) -> None:
    """Raise LinAlgError unless the losses (d,) of some columns are what they are in float64.

    `V` are the refitted rows, those `left`. `lost` belongs to them, `whole` to no rows at all.
    """
    d = W.shape[1]
    some = torch.linspace(0, d - 1, min(d, CHECKED), device=C.device).long()
    dropped = W[:, some]
    remains = dropped.clone()
    remains[left] -= V[:, some]
    for found, X in ((lost[some], remains), (whole[some], dropped)):
        # C is symmetric, and few rows times C are faster than C times few columns.
        expected = (X * (X.T @ C).T).sum(0) + ridge * X.square().sum(0)
        if not (found - expected).abs().sum() <= AGREEMENT * expected.sum():
            raise torch.linalg.LinAlgError("float32 is not enough for this elimination")


def _without_ridge(whole: Tensor, C: Tensor, W: Tensor, ridge: float) -> Tensor:
    """tr(Wᵀ C W), of what it is with the ridge; computed anew if the ridge is nearly all of it."""
    own = whole - ridge * W.square().sum()
    return own if own > 0.1 * whole else (W * (C @ W)).sum()
