"""The check that numbers are finite, which weights and statistics pass before they are used."""

import torch
from torch import Tensor

from a3.core.errors import A3Error


def require_finite(value: Tensor, what: str, expected: str) -> None:
    """Raise A3Error if a tensor holds NaN or Inf.

    `what` names it, with its file; `expected` says what should be there, and what to do.
    """
    # One of the two is NaN where any number is; unlike a mask, they take no memory.
    if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
        raise A3Error(f"{what} holds NaN or Inf; expected {expected}")
