"""Triangles in less than a fifth of the bytes of a float64 matrix, at a stated error.

Of S = Σ xᵀx (n, n) a file holds the diagonal in float64 and the strict lower triangle as
correlations c_ij = S_ij / sqrt(S_ii S_jj) in 24 bits: the integer nearest to c (2²³ - 1), row by
row, each three bytes, the lowest first. safetensors has no such type, so this is a uint8 tensor
(n (n - 1) / 2, 3). A channel that is always zero has correlation 0 with all others.

The error of S_ij is at most sqrt(S_ii S_jj) / (2²⁴ - 2), half a step, whatever the scales of
channels. (A correlation beyond ±1, which only rounding of the sums can make, becomes ±1.) In all
1.5 n² + 6.5 n bytes. What a triangle unpacks to packs to the same bytes again.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from a3.rxx.sums import Triangle, panels

# Steps from correlation 0 to 1.
STEPS = 2**23 - 1


def pack(triangle: Triangle) -> tuple[Tensor, Tensor]:
    """The diagonal (n,) float64 and the packed correlations (n (n - 1) / 2, 3) uint8, on the CPU.

    All sums must be finite. One panel is copied at a time.
    """
    diagonal = triangle.diagonal()
    scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    n = len(diagonal)
    packed = np.empty((n * (n - 1) // 2, 3), np.uint8)
    for start, stop, rows in triangle:
        correlations = (rows * (STEPS * scale[start:stop, None])).mul_(scale[:stop])
        whole = correlations.round_().clamp_(-STEPS, STEPS).to(torch.int32).cpu().numpy()
        parts = whole.astype("<i4", copy=False).view(np.uint8).reshape(*whole.shape, 4)
        for i in range(start, stop):
            row = packed[place(i) : place(i + 1)]
            # One byte after the other, because numpy copies long runs faster than threes.
            for byte in range(3):
                row[:, byte] = parts[i - start, :i, byte]
    return diagonal.cpu(), torch.from_numpy(packed)


def unpack(diagonal: Tensor, packed: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Panels of the triangle as `Triangle` has them: first row, first row after, rows float64.

    What lies above the diagonal is 0.
    """
    n, root = len(diagonal), diagonal.sqrt()
    for start, stop in panels(n):
        part = packed[place(start) : place(stop)].numpy()
        # The bytes become the upper three of four, so that a shift extends the sign.
        wide = np.zeros((len(part), 4), np.uint8)
        for byte in range(3):
            wide[:, byte + 1] = part[:, byte]
        whole = torch.from_numpy(wide.view("<i4")[:, 0].astype(np.int32, copy=False) >> 8)
        rows = torch.zeros(stop - start, stop, dtype=torch.float64)
        for i in range(start, stop):
            rows[i - start, :i] = whole[place(i) - place(start) : place(i + 1) - place(start)]
        rows *= root[start:stop, None] / STEPS
        rows *= root[:stop]
        rows.diagonal(start).copy_(diagonal[start:stop])
        yield start, stop, rows


def square(diagonal: Tensor, packed: Tensor) -> Tensor:
    """The symmetric matrix (n, n) float64 of a packed triangle."""
    n = len(diagonal)
    whole = torch.empty(n, n, dtype=torch.float64)
    for start, stop, rows in unpack(diagonal, packed):
        whole[start:stop, :stop] = rows
        whole[:start, start:stop] = rows[:, :start].T
        whole[start:stop, start:stop] += rows[:, start:].tril(-1).T
    return whole


def place(row: int) -> int:
    """Where a row of a strict lower triangle begins: rows 0, 1, 2 … have 0, 1, 2 … entries."""
    return row * (row - 1) // 2
