"""Low-rank repair of a quantised matrix: W ≈ W_q + A B, y = x_q W_q + (x_q A) B.

All methods take the best rank-k product in place of the error E = W - W_q (m, n), y = x W, and
differ in the metric R of the input by which it is the best: min tr((E - A B)ᵀ R (E - A B)).

- `none`: no A B: the quantised matrix alone.
- `lqer-svd`: R = 1 (Zhang et al. 2024, arXiv 2402.02446, L²QER without S).
- `lqer-act`: R = S², S the diagonal of activation magnitudes: of each block of calibration text
  the mean of |x_i|, and of those the largest, at least 1e-4 (the same, appendix A). The published
  scale is also divided by sqrt(min · max), which changes nothing.
- `qera`: R = E[xᵀx], so that the layer's expected output error is the least there is at this rank
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

    B has the first right singular vectors V of R^½ E as its rows, and A = E V: E V Vᵀ is the best
    approximation, and needs no inverse of R. Rows of B of one size lose least where blocks of
    numbers along k share an exponent; A's blocks are of one column each.
    """
    _, B, _ = two_factors(E, R, rank)
    size = B.norm(dim=1, keepdim=True)
    V = B / torch.where(size > 0, size, 1.0)
    return E @ V.mT, V


def output_error(E: Tensor, W: Tensor, R: Tensor) -> float:
    """tr(Eᵀ R E) / tr(Wᵀ R W): the share of the output's power that an error E of W makes."""
    return relative((E * (R @ E)).sum(), (W * (R @ W)).sum()).item()
