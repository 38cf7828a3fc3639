#!/usr/bin/env bash
# Guess: softmax in bfloat16 rounds its results and no more, as sum, mean, logsumexp and matmul of the same library show,
#        which keep their sums in float32: probabilities add up to 1 within a percent.
# What happens: on CPUs the denominator is added up in bfloat16 and stops growing (at 256 steps of its own size). Softmax over
#        128256 words with normal logits adds up to 22, over 4096 to more than 2; even over 1000 it is a third too
#        large. Float16: more than 5 over 128256. precise=True is right, but off by default, and was put in the documentation this
#        year only; mx.fast.scaled_dot_product_attention is right, attention written out is not.
# Versions: mlx 0.32.4 with mlx-cpu 0.32.4 (Linux).
# Who is hit: 16-bit models on MLX's CPU backend: sampling by probabilities (top-p keeps too few words), distillation targets,
#        expected values, and attention of models that write it out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mlx==0.32.4 mlx-cpu==0.32.4 numpy==2.4.6
cat > "$folder/softmax.py" <<'PY'
import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)
random = np.random.default_rng(0)


def total(array: mx.array) -> float:
    """The sum of an array's numbers, added up in float64."""
    return np.array(array.astype(mx.float32)).astype(float).sum().item()


sums = {}
for words in (1000, 4096, 128256):
    logits = mx.array(random.standard_normal(words).astype(np.float32))
    for kind in (mx.bfloat16, mx.float16, mx.float32):
        rounded = logits.astype(kind)
        by_logarithm = mx.exp((rounded - mx.logsumexp(rounded)).astype(mx.float32))
        found = total(mx.softmax(rounded)), total(mx.softmax(rounded, precise=True)), total(by_logarithm)
        sums[words, kind] = found
        print(f"{words} logits in {kind}: softmax adds up to {found[0]:.3f}", end=", ")
        print(f"precise to {found[1]:.3f}, by logsumexp to {found[2]:.3f}")
        assert abs(found[1] - 1) < 0.02 and abs(found[2] - 1) < 0.05
q, k = (mx.array(random.standard_normal((1, 1, 4096, 64)).astype(np.float32)).astype(mx.bfloat16) for _ in range(2))
v = mx.ones((1, 1, 4096, 64)).astype(mx.bfloat16)
fused = total(mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125)) / v.size
written = total(mx.softmax(0.125 * q @ k.swapaxes(2, 3), axis=-1) @ v) / v.size
print(f"attention to values that are all 1: fused {fused:.3f}, written out {written:.3f}")
assert sums[1000, mx.bfloat16][0] > 1.2 and sums[4096, mx.bfloat16][0] > 2 and sums[128256, mx.bfloat16][0] > 15
assert sums[128256, mx.float16][0] > 4 and abs(sums[128256, mx.float32][0] - 1) < 1e-3
assert abs(fused - 1) < 0.02 and written > 2
PY
"$folder/venv/bin/python" "$folder/softmax.py"
