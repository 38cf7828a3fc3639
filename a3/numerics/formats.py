"""Simulated low-bit number formats: a tensor is rounded to the values that a format can represent.

Blocks and groups are along the last dimension; the last one may be short. Names in configs:

- `bfp4/16`: block floating point (MXINT; LQER's `block_fp`): 16 numbers share an exponent of 8 bits
  and have a sign and 3 bits each. The exponent is the least e with max |x| ≤ 2^e, from -127 to 128;
  a number is the nearest multiple of 2^(e - 3), at most 7 of them.
- `int4/128`: integers from -7 to 7, times a scale of 16 bits (bfloat16) for each group of 128.
- `uint4/128`: affine: integers from 0 to 15 less a zero point of 4 bits, times such a scale.
- `e4m3`: minifloat, sign, exponent and mantissa, with subnormals; all codes are finite numbers, and
  what is larger saturates. e2m1, e2m3 and e3m2 are those of the OCP MX formats.
- `none`: unchanged.

`row` in place of a number means the whole row. Ties are always rounded to even. The published code
differs (Zhang et al. 2024, arXiv 2402.02446, ChengZhang-98/lqer): it adds 1e-9 to each |x|, which
rounds small numbers up, and a minifloat that rounds up to the next power of two stays below it.
Libraries have some of these formats, of other widths, blocks or rounding (float8 of torch has one
NaN in e4m3, MX blocks of torchao are 32 long with the exponent rounded down).
"""

import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from a3.core.errors import A3Error

EXPONENT_BITS = 8

SCALE_BITS = 16

SPELLED = (
    r"(?P<encoding>bfp|int|uint)(?P<width>[2-8])/(?P<block>[1-9]\d*|row)|e(?P<e>[2-5])m(?P<m>[1-7])"
)


@dataclass(frozen=True)
class Format:
    """encoding: bfp, int, uint, float or none; bits a number; numbers a block, None for the row."""

    encoding: str
    width: int = 0
    block: int | None = None
    exponent: int = 0

    def bits(self, rows: int, columns: int, plain: int) -> int:
        """Bits of `rows` rows of `columns` numbers, blocks' exponents, scales and zeros included.

        `plain` is the width in bits of an unchanged number.
        """
        if self.encoding == "none":
            return rows * columns * plain
        shared = {"bfp": EXPONENT_BITS, "int": SCALE_BITS, "uint": SCALE_BITS + self.width}
        blocks = -(-columns // (self.block or columns))
        return rows * (columns * self.width + blocks * shared.get(self.encoding, 0))


@cache
def parse_format(spelled: str) -> Format:
    """A format from its name; raises A3Error for an invalid name."""
    if spelled == "none":
        return Format("none")
    found = re.fullmatch(SPELLED, spelled)
    if found is None:
        raise A3Error(
            f"number format {spelled!r} is not known. Expected none, bfp4/16, int4/128, uint4/128 "
            "(2 to 8 bits; a block's length or row), or e4m3 (bits of exponent and mantissa)."
        )
    if found["encoding"] is None:
        exponent, mantissa = int(found["e"]), int(found["m"])
        return Format("float", 1 + exponent + mantissa, exponent=exponent)
    block = None if found["block"] == "row" else int(found["block"])
    return Format(found["encoding"], int(found["width"]), block)


def quantise(x: Tensor, spelled: str) -> Tensor:
    """The values of x (..., n) in a format, in x's dtype; computed in float32 at least."""
    to = parse_format(spelled)
    if to.encoding == "none":
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if to.encoding == "float":
        return minifloat(wide, to.exponent, to.width - 1 - to.exponent).to(x.dtype)
    n = x.shape[-1]
    block = min(to.block or n, n)
    short = -n % block
    padded = torch.nn.functional.pad(wide, (0, short)) if short else wide
    blocks = {"bfp": block_floating_point, "int": symmetric, "uint": affine}[to.encoding](
        padded.unflatten(-1, (-1, block)), to.width
    )
    return blocks.flatten(-2)[..., :n].to(x.dtype)


def power_of_two(exponent: Tensor, like: Tensor) -> Tensor:
    """2^exponent, exactly."""
    return torch.ldexp(torch.ones_like(like), exponent)


def block_floating_point(blocks: Tensor, width: int) -> Tensor:
    """blocks (..., n), each with one exponent."""
    peak = blocks.abs().amax(-1, keepdim=True)
    # peak = mantissa · 2^exponent, the mantissa from ½ to below 1.
    mantissa, exponent = torch.frexp(peak)
    exponent = (exponent - (mantissa == 0.5).int()).clamp(-127, 128)
    step = power_of_two(exponent - (width - 1), peak)
    limit = 2 ** (width - 1) - 1
    return (blocks / step).round_().clamp_(-limit, limit).mul_(step)


def symmetric(blocks: Tensor, width: int) -> Tensor:
    """blocks (..., n), each with one scale: the largest magnitude is the largest integer."""
    limit = 2 ** (width - 1) - 1
    scale = stored_scale(blocks.abs().amax(-1, keepdim=True) / limit)
    return (blocks / scale).round_().clamp_(-limit, limit).mul_(scale)


def affine(blocks: Tensor, width: int) -> Tensor:
    """blocks (..., n), each with one scale and a zero point; 0 can always be represented."""
    top = 2**width - 1
    low, high = (x.unsqueeze(-1) for x in blocks.aminmax(dim=-1))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = stored_scale((high - low) / top)
    zero = (-low / scale).round().clamp(0, top)
    return (blocks / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale)


def stored_scale(scale: Tensor) -> Tensor:
    """A scale, rounded to 16 bits; 1 for a group of zeros."""
    stored = scale.to(torch.bfloat16).to(scale.dtype)
    return torch.where(stored > 0, stored, 1.0)


def minifloat(x: Tensor, exponent: int, mantissa: int) -> Tensor:
    """The nearest number of 1 + `exponent` + `mantissa` bits."""
    bias = 2 ** (exponent - 1) - 1
    top = 2.0 ** (2**exponent - 1 - bias) * (2 - 2.0**-mantissa)
    # |x| = m · 2^e with m from ½ to below 1, so that the bit before the point is worth 2^(e - 1).
    least = (torch.frexp(x)[1] - 1).clamp(min=1 - bias)
    step = power_of_two(least - mantissa, x)
    return (x / step).round_().mul_(step).clamp_(-top, top)
