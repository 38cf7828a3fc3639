"""Number formats against their definitions, number by number, in exact arithmetic."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from a3.core.errors import A3Error
from a3.numerics.formats import parse_format, quantise


def nearest(x, values):
    """Of ascending `values` the nearest to x; of two as near the one of even place."""
    best = min(abs(x - value) for value in values)
    found = [i for i, value in enumerate(values) if abs(x - value) == best]
    return values[next((i for i in found if i % 2 == 0), found[0])]


def block_of(numbers, width):
    """Block floating point, as a3.numerics.formats defines it."""
    peak, e = max(map(abs, numbers)), -127
    while peak > Fraction(2) ** e and e < 128:
        e += 1
    step, limit = Fraction(2) ** (e - width + 1), 2 ** (width - 1) - 1
    codes = range(-limit, limit + 1)
    return [step * min(codes, key=lambda m: (abs(x - step * m), m % 2)) for x in numbers]


def minifloats(exponent, mantissa):
    """All numbers that are not negative, ascending: place and code are one."""
    bias = 2 ** (exponent - 1) - 1
    return [
        Fraction(2) ** (max(e, 1) - bias) * (Fraction(m, 2**mantissa) + (e > 0))
        for e in range(2**exponent)
        for m in range(2**mantissa)
    ]


def exactly(x):
    """A tensor's numbers."""
    return [Fraction(value) for value in x.flatten().tolist()]


def samples(n):
    """Normal numbers of all sizes, with zeros, powers of two and numbers halfway between others."""
    torch.manual_seed(0)
    x = torch.randn(n, 16) * torch.exp2(torch.randint(-20, 20, (n, 1)).float())
    x[0] = 0
    x[1] = torch.arange(16) / 2
    x[2, 1:] = 0
    x[3] = torch.exp2(torch.arange(16).float())
    x[4] = torch.linspace(-3.5, 4.0, 16)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_block_floating_point_is_what_it_says_bit_by_bit(width, dtype):
    x = samples(12).to(dtype)
    x[5], x[6] = 1e-37, 2.0**127
    found = quantise(x, f"bfp{width}/16")
    assert found.dtype == dtype
    for row, got in zip(x, found, strict=True):
        assert exactly(got) == block_of(exactly(row), width)


def test_the_exponent_of_a_block_is_one_for_its_numbers_only():
    x = torch.tensor([1.0, 0.3, 100.0, 0.3, 7.0])
    # The last block is of one number; 1, 128 and 8 are the powers of two above.
    expected = [0.875, 0.25, 96.0, 0.0, 7.0]
    assert quantise(x, "bfp4/2").tolist() == expected
    assert quantise(x, "bfp4/row").tolist() == [0.0, 0.0, 96.0, 0.0, 0.0]


@pytest.mark.parametrize("bits", [(2, 1), (2, 3), (3, 2), (4, 3), (5, 2)])
def test_minifloats_are_the_nearest_of_all_codes(bits):
    codes = minifloats(*bits)
    between = [(a + b) / 2 for a, b in pairwise(codes)]
    near = [x * f for x in codes + between for f in (Fraction(1), 1 + Fraction(1, 2**20))]
    numbers = torch.tensor([float(x) for x in [*near, codes[-1] * 3]])
    numbers = torch.cat((numbers, -numbers, samples(20).flatten()))
    found = quantise(numbers, "e{}m{}".format(*bits))
    for x, got in zip(exactly(numbers), exactly(found), strict=True):
        assert abs(got) == nearest(abs(x), codes)
        assert got == 0 or (got > 0) == (x > 0)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_symmetric_integers_are_the_nearest_multiples_of_a_scale_of_16_bits(width):
    x, limit = samples(12).double(), 2 ** (width - 1) - 1
    found = quantise(x, f"int{width}/16")
    for row, got in zip(x, found, strict=True):
        scale = (row.abs().max() / limit).bfloat16().double()
        codes = got / scale if scale > 0 else got
        assert torch.equal(codes, codes.round())
        assert codes.abs().max() <= limit
        inside = row.abs() <= limit * scale
        assert ((row - got).abs()[inside] <= scale / 2 * (1 + 1e-9)).all()
        assert (codes.abs()[~inside] == limit).all()


@pytest.mark.parametrize("width", [2, 4, 8])
def test_affine_integers_have_a_zero_and_reach_both_ends(width):
    x, top = samples(12).double(), 2**width - 1
    x[7] = x[7].abs() + 1
    found = quantise(x, f"uint{width}/16")
    assert ((found == 0) >= (x == 0)).all()
    for row, got in zip(x, found, strict=True):
        low, high = min(row.min(), torch.zeros(())), max(row.max(), torch.zeros(()))
        scale = ((high - low) / top).bfloat16().double()
        codes = got / scale if scale > 0 else got
        assert torch.equal(codes, codes.round())
        assert codes.max() - codes.min() <= top
        # The zero point is rounded as well as the number, and the scale to 8 bits.
        assert ((row - got).abs() <= scale * (1 + top * 2.0**-8)).all()


def test_bits_count_exponents_scales_and_zero_points():
    counts = {
        "bfp4/16": 3 * (40 * 4 + 3 * 8),
        "bfp4/row": 3 * (40 * 4 + 8),
        "int4/16": 3 * (40 * 4 + 3 * 16),
        "uint4/16": 3 * (40 * 4 + 3 * 20),
        "e4m3": 3 * 40 * 8,
        "none": 3 * 40 * 32,
    }
    for spelled, expected in counts.items():
        assert parse_format(spelled).bits(3, 40, 32) == expected, spelled


def test_pass_through_is_the_tensor_itself():
    x = samples(20)
    assert quantise(x, "none") is x


@pytest.mark.parametrize(
    "spelled", ["bfp1/16", "bfp4", "int9/16", "e9m3", "e4m0", "mxint8", "bfp4/0", ""]
)
def test_formats_not_known_are_refused(spelled):
    with pytest.raises(A3Error, match=r"is not known\. Expected none"):
        parse_format(spelled)
