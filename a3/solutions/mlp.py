"""MLP: keep r of n intermediate channels (paper section 3.3)."""

from dataclasses import dataclass

from torch import Tensor

from a3.linalg import keep_best, relative
from a3.models.family import MLPWeights

# An expert that fewer calibration tokens reached is not compressed: the mean squares of its
# channels would be known to no better than sqrt(2 / 256) = 9 %.
FEWEST_TOKENS = 256
# Columns of W_down that are in float64 at a time.
CHUNK = 256


@dataclass(frozen=True)
class MLPSolution:
    """up and gate (d̂, r), down (r, d); channels (r,) kept, ascending.

    `relative_error` is the dropped share of Σ_j ‖r_j‖² ‖w_j‖²: the functional error without the
    cross terms between dropped channels, which the diagonal of R cannot tell.
    """

    up: Tensor
    gate: Tensor | None
    down: Tensor
    channels: Tensor
    relative_error: float


def rxx_w(weights: MLPWeights, R: Tensor, rank: int) -> MLPSolution:
    """Score ‖r_j‖² ‖w_j‖²: r_j the j-th column of R^½, w_j the j-th row of W_down.

    ‖r_j‖² is R[j, j], so R is the diagonal (n,) of the down-projection input's autocorrelation.
    """
    power = R * row_power(weights.down)
    return _keep_channels(weights, power, power, rank)


def rxx(weights: MLPWeights, R: Tensor, rank: int) -> MLPSolution:
    """Score ‖r_j‖² alone; R is the diagonal (n,)."""
    return _keep_channels(weights, R, R * row_power(weights.down), rank)


def row_power(W: Tensor) -> Tensor:
    """Squared norms of the rows of W (n, d), summed in float64 without a copy of W in it."""
    return sum(columns.double().square().sum(1) for columns in W.split(CHUNK, dim=1))


def _keep_channels(weights: MLPWeights, score: Tensor, power: Tensor, rank: int) -> MLPSolution:
    kept = keep_best(score, rank)
    # Weights lie transposed in memory: so whole rows are copied there.
    return MLPSolution(
        up=weights.up.T[kept].T,
        gate=None if weights.gate is None else weights.gate.T[kept].T,
        down=weights.down.T[:, kept].T,
        channels=kept,
        relative_error=relative(power.sum() - power[kept].sum(), power.sum()).clamp(min=0).item(),
    )
