#!/usr/bin/env bash
# Needs a GPU of NVIDIA's Hopper generation for data centres (H100, H200).
# Guess: in full precision float32 is at least twice as fast as float64 (on consumer cards 32 or 64 times), so sums such
#        as xᵀx are formed in float32 and only added up in float64.
# What happens: float64 products run on tensor cores, float32 ones without TF32 do not: xᵀx of 8192 × 14336 takes
#        less time in float64 (65 TFLOP/s on an H200) than in float32 (54). Only inexact float32 (TF32, bf16 pieces) is faster.
# Versions: torch 2.11.0 (CUDA 13.0), H200.
# Who is hit: whoever gives up float64 for speed in covariances, Gram matrices, second moments or least squares there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=python3
if ! python3 -c 'import torch; assert torch.__version__.startswith("2.11.0")' 2> /dev/null; then
  python3 -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install -q torch==2.11.0 numpy
fi
cat > "$folder/gram.py" <<'PY'
import torch

x = torch.randn(8192, 14336, device="cuda")


def tflops(x: torch.Tensor) -> float:
    """Speed of xᵀx, the best of five."""
    best = float("inf")
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        x.T @ x
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end))
    return 2 * x.shape[0] * x.shape[1] ** 2 / best / 1e9


torch.backends.cuda.matmul.allow_tf32 = False
single, double = tflops(x), tflops(x.double())
print(f"{torch.cuda.get_device_name()}: float32 {single:.0f} TFLOP/s, float64 {double:.0f}")
assert double > single
PY
"$python" "$folder/gram.py"
