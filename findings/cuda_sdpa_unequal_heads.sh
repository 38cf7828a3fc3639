#!/usr/bin/env bash
# Needs an NVIDIA GPU (seen on an H200).
# Guess: scaled_dot_product_attention picks a fused kernel for bfloat16 whatever the head size is (head 102 is padded to 104
#        inside), so values with a smaller head than queries and keys cost no more than equal heads.
# What happens: equal heads of any size are padded and fused. Values of another size than the keys are fused only where both
#        are multiples of 8 (192 and 128 run at full speed); 128 and 102 fall back to the unfused "math" path without
#        a word: 46 times slower, and with L × L scores in memory. Zeros that fill the values up to 128 give the same output
#        at full speed.
# Versions: torch 2.11.0 (CUDA 13.0), H200.
# Who is hit: models with heads of unequal size (pruned or low-rank heads, latent attention) on stock torch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=python3
if ! python3 -c 'import torch; assert torch.__version__.startswith("2.11.0")' 2> /dev/null; then
  python3 -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install -q torch==2.11.0 numpy
fi
cat > "$folder/heads.py" <<'PY'
import torch
from torch.nn.functional import pad, scaled_dot_product_attention


def milliseconds(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Of one causal attention, the best of five."""
    best = float("inf")
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        scaled_dot_product_attention(q, k, v, is_causal=True)
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end))
    return best


def heads(size: int) -> torch.Tensor:
    """A batch of 4, 32 heads, 2048 tokens."""
    return torch.randn(4, 32, 2048, size, device="cuda", dtype=torch.bfloat16)


q, k, v = heads(128), heads(128), heads(102)
filled = pad(v, (0, 26))
times = {
    "128 and 128": milliseconds(q, k, heads(128)),
    "102 and 102": milliseconds(heads(102), heads(102), v),
    "192 and 128": milliseconds(heads(192), heads(192), heads(128)),
    "128 and 102": milliseconds(q, k, v),
    "128 and 102, filled": milliseconds(q, k, filled),
}
print(torch.cuda.get_device_name(), {name: f"{ms:.2f} ms" for name, ms in times.items()})
same = scaled_dot_product_attention(q, k, filled, is_causal=True)[..., :102]
gap = (same - scaled_dot_product_attention(q, k, v, is_causal=True)).abs().max().item()
assert gap < 0.05 and times["128 and 102"] > 10 * times["128 and 102, filled"]
PY
"$python" "$folder/heads.py"
