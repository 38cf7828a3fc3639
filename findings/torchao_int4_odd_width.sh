#!/usr/bin/env bash
# Guess: quantize_(model, Int4WeightOnlyConfig()) quantises every linear layer or raises: where the group size does
#        not divide a layer's inputs, IntxWeightOnlyConfig and Int8DynamicActivationIntxWeightConfig raise.
# What happens: such a layer is left as it is, in full precision; the call succeeds, warnings are silent (the only
#        trace is at level INFO) and outputs are the same bit by bit. With 3000 inputs and the default group of 128
#        nothing is quantised.
# Versions: torchao 0.18.0, torch 2.13.0.
# Who is hit: models of odd width (pruned hidden or feed-forward sizes, ranks of factored layers): quality is reported
#        of a "4-bit" model that is in 16 bits where it matters, with no saving.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy==2.4.6
cat > "$folder/widths.py" <<'PY'
import torch
from torch import nn
from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

x = torch.randn(4, 3000, dtype=torch.bfloat16)
model = nn.Sequential(nn.Linear(3000, 64), nn.ReLU(), nn.Linear(64, 8)).to(torch.bfloat16)
before, size = model(x), sum(weight.nbytes for weight in model.parameters())
quantize_(model, Int4WeightOnlyConfig())
kinds = [type(layer.weight).__name__ for layer in (model[0], model[2])]
print("Int4WeightOnlyConfig: weights are", kinds, "outputs the same:", torch.equal(before, model(x)))
assert kinds == ["Parameter", "Parameter"] and torch.equal(before, model(x))
assert size == sum(weight.nbytes for weight in model.parameters())
try:
    quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(128)))
except AssertionError as error:
    print("IntxWeightOnlyConfig raises:", error)
else:
    raise SystemExit("IntxWeightOnlyConfig takes it now")
PY
"$folder/venv/bin/python" "$folder/widths.py"
