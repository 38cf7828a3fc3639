"""Devices that torch computes on."""

from a3.core.errors import A3Error


def require_device(name: str, dtype: str) -> None:
    """Raise A3Error if the device does not exist or cannot compute in the dtype."""
    import torch

    try:
        x = torch.ones(2, 2, dtype=getattr(torch, dtype), device=name)
        (x @ x).sum().item()
    # torch raises many types of exceptions for missing devices.
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise A3Error(
            f"device {name!r} cannot compute in {dtype} here ({said}). Take another "
            "device (cpu is always there), or another dtype."
        ) from error
