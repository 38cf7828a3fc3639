"""What eliminating channels costs, beside a Cholesky factorisation and an explicit inverse.

    python benchmarks/eliminate.py --channels 4096 --hidden 1024 --repeats 3

In one process, in turn: `a3.numerics.elimination.eliminate` of 20% and 60% of n channels, and the
Cholesky factor with the inverse of an n × n matrix in float64, which elimination begins with.
Prints ratios within a repeat, median and range, and, with --memory, the peak memory of one
elimination in n × n matrices (a process of its own).
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor

from a3.numerics.elimination import eliminate

# Few, since they only have to make a matrix: what is timed does not depend on them.
TOKENS = 2048
MEMORY = """
import torch
from pathlib import Path
from a3.numerics.elimination import eliminate
def peak():
    # Of this process alone; ru_maxrss counts its parent's.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
C = torch.eye({n}, dtype=torch.float64)
W = torch.ones({n}, {d}, dtype=torch.float64)
before = peak()
eliminate(C, W, {count}, 1e-2)
print((peak() - before) / ({n} ** 2 * 8))
"""


def made(n: int, d: int) -> tuple[Tensor, Tensor]:
    """An autocorrelation (n, n) of correlated channels, and weights (n, d)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, n, generator=generator, dtype=torch.float32)
    x[:, 1:] += 0.5 * x[:, :-1]
    C = (x.T @ x).double() / len(x)
    C.diagonal().add_(1)
    return C, torch.randn(n, d, generator=generator, dtype=torch.float64)


def inverse(C: Tensor) -> Tensor:
    """What is compared to."""
    return torch.cholesky_inverse(torch.linalg.cholesky(C))


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--channels", type=int, default=4096)
    options.add_argument("--hidden", type=int, default=1024)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--memory", action="store_true")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    n, d = chosen.channels, chosen.hidden
    C, W = made(n, d)
    for share in (0.2, 0.6):
        count, ratios, base = int(share * n), [], []
        for _ in range(chosen.repeats):
            base.append(seconds(lambda: inverse(C)))
            ratios.append(seconds(lambda k=count: eliminate(C, W, k, 1e-2)) / base[-1])
        print(
            f"n {n}, {share:.0%} eliminated: {statistics.median(ratios):.2f} times the inverse "
            f"({min(ratios):.2f} to {max(ratios):.2f}; {statistics.median(base):.1f} s)",
            flush=True,
        )
        if chosen.memory:
            code = MEMORY.format(n=n, d=d, count=count)
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            print(f"  {float(done.stdout):.1f} matrices at its peak beside C", flush=True)


if __name__ == "__main__":
    main()
