#!/usr/bin/env bash
# Guess: torch.compile(model.forward) of several models gives each its compiled code, with a limit of recompilations of
#        its own; a benchmark may compile a dozen models in one process.
# What happens: the forward of every model of transformers is one decorated function, so that all models share one code
#        object, and with it the limit of eight versions (torch._dynamo.config.recompile_limit). From the ninth model on,
#        decoding runs uncompiled; the only sign is a line on the logger torch._dynamo, no error, and results are the
#        same. torch.compile(..., isolate_recompiles=True) gives each its own eight.
# Versions: torch 2.13.0, transformers 5.23.0.
# Who is hit: benchmarks and servers that compile more than eight models, or sizes of one model, in a process: they time
#        the last ones uncompiled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > "$folder/compiled.py" <<'PY'
import logging

import torch
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM

MODELS = 11
ids = torch.arange(1, 7)[None]
logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


def compiled(**options):
    """For each of MODELS models, how many graphs were compiled when it ran."""
    torch._dynamo.reset()
    found = []
    for width in range(MODELS):
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8 * (width + 1), max_position_embeddings=32,
        )
        model, counter = LlamaForCausalLM(config).eval(), CompileCounter()
        step = torch.compile(model.forward, backend=counter, **options)
        with torch.no_grad():
            step(ids, use_cache=False)
        found.append(counter.frame_count)
    return found


together, apart = compiled(), compiled(isolate_recompiles=True)
print("limit:", torch._dynamo.config.recompile_limit)
print("graphs by model:                    ", together)
print("graphs by model, isolate_recompiles:", apart)
assert all(together[:8]) and not any(together[8:])
assert all(apart)
PY
"$folder/venv/bin/python" "$folder/compiled.py"
