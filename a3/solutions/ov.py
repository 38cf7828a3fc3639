"""OV: a smaller head for the attention output (paper section 3.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from a3.models.family import AttentionWeights
from a3.numerics.elimination import Elimination, drop
from a3.numerics.linalg import (
    inverse,
    relative,
    ridge_of,
    root_of,
    shared_subspace,
    subspace_error,
    take_over,
    times_root,
)

# Damping of elimination, and so of the predicted loss, as a share of the o_proj input's mean
# square. It equals that of `fisher`, because QK and OV share the budget of the cache.
ELIMINATION = 1e-2


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
    """Like `xkv` with R = 1: uses only the weights (CLOVER)."""
    return _solve(weights, weights.v.mT @ weights.v, rank)


def axkv(weights: AttentionWeights, S: Tensor, rank: int) -> OVSolution:
    """Like `xkv` with R_p, the autocorrelation of the attention-weighted input.

    W_vᵀ R_p,i W_v is the autocorrelation of head i's slice of the o_proj input: S (H, h, h).
    The heads of a group share one value factor, so the mean over heads is used (exact for MHA).
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
    decomposition). It does not use W_o; `relative_error` does, as in `xkv`.
    """
    alone = torch.eye(Gv.shape[-1], dtype=Gv.dtype, device=Gv.device).expand_as(Gv)
    return _shrink(weights, Gv, *shared_subspace(Gv, alone, rank))


def joint(
    weights: AttentionWeights,
    R: Tensor,
    F: Tensor,
    damping: float,
    rank: int,
    known: Elimination | None = None,
) -> OVSolution:
    """Eliminate value directions of each group; refit W_o of all heads together each time.

    R (H h, H h) is the autocorrelation of the o_proj input, all heads: the refit uses the
    correlation between heads, while `axkv` treats each head alone. F (d, d), the autocorrelation of
    the loss's gradients at the output, weights the errors. `damping` is λ of the last refit as a
    share of R's mean square. `known` is what `joint_losses` returned for this rank or a smaller
    one.
    """
    basis, _, whole = known or joint_losses(weights, R, F, rank)
    H, h, _ = weights.o.shape
    T = basis.repeat_interleave(H // len(basis), dim=0)
    # In the new coordinates, the kept dimensions of each head come first.
    kept = torch.arange(H, device=R.device)[:, None] * h + torch.arange(rank, device=R.device)
    W = (T.mT @ weights.o).flatten(0, 1)
    C = (T.mT @ R.unflatten(0, (H, h))).flatten(0, 1)
    C = (C.unflatten(1, (H, h)).movedim(1, 0) @ T).movedim(0, 1).flatten(1)
    o, lost = take_over(C, kept.flatten(), W, ridge_of(R, damping), F)
    return OVSolution(
        v=weights.v @ basis[..., :rank],
        o=o.unflatten(0, (H, rank)),
        relative_error=relative(lost, 2 * whole).item(),
    )


def joint_losses(weights: AttentionWeights, R: Tensor, F: Tensor, least: int) -> Elimination:
    """Orthogonal bases (G, h, h), whose last columns are eliminated first, and the loss of each.

    Optimal brain surgeon (a3.numerics.elimination) for directions u of the values in place of
    channels: with P = (R + λ 1)⁻¹ and refitted V (H h, d), dropping u of a group costs about
    uᵀ (Σᵢ V_i F V_iᵀ) u / uᵀ (Σᵢ P_ii) u over its heads i, the least generalised eigenvalue; one of
    each group goes at a time, and then exactly, all heads together. The loss (h - least + 1,) is
    ½ tr(Xᵀ (R + λ 1) X F) after each.
    """
    H, h, _ = weights.o.shape
    groups = len(weights.v)
    P = inverse(R, ridge_of(R, ELIMINATION))
    V = times_root(weights.o.flatten(0, 1), root_of(F))
    whole = (V * (R @ V)).sum() / 2
    # V_i F V_iᵀ and P_ii of each head, (H, h, h).
    A = V.unflatten(0, (H, h)) @ V.unflatten(0, (H, h)).mT
    B = P.unflatten(1, (H, h)).unflatten(0, (H, h)).diagonal(dim1=0, dim2=2).movedim(2, 0).clone()
    Q = torch.eye(h, dtype=R.dtype, device=R.device).expand(groups, h, h)
    gone, losses = Q[..., :0], [R.new_zeros(())]
    for _ in range(h - least):
        u = _least_direction(*(Q.mT @ weights.grouped(M).sum(1) @ Q for M in (A, B)))
        gone = torch.cat((Q @ u, gone), dim=-1)
        Q = Q @ torch.linalg.qr(u, mode="complete").Q[..., 1:]
        U = gone[..., 0].repeat_interleave(H // groups, dim=0)
        # P is symmetric, and its rows are faster to add than its columns.
        PU, UV = (torch.einsum("ij,ijd->id", U, Z.unflatten(0, (H, h))) for Z in (P, V))
        PU = PU.T
        UPU = torch.einsum("ij,ijk->ik", U, PU.unflatten(0, (H, h)))
        X, Y = (Z[0] for Z in drop(*(Z[None] for Z in (P, V, PU, UV, UPU))))
        own, back = (Z.unflatten(0, (H, h)) for Z in (X, (Y @ V.T).T + X @ (Y @ Y.T) / 2))
        change = back @ own.mT
        A -= change + change.mT
        B -= own @ own.mT
        losses.append(Y.square().sum() / 2)
    return Elimination(torch.cat((Q, gone), dim=-1), torch.stack(losses).cumsum(0), whole)


def _least_direction(A: Tensor, B: Tensor) -> Tensor:
    """Unit u (…, w, 1) of the least uᵀ A u / uᵀ B u; A, B (…, w, w), B positive definite."""
    root = torch.linalg.cholesky((B + B.mT) / 2)
    core = torch.linalg.solve_triangular(root, A, upper=False)
    core = torch.linalg.solve_triangular(root, core.mT, upper=False)
    first = torch.linalg.eigh((core + core.mT) / 2).eigenvectors[..., :1]
    u = torch.linalg.solve_triangular(root.mT, first, upper=True)
    return u / u.norm(dim=-2, keepdim=True)


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
