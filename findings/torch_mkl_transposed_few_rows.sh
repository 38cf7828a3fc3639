#!/usr/bin/env bash
# Guess: a.T @ b.T and (b @ a).T are one product, and the BLAS library reads either operand in either order at
#        about the same speed; more rows of b take longer.
# What happens: with both operands transposed, in float64, and few rows of b, MKL takes a slow path that
#        depends on the number of rows: for 2048 x 2048, 8 rows take some 200 ms on one thread, 12 rows 5 ms, 16 rows
#        50 ms, 24 rows 7 ms and 32 rows 110 ms. (b @ a).T takes 6 to 9 ms for each of these. NumPy (OpenBLAS) takes
#        3 to 14 ms for either form.
# Versions: torch 2.13.0 (MKL 2024.2) and numpy 2.4.6 from wheels, one thread, AMD EPYC with AVX-512; not tried on
#        Intel's CPUs.
# Who is hit: projections on a few directions (low-rank factors, probes, randomised SVD) written as v.T @ y.T, where v
#        has its directions in columns: 10 to 40 times slower, and slower than a wider problem.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/product.py" <<'PY'
import time
from collections.abc import Callable

import torch

torch.set_num_threads(1)
torch.manual_seed(0)


def milliseconds(run: Callable[[], object]) -> float:
    """CPU time, the best of five."""
    times = []
    for _ in range(5):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * min(times)


a = torch.randn(2048, 2048, dtype=torch.float64)
taken = {}
for rows in (8, 12, 16, 24, 32):
    b = torch.randn(rows, 2048, dtype=torch.float64)
    assert torch.allclose(a.T @ b.T, (b @ a).T)
    x, y = a.numpy(), b.numpy()
    taken[rows] = [
        milliseconds(run) for run in (lambda: a.T @ b.T, lambda: (b @ a).T, lambda: x.T @ y.T, lambda: (y @ x).T)
    ]
    print(f"{rows} rows: a.T @ b.T %.1f ms, (b @ a).T %.1f ms; NumPy %.1f ms, %.1f ms" % tuple(taken[rows]))
for rows in (8, 16, 32):
    both, swapped, numpy_both, _ = taken[rows]
    assert both > 3 * swapped and both > 2 * numpy_both
assert taken[8][0] > 5 * taken[12][0] and taken[32][0] > 3 * taken[24][0]
PY
OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/product.py"
