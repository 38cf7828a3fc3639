"""Two factors in place of one matrix: the baselines that compress each matrix separately.

They differ only in the metric R of a matrix's input. The product A B (rank r) is the best
approximation of W (m, n) in this metric: min ‖R^½ (W - A B)‖. a3.solutions.modes says which
statistic R is:

- `svd`: R = 1.
- `fwsvd`: a diagonal, the Fisher information of a row: Σ (∂L/∂W_ij)² over j (Hsu et al. 2022,
  arXiv 2207.00112, equation 7).
- `asvd`: a diagonal of mean absolute activations: S_ii = (mean |x_i|)^α with α = ½, and R = S²
  (Yuan et al. 2023, arXiv 2312.05821, section 3.2), at the same ratio everywhere.
- `svd-llm`: the autocorrelation E[xᵀx] (Wang et al. 2024, arXiv 2403.07378, section 3.1: whitening;
  its Cholesky factor S is one of many R^½, and the solution is the same with all of them).
- `svd-llm-v2`: the same optimum, which its two SVDs in a row reach too, with its own ratio for
  each matrix (Wang et al. 2025, arXiv 2503.12340, algorithm 1).

Palu's K without fusion (`palu-rope`; Chang et al. 2024, arXiv 2407.21118, section 3: joint heads)
is `svd-llm` of only the key projection; the cache holds the latent, r / h of the keys' size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from a3.core.errors import A3Error
from a3.numerics.linalg import relative, two_factors


@dataclass(frozen=True)
class Matrix:
    """One matrix W (m, n), without its bias, and the metric R of its input, or of its output.

    R is as `a3.numerics.linalg.two_factors` takes it, None for R = 1.
    """

    W: Tensor
    R: Tensor | None
    of_output: bool = False

    def factor(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """A (m, r), B (r, n), and the loss by rank."""
        R = torch.ones(len(self.W), dtype=self.W.dtype) if self.R is None else self.R
        return two_factors(self.W, R, min(rank, *self.W.shape), self.of_output)

    def rank_for(self, kept: float, multiple: int) -> int | None:
        """Like `rank_for` of its shape."""
        m, n = self.W.shape
        return rank_for((m, n), kept, multiple)


@dataclass(frozen=True)
class Factors:
    """encoder (m, r) and decoder (r, n) of each matrix; the share of Σ ‖R^½ W‖² that is lost."""

    factors: dict[str, tuple[Tensor, Tensor]]
    relative_error: float


def rank_for(shape: tuple[int, int], kept: float, multiple: int = 1) -> int | None:
    """The rank whose factors have `kept` of the weights of a matrix (m, n); None if all stay.

    m n weights become r (m + n), so that r is kept · m n / (m + n), rounded to a `multiple`.
    """
    m, n = shape
    return None if kept >= 1 else max(1, round(kept * m * n / (m + n) / multiple)) * multiple


def factorise(matrices: Mapping[str, Matrix], ranks: Mapping[str, int | None]) -> Factors:
    """Factor each matrix that has a rank; the others are unchanged and have no error."""
    factors = {}
    lost = whole = torch.zeros((), dtype=torch.float64)
    for name, matrix in matrices.items():
        rank = ranks[name]
        A, B, losses = matrix.factor(rank or 0)
        whole = whole + losses[0]
        if rank is not None:
            factors[name] = A, B
            lost = lost + losses[min(rank, len(losses) - 1)]
    return Factors(factors, relative(lost, whole).item())


def shares(losses: list[float], kept: float) -> list[float]:
    """The share that each of several matrices of one type keeps, if they keep `kept` in total.

    `losses` are the minimal ‖X (W - A B)‖ over the calibration tokens X if all keep the same share.
    SVD-LLM v2, algorithm 1: the share to remove is proportional to 1 / log(loss), so less is
    removed from matrices that lose much. Raises A3Error if a loss is not above 1, for which the
    published formula has no meaning.
    """
    if min(losses) <= 1:
        raise A3Error(
            f"svd-llm-v2: the error of a matrix is {min(losses):.3g} (norm over all calibration "
            "tokens), but the formula requires more than 1. Use more tokens, or the mode svd-llm."
        )
    weights = 1 / torch.tensor(losses, dtype=torch.float64).log()
    removed = len(losses) * (1 - kept) * weights / weights.sum()
    return (1 - removed).clamp(min=0).tolist()
