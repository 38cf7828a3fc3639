"""Sums of float32 products and packed triangles, held to float64: entries, choices, objectives."""

import pytest
import torch
from test_solutions import attention

from a3.models.family import MLPWeights
from a3.numerics.elimination import eliminate
from a3.numerics.linalg import ridge_of, take_over
from a3.rxx.kinds import PANEL
from a3.rxx.packed import STEPS, pack, square, unpack
from a3.rxx.sums import Triangle
from a3.solutions import mlp, ov

BLOCKS, LENGTH = 3, 200
# More than one panel, the last of them short.
WIDTH = PANEL + 44
CASES = ("random", "scales", "near-duplicates", "few tokens", "one token", "dead channel")


def blocks_of(case, n, dtype=torch.float32, length=LENGTH):
    """Activations (L, n) of some blocks, with a mean."""
    draw = torch.Generator().manual_seed(n)
    length = {"few tokens": 4, "one token": 1}.get(case, length)
    x = torch.randn(BLOCKS, length, n, generator=draw) + 0.3
    if case == "scales":
        x *= torch.logspace(-4, 4, n)[torch.randperm(n, generator=draw)]
    if case == "near-duplicates":
        half = n // 2
        noise = torch.randn(BLOCKS, length, half, generator=draw)
        x[..., half : 2 * half] = x[..., :half] * (1 + 1e-4 * noise)
    if case == "dead channel":
        x[..., -1] = 0
    if case == "one token":
        x = x[:1]
    return list(x.to(dtype))


def exact(blocks):
    """Σ xᵀx in float64."""
    return sum(x.double().T @ x.double() for x in blocks)


def summed(blocks):
    """The same as a triangle."""
    triangle = Triangle(blocks[0].shape[1])
    for x in blocks:
        triangle.add(x)
    return triangle


def whole(triangle):
    """Its lower triangle as a matrix (n, n)."""
    n = triangle.panels[-1].shape[1]
    S = torch.zeros(n, n, dtype=torch.float64)
    for start, stop, rows in triangle:
        S[start:stop, :stop] = rows
    return S.tril()


def stored(blocks):
    """What is read of a file."""
    return square(*pack(summed(blocks)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_sums_are_within_their_bound_of_float64(case, dtype):
    blocks = blocks_of(case, WIDTH, dtype)
    error = (whole(summed(blocks)) - exact(blocks).tril()).abs()
    sizes = sum(x.double().abs().T @ x.double().abs() for x in blocks).tril()
    length = len(blocks[0])
    assert (error <= length * 2**-24 * sizes).all()
    # And, as errors go, far within it.
    assert error.norm() <= length**0.5 * 2**-24 * sizes.norm()


def test_products_are_of_full_precision_whatever_else_is_chosen():
    """On processors that multiply bfloat16, float32 products would be of those."""
    blocks, chosen = blocks_of("random", 512), torch.backends.mkldnn.matmul
    expected, before = whole(summed(blocks)), chosen.fp32_precision
    chosen.fp32_precision = "bf16"
    try:
        assert torch.equal(whole(summed(blocks)), expected)
        assert chosen.fp32_precision == "bf16"
    finally:
        chosen.fp32_precision = before


@pytest.mark.parametrize("n", [1, 2, PANEL, PANEL + 1, WIDTH])
@pytest.mark.parametrize("case", CASES)
def test_packed_sums_are_within_half_a_step(case, n):
    triangle = summed(blocks_of(case, n))
    diagonal, packed = pack(triangle)
    assert (diagonal.dtype, packed.dtype) == (torch.float64, torch.uint8)
    assert packed.shape == (n * (n - 1) // 2, 3)
    S, found = whole(triangle), square(diagonal, packed)
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), S.diagonal())
    root = S.diagonal().sqrt()
    sizes = root[:, None] * root
    # Nothing but the rounding of sums makes a correlation larger than 1.
    beyond = ((S.abs() - sizes).clamp(min=0) + 1e-12 * sizes).tril()
    assert beyond.max() <= 1e-5 * sizes.max()
    error = (found.tril() - S).abs()
    assert (error <= sizes / (2 * STEPS) + beyond).all()
    assert n < PANEL or case == "one token" or error.max() > 0


def test_a_triangle_unpacks_to_what_packs_to_it():
    stored = pack(summed(blocks_of("scales", WIDTH)))
    again = Triangle(WIDTH)
    for known, (_, _, rows) in zip(again.panels, unpack(*stored), strict=True):
        known += rows
    for found, expected in zip(pack(again), stored, strict=True):
        assert torch.equal(found, expected)


def test_packed_bytes_are_those_that_are_said():
    """Correlations 1, -1 and 1/2 by hand: row by row, three bytes each, the lowest first."""
    x = torch.tensor([[1.0, -2.0, 0.5], [1.0, -2.0, 0.5], [0.0, 0.0, 1.5**0.5]])
    diagonal, packed = pack(summed([x]))
    assert diagonal.tolist() == pytest.approx([2.0, 8.0, 2.0])
    half = round(0.5 * STEPS)
    for row, value in zip(packed.tolist(), (-STEPS, half, -half), strict=True):
        assert abs(int.from_bytes(row, "little", signed=True) - value) <= 1


# --- what is solved with them ---------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_same_channels_are_eliminated(case):
    n = 96
    blocks = blocks_of(case, n)
    W = torch.randn(n, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for C in (exact(blocks), stored(blocks)):
        gone, losses, _ = eliminate(C, W, 64, ridge_of(C, mlp.ELIMINATION))
        found.append((gone.tolist(), losses))
    (order, losses), (order_stored, losses_stored) = found
    assert order_stored == order
    all_of_it = (W * (exact(blocks) @ W)).sum().item()
    torch.testing.assert_close(losses_stored, losses, rtol=1e-6, atol=1e-7 * all_of_it)


@pytest.mark.parametrize("case", CASES)
def test_objectives_are_those_of_exact_sums(case):
    """a3-plus: of W_down by the exact sums, and as said of both; 1e-7 is of the zero solution."""
    attended = attention()
    heads, h, d = attended.o.shape
    n = 96
    down = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    channels = MLPWeights(up=down.T.contiguous(), gate=None, down=down)
    inputs, values = blocks_of(case, n), blocks_of(case, heads * h)
    gradients = blocks_of("random", d)
    found = []
    for read in (exact, stored):
        C, R, F = read(inputs), read(values), read(gradients)
        small, head = mlp.obs(channels, C, F, 0.02, 60), ov.joint(attended, R, F, 0.02, 5)
        left = down.clone()
        left[small.channels] -= small.down
        found.append((small, head, lost(left, exact(inputs), exact(gradients))))
    (small, head, loss), (small_stored, head_stored, loss_stored) = found
    assert torch.equal(small_stored.channels, small.channels)
    zero = lost(down, exact(inputs), exact(gradients))
    assert loss_stored == pytest.approx(loss, rel=1e-6, abs=1e-7 * zero)
    for one, other in ((small_stored, small), (head_stored, head)):
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_refits_without_a_ridge_withstand_the_rounding_of_sums(case):
    """Singular sums may be indefinite as stored; no worse than exact sums with a tiny ridge."""
    n, one = 96, torch.eye(24, dtype=torch.float64)
    down = torch.randn(n, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    channels = MLPWeights(up=down.T.contiguous(), gate=None, down=down)
    C, R = exact(blocks_of(case, n)), stored(blocks_of(case, n))
    small = mlp.modegpt(channels, R, 60)
    assert torch.equal(small.channels, mlp.modegpt(channels, C, 60).channels)
    left, ridged = down.clone(), down.clone()
    left[small.channels] -= small.down
    ridged[small.channels] -= take_over(C, small.channels, down, ridge_of(C, 1e-6))[0]
    assert lost(left, C, one) <= lost(ridged, C, one) + 1e-5 * lost(down, C, one)


def lost(X, C, F):
    """The objective tr(Xᵀ C X F) of what is lost of the weights."""
    return (X * (C @ X @ F)).sum().item()
