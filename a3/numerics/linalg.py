"""Numerics shared by all solutions: Gram matrices, low-rank approximation, CR selection.

Pure functions on float64 tensors, independent of models. The convention is y = x W with row
vectors; leading dimensions are batch dimensions (heads, groups). No d × d matrix is ever formed or
decomposed: R^½ W has only h columns, so a solution needs only the h × h Gram matrix Wᵀ R W. This is
the autocorrelation of x W, biases included.
"""

import torch
from torch import Tensor

# Eigenvalues below this share of the largest are rounding noise of a float64 Gram matrix.
NOISE = 1e-14

# Columns of a product with a triangular matrix that are computed together.
BLOCK = 512


def gram_factor(G: Tensor) -> tuple[Tensor, Tensor]:
    """C and C⁻¹ with G = Cᵀ C, both (..., h, h), by eigendecomposition.

    The columns are first scaled to unit length, so that a channel's scale costs no precision. If G
    is singular (fewer tokens than dimensions, a dead channel), eigenvalues below its rounding noise
    are raised to that level, so that C⁻¹ C = 1 and full rank returns the original weights.
    """
    scale = G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(G / (scale[..., :, None] * scale[..., None, :]))
    floor = values[..., -1:].clamp(min=0) * NOISE
    # If G is zero, all bases are equally good, so take the identity.
    values = torch.where(floor > 0, torch.maximum(values, floor), 1.0)
    root = values.sqrt()
    C = root[..., None] * vectors.mT * scale[..., None, :]
    return C, vectors / root[..., None, :] / scale[..., None]


def shared_subspace(G: Tensor, K: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r replacement of a product S W P, as an encoder and a decoder of W P.

    Given G = Wᵀ Sᵀ S W and K = Σᵢ Pᵢ Pᵢᵀ (both (..., h, h)), returns E (..., h, r) and D (..., r,
    h) that minimise Σᵢ ‖S W (1 − E D) Pᵢ‖²: W becomes W E and every Pᵢ becomes D Pᵢ. This is the
    paper's R^-½ SVD_r(R^½ W P) (Theorems 2 and 3), and its joint SVD over the heads of a group:
    with G = Cᵀ C, the left singular vectors U of S W [P₁ … P_g] are those of C [P₁ … P_g], that is
    the eigenvectors of the h × h matrix C K Cᵀ; E = C⁻¹ U_r, D = U_rᵀ C. Only C, which is h × h, is
    inverted; K may be singular. Directions are scaled to be equally large in E and D. Otherwise one
    that has hardly any energy would be 1e7 times larger in E and overflow half precision.
    """
    C, inverse = gram_factor(G)
    core = C @ K @ C.mT
    U = torch.linalg.eigh(_symmetric(core)).eigenvectors.flip(-1)[..., :rank]
    E, D = inverse @ U, U.mT @ C
    # Scaling by powers of two is exact.
    size = torch.exp2((D.norm(dim=-1).log2() - E.norm(dim=-2).log2()).div(2).round())
    return E * size[..., None, :], D / size[..., None]


def subspace_error(G: Tensor, K: Tensor, E: Tensor, D: Tensor) -> Tensor:
    """Σᵢ ‖S W (1 − E D) Pᵢ‖² / Σᵢ ‖S W Pᵢ‖² of `shared_subspace`'s problem, over all batches."""
    residual = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device) - E @ D
    return relative((residual * (G @ residual @ K)).sum(), (G * K).sum())


def two_factors(
    W: Tensor, R: Tensor, rank: int, of_output: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-r product A B in place of one matrix W (m, n), by the metric R of its input.

    Returns A (m, r), B (r, n), which minimise tr((W - A B)ᵀ R (W - A B)), and the loss by rank: its
    entry r is the minimum. R is (m, m) or, where it is diagonal, (m,); or Wᵀ R W (n, n), where that
    is known of the output. SVD_r(R^½ W) and R^-½ of it are had from one eigendecomposition of
    min(m, n) dimensions: V of Wᵀ R W = V Λ Vᵀ makes R^½ W V_r V_rᵀ the best approximation of
    R^½ W, so that W V_r and V_rᵀ need no inverse of R.
    """
    m, n = W.shape
    if of_output or n < m:
        M = R if of_output else W.mT @ (R[:, None] * W if R.dim() == 1 else R @ W)
        values, V = torch.linalg.eigh(_symmetric(M))
        V = V.flip(-1)[:, :rank]
        A, B = W @ V, V.mT
    else:
        C, inverse = gram_factor(torch.diag(R) if R.dim() == 1 else R)
        values, U = torch.linalg.eigh(_symmetric(C @ (W @ W.mT) @ C.mT))
        U = U.flip(-1)[:, :rank]
        A, B = inverse @ U, U.mT @ (C @ W)
    return A, B, torch.cat((values.new_zeros(1), values.clamp(min=0).cumsum(0))).flip(0)


def _symmetric(G: Tensor) -> Tensor:
    """G made exactly symmetric, without rounding errors."""
    return (G + G.mT) / 2


def ridge_leverage(C: Tensor, ridge: float) -> Tensor:
    """The diagonal of C (C + λ 1)⁻¹: C (n, n) positive semidefinite to (n,)."""
    return 1 - ridge * inverse(C, ridge).diagonal()


def ridge_of(C: Tensor, share: float) -> float:
    """λ for the autocorrelation C (n, n), as a share of its mean square; not 0, even if C = 0."""
    return share * C.diagonal().mean().item() or 1.0


def take_over(
    C: Tensor, kept: Tensor, W: Tensor, ridge: float = 0.0, F: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Least-squares refit of the kept rows of W, and what is lost.

    C (n, n) is the autocorrelation of the input of W (n, d); S are the `kept` (r,) channels, D the
    others. The rows are W_S + M with M = (C_SS + λ 1)⁻¹ C_SD W_D. The ridge λ pulls towards W_S,
    and 0 gives (C_SS)⁻¹ C_S: W. A singular C_SS is regularised at the level of its rounding noise,
    after its channels are scaled to equal size: that of float64, or of stored sums
    (a3.rxx.packed) if it made an eigenvalue negative. If nothing is dropped, W is returned
    unchanged.

    The loss is tr(Xᵀ C X F) of the errors X, which are W_D and -M; F (d, d) is 1 if it is None. As
    C_SS M = C_SD W_D - λ M, it needs no product with C_SS.
    """
    if len(kept) == len(C):
        return W[kept], C.new_zeros(())
    dropped = torch.ones(len(C), dtype=torch.bool, device=C.device)
    dropped[kept] = False
    power = C.diagonal()[kept] + ridge
    scale = torch.where(power > 0, power, 1.0).sqrt()
    lift = NOISE * len(kept) + ridge / scale.square() + (power <= 0).to(C.dtype)
    W_D, C_S = W[dropped], C[kept]
    target = (C_S[:, dropped] @ W_D).div_(scale[:, None])
    C_SS = C_S[:, kept].div_(scale[:, None]).div_(scale)
    del C_S
    C_SS.diagonal().add_(lift)
    root, failed = torch.linalg.cholesky_ex(C_SS)
    if failed:
        raised = -2 * torch.linalg.eigvalsh(C_SS)[0]
        C_SS.diagonal().add_(raised)
        lift += raised
        root = torch.linalg.cholesky(C_SS)
    M = torch.cholesky_solve(target, root)
    # C_SS M = target - lift M, of channels scaled to equal size.
    gained = target.addcmul_(lift[:, None], M)
    lost = _trace(W_D, C[dropped][:, dropped] @ W_D, F) - _trace(M, gained, F)
    return W[kept] + M / scale[:, None], lost.clamp(min=0)


def _trace(X: Tensor, Y: Tensor, F: Tensor | None) -> Tensor:
    """tr(Xᵀ Y F) of symmetric Xᵀ Y and F, so that half of F is enough; F is 1 if it is None."""
    if F is None:
        return (X * Y).sum()
    half = F.tril()
    half.diagonal().div_(2)
    return 2 * (times_root(X, half) * Y).sum()


def inverse(C: Tensor, ridge: float) -> Tensor:
    """(C + λ 1)⁻¹ of C (n, n), positive semidefinite."""
    root = C.clone()
    root.diagonal().add_(ridge)
    root = torch.linalg.cholesky(root)
    return torch.cholesky_inverse(root)


def root_of(M: Tensor) -> Tensor:
    """Lower triangular B (d, d) with B Bᵀ = M, so that ‖X B‖² = tr(X M Xᵀ).

    M is positive semidefinite up to its rounding: a Cholesky factor of M with as little added to
    its diagonal as makes it definite, in shares of the diagonal from float64's noise on.
    """
    size = M.diagonal().clamp(min=0).sqrt()
    scale = torch.where(size > 0, size, 1.0)
    scaled = _symmetric(M) / scale / scale[:, None]
    share = NOISE * len(M)
    scaled.diagonal().add_(share)
    root, failed = torch.linalg.cholesky_ex(scaled)
    while failed:
        scaled.diagonal().add_(9 * share)
        share *= 10
        root, failed = torch.linalg.cholesky_ex(scaled)
    return size[:, None] * root


def times_root(W: Tensor, B: Tensor) -> Tensor:
    """W B for a lower triangular B (d, d), without most of the products with its zeros."""
    d = len(B)
    product = W.new_empty(len(W), d)
    for start in range(0, d, BLOCK):
        columns = slice(start, start + BLOCK)
        torch.matmul(W[:, start:], B[start:, columns], out=product[:, columns])
    return product


def relative(error: Tensor, total: Tensor) -> Tensor:
    """error / total; 0 if total is 0."""
    return torch.where(total > 0, error / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def keep_best(score: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` largest scores along the last dimension.

    Ties go to the lower index, so equal inputs always give equal choices.
    """
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values
