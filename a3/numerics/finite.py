"""The check for NaN and Inf, which weights and statistics must pass before they are used."""

import torch
from torch import Tensor

from a3.core.errors import A3Error


def require_finite(value: Tensor, what: str, expected: str) -> None:
    """Raise A3Error if a tensor holds NaN or Inf.

    `what` names the tensor and its file; `expected` says what was expected, and what to do.
    """
    # Minimum or maximum is NaN if any number is; unlike a mask, they take no memory.
    if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
        raise A3Error(f"{what} holds NaN or Inf; expected {expected}")
