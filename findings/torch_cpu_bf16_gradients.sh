#!/usr/bin/env bash
# Guess: in bfloat16 sums over tokens are kept in float32 inside and rounded once at the end, as torch does for
#        products, sum() and the gradients of nn.Linear, weight and bias: a gradient over many tokens is off by some
#        0.4 %.
# What happens: on CPUs the gradients of nn.LayerNorm and nn.Embedding are added up in bfloat16 itself, token by
#        token, and stop growing where the next summand is less than half a step: 8192 tokens with gradient 1 give
#        256. With random gradients they are off by a fifth over 8192 tokens and by more than half over 65536, where
#        Linear's bias is off by 0.1 %. In float16 the sum stops at 2048. No warning; RMSNorm and scatter_add are
#        right.
# Versions: torch 2.13.0, CPU, one thread (with more, LayerNorm adds up one part per thread).
# Who is hit: fine-tuning, distillation and sensitivity scores (weight times gradient, Fisher) of bfloat16 models on
#        CPUs: embeddings of frequent tokens and the norms of GPT-2, OPT, Falcon, Bloom and their like get gradients
#        that are too small.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/gradients.py" <<'PY'
import torch
from torch import nn

torch.set_num_threads(1)
WIDTH = 64
MAKE = {
    "Linear bias": lambda: nn.Linear(WIDTH, WIDTH),
    "RMSNorm weight": lambda: nn.RMSNorm(WIDTH),
    "LayerNorm bias": lambda: nn.LayerNorm(WIDTH),
    "Embedding weight": lambda: nn.Embedding(2, WIDTH),
}


def gradient(name: str, x: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """Gradient of a layer's parameter over all tokens, in the type of what comes from above."""
    layer = MAKE[name]().to(upstream.dtype)
    tokens = torch.zeros(len(x), dtype=torch.long) if name.startswith("Embedding") else x.to(upstream.dtype)
    layer(tokens).backward(upstream)
    found = getattr(layer, name.split()[1]).grad.double()
    return found[0] if found.ndim == 2 else found


errors = {}
for count in (8192, 65536):
    torch.manual_seed(0)
    x = torch.randn(count, WIDTH).bfloat16()
    upstream = (0.1 + torch.randn(count, WIDTH)).bfloat16()
    for name in MAKE:
        exact = gradient(name, x, upstream.double())
        errors[name, count] = ((gradient(name, x, upstream) - exact).norm() / exact.norm()).item()
        print(f"{count} tokens, {name}: off by {100 * errors[name, count]:.1f} %")
ones = torch.ones(8192, WIDTH)
for kind in (torch.bfloat16, torch.float16):
    found = {name: gradient(name, ones, ones.to(kind))[0].item() for name in MAKE if not name.startswith("RMS")}
    print(f"8192 ones in {kind}: {found}")
    assert found["Linear bias"] == 8192
    assert found["LayerNorm bias"] == found["Embedding weight"] == (256 if kind == torch.bfloat16 else 2048)
for name in ("LayerNorm bias", "Embedding weight"):
    assert errors[name, 8192] > 0.1 and errors[name, 65536] > 0.5
assert all(errors[name, count] < 0.02 for name in ("Linear bias", "RMSNorm weight") for count in (8192, 65536))
PY
"$folder/venv/bin/python" "$folder/gradients.py"
