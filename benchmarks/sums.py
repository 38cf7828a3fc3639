"""What Σ xᵀx of a block costs, and how exact it is: float64 products beside a3's float32 triangle.

    python benchmarks/sums.py --device cpu --threads 1 --repeats 5

In one process, in turn, at the widths of SmolLM2-135M's and Llama-3.1-8B's MLP: x.double() and
x.T @ x added to a float64 matrix; and a3.rxx.sums.Triangle. Prints seconds a block (on a CPU, of
all its threads), the median ratio within a repeat, the share of the machine's float32 rate that the
triangle reaches (n² L operations a block, over the rate of a plain float32 product), and the
largest error of 256 columns, as a share of sqrt(S_ii S_jj). Then, with --pack, seconds to pack and
to unpack a triangle.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from a3.rxx.packed import pack, square
from a3.rxx.sums import Triangle

SHAPES = [(1024, 1536), (2048, 4096), (2048, 14336)]

# Columns whose sums are compared to float64.
COMPARED = 256


def activations(tokens: int, n: int, device: str) -> Tensor:
    """Correlated channels of unequal size, (tokens, n) float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, n, generator=generator)
    x[:, 1:] += 0.5 * x[:, :-1]
    return (x * torch.logspace(-2, 2, n)[torch.randperm(n, generator=generator)]).to(device)


def seconds(call: Callable[[], object], device: str) -> float:
    """CPU time of one call, or the wall time until a GPU has finished it."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def rate(device: str, size: int = 2048) -> float:
    """Operations a second of a plain float32 product."""
    x = torch.randn(size, size, device=device)
    return 2 * size**3 / min(seconds(lambda: x @ x, device) for _ in range(6))


def error(triangle: Triangle, x: Tensor, blocks: int) -> float:
    """The largest error of a triangle's last columns, of sqrt(S_ii S_jj)."""
    root = x.double().square().sum(0).sqrt()
    exact = x.double().T @ x[:, :COMPARED].double() * blocks
    found = torch.cat([rows[:, :COMPARED] for _, stop, rows in triangle if stop > COMPARED])
    exact = exact[-len(found) :]
    return ((found - exact).abs() / (root[-len(found) :, None] * root[:COMPARED])).max() / blocks


def row(tokens: int, n: int, device: str, repeats: int, measured: float) -> dict[str, object]:
    """Both ways at one shape, in turn."""
    x = activations(tokens, n, device)
    triangle = Triangle(n, device)
    new = [seconds(lambda: triangle.add(x), device)]
    old, ratios = [], []
    total = torch.zeros(n, n, dtype=torch.float64, device=device)

    def in_float64() -> None:
        wide = x.double()
        total.add_(wide.T @ wide)

    in_float64()
    for _ in range(repeats):
        old.append(seconds(in_float64, device))
        new.append(seconds(lambda: triangle.add(x), device))
        ratios.append(old[-1] / new[-1])
    best = statistics.median(new[1:])
    return {
        "tokens": tokens,
        "n": n,
        "float64, s": statistics.median(old),
        "triangle, s": best,
        "ratio": statistics.median(ratios),
        "of float32 peak": n * n * tokens / best / measured,
        "largest error": float(error(triangle, x, repeats + 1)),
    }


def packing(n: int) -> dict[str, object]:
    """Seconds to pack and unpack, and the rate in bytes of the float64 matrix."""
    triangle = Triangle(n)
    triangle.add(activations(512, n, "cpu"))
    start = time.process_time()
    stored = pack(triangle)
    half = time.process_time()
    whole = square(*stored)
    end = time.process_time()
    bytes_, packed = 8 * n * n, sum(part.numel() * part.element_size() for part in stored)
    return {
        "n": n,
        "pack, s": half - start,
        "unpack, s": end - half,
        "pack, MB/s": bytes_ / (half - start) / 1e6,
        "unpack, MB/s": bytes_ / (end - half) / 1e6,
        "bytes": f"{packed / bytes_:.1%} of {len(whole)}²",
    }


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--widest", type=int, default=14336)
    options.add_argument("--pack", action="store_true")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    measured = rate(chosen.device)
    print(f"float32 products: {measured / 1e9:.0f} GFLOP/s")
    shapes = [(tokens, n) for tokens, n in SHAPES if n <= chosen.widest]
    rows = [row(*shape, chosen.device, chosen.repeats, measured) for shape in shapes]
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".3g"))
    if chosen.pack:
        rows = [packing(n) for _, n in shapes]
        print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".3g"))


if __name__ == "__main__":
    main()
