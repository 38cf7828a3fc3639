"""Low-rank error correction of a quantised matrix: W ≈ W_q + A B, y = x_q W_q + (x_q A) B.

All methods approximate the error E = W - W_q (m, n), y = x W, by the best rank-k product. They
differ in the metric R of the input: min tr((E - A B)ᵀ R (E - A B)).

- `none`: no A B, only the quantised matrix.
- `lqer-svd`: R = 1 (Zhang et al. 2024, arXiv 2402.02446, L²QER without S).
- `lqer-act`: R = S², where S is the diagonal of activation magnitudes: the maximum over blocks of
  calibration text of the mean of |x_i|, at least 1e-4 (the same paper, appendix A). The published
  scale is also divided by sqrt(min · max), which does not change the result.
- `qera`: R = E[xᵀx], so that the layer's expected output error is minimal for this rank
  (Zhang et al. 2025, arXiv 2410.06040, theorem 1: R^-½ SVD_k(R^½ E)).
"""

import torch
from torch import Tensor

from a3.numerics.linalg import relative, two_factors

LEAST_SCALE = 1e-4


def lqer_svd(E: Tensor, statistic: None) -> Tensor:
    """The metric of plain SVD: (m,) ones."""
    return torch.ones_like(E[:, 0])


def lqer_act(E: Tensor, statistic: Tensor) -> Tensor:
    """The metric of magnitudes (m,): their squares."""
    return statistic.clamp(min=LEAST_SCALE).square()


def qera(E: Tensor, statistic: Tensor) -> Tensor:
    """The metric of the output: the autocorrelation (m, m) itself."""
    return statistic


def repair(E: Tensor, R: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (m, rank) and B (rank, n) of the error E (m, n) by a metric R, (m,) or (m, m), float64.

    The rows of B are the first right singular vectors V of R^½ E, and A = E V: E V Vᵀ is the best
    approximation and needs no inverse of R. Rows of B with equal norms lose least if blocks of
    numbers along k share an exponent; each block of A lies in one column.
    """
    _, B, _ = two_factors(E, R, rank)
    size = B.norm(dim=1, keepdim=True)
    V = B / torch.where(size > 0, size, 1.0)
    return E @ V.mT, V


def output_error(E: Tensor, W: Tensor, R: Tensor) -> float:
    """tr(Eᵀ R E) / tr(Wᵀ R W): the share of the output's power lost to an error E of W."""
    return relative((E * (R @ E)).sum(), (W * (R @ W)).sum()).item()
