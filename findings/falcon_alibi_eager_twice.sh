#!/usr/bin/env bash
# Guess: attn_implementation="eager" is the plain reference, to which the fused kernels are held: for one model it gives
#        the same logits as "sdpa" to rounding.
# What happens: for Falcon with ALiBi (alibi=True, as falcon-rw-1b and -7b have it) transformers' eager branch is handed a
#        mask that already holds the bias, and adds the bias once more; SDPA adds it once. Logits differ in the first
#        digit, in float64. Without ALiBi both agree to 1e-12.
# Versions: transformers 5.23.0, torch 2.13.0, CPU.
# Who is hit: whoever sets "eager" to get attention weights, hooks or a reference, and whoever validates an export of
#        Falcon-RW against it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cat > "$folder/compare.py" <<'PY'
import torch
from transformers import AutoModelForCausalLM, FalconConfig


def gap(alibi: bool) -> float:
    """Largest difference of logits between eager and SDPA attention, float64."""
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=alibi,
        multi_query=False, parallel_attn=False, bias=True, initializer_range=0.5,
    )
    weights, found = None, []
    for name in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=name).double().eval()
        weights = weights or model.state_dict()
        model.load_state_dict(weights)
        with torch.no_grad():
            found.append(model(torch.arange(48)[None]).logits)
    return (found[0] - found[1]).abs().max().item()


without, with_alibi = gap(False), gap(True)
print(f"largest difference of logits, eager against sdpa: {without:.1e} without ALiBi, {with_alibi:.3f} with it")
assert without < 1e-9 and with_alibi > 1e-2
PY
"$folder/venv/bin/python" "$folder/compare.py"
