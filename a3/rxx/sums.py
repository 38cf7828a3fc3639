"""Σ xᵀx over tokens, as a lower triangle: float32 products of a block, added in float64."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from a3.rxx.kinds import PANEL


def panels(n: int) -> list[tuple[int, int]]:
    """First row of each panel of a triangle (n, n), and its first row after."""
    return [(start, min(start + PANEL, n)) for start in range(0, n, PANEL)]


class Triangle:
    """The lower triangle of Σ xᵀx (n, n), in panels of rows up to their last diagonal entry.

    The product of a block of L tokens is in float32, at full precision (never TF32 or bfloat16),
    and the blocks' products are added in float64. An entry's error is at most L 2⁻²⁴ Σ |x_i x_j|
    over the block to first order, and typically sqrt(L) 2⁻²⁴ or less, since L roundings have random
    signs and a processor sums in parts; errors of different blocks average out. x in bfloat16 or
    float16 loses nothing, because products of two such numbers are exact in float32.

    So half the products of x.T @ x are computed, at twice the rate of float64 (on most GPUs at many
    times its rate), and half a float64 matrix is in memory.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        where = {"dtype": torch.float64, "device": device}
        self.panels = [torch.zeros(stop - start, stop, **where) for start, stop in panels(n)]

    def add(self, x: Tensor) -> None:
        """Add Σ xᵀx of a block: x (L, n), of any dtype."""
        x = x.float()
        with full_float32():
            for panel in self.panels:
                stop = panel.shape[1]
                panel += x[:, stop - len(panel) : stop].T @ x[:, :stop]

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """First row, first row after, and rows (rows, last) of each panel."""
        for panel in self.panels:
            yield panel.shape[1] - len(panel), panel.shape[1], panel

    def diagonal(self) -> Tensor:
        """The diagonal (n,)."""
        return torch.cat([panel.diagonal(start) for start, _, panel in self])


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 at its full precision, whatever the process has chosen for others.

    The setting of each backend, because torch's common one cannot be read after one of these is
    set.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, chosen in zip(backends, before, strict=True):
            backend.fp32_precision = chosen
