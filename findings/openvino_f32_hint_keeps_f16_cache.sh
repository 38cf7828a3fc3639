#!/usr/bin/env bash
# Guess: compiling a model for the CPU with INFERENCE_PRECISION_HINT=f32 computes and keeps everything in float32.
# What happens: the cache of a stateful decoder stays in float16: KV_CACHE_PRECISION is another property, with a choice
#        of its own. Logits of the first call are those of transformers; of later calls, which read the cache, they
#        are off by hundreds of times more than with KV_CACHE_PRECISION=f32. The states themselves tell nothing:
#        query_state() says float32, and as many bytes, either way.
# Versions: OpenVINO 2026.4.1, optimum-intel 2.2.0, transformers 5.5.4, torch 2.13.0.
# Who is hit: whoever takes OpenVINO in float32 as exact: to verify a conversion, to measure the loss of a quantised or
#        compressed model, or to state the cache's bytes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 openvino==2026.4.1 nncf==3.4.0 optimum==2.3.0 \
    optimum-intel==2.2.0 transformers==5.5.4 tokenizers==0.22.2 huggingface_hub==1.21.0 httpx==0.28.1
# Not needed, and its build must be that of torch.
"$folder/venv/bin/pip" uninstall -q -y torchvision
cat > "$folder/cache.py" <<'PY'
import sys

import numpy as np
import openvino
import torch
from optimum.exporters.openvino import main_export
from transformers import LlamaConfig, LlamaForCausalLM

folder, LENGTH, STEP, WORDS = sys.argv[1], 60, 15, 96
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
).eval()
model.save_pretrained(folder)
main_export(folder, f"{folder}/converted", task="text-generation-with-past", convert_tokenizer=False)
ids = np.random.default_rng(0).integers(0, WORDS, (1, LENGTH))
with torch.no_grad():
    expected = model(torch.from_numpy(ids)).logits.numpy()
print(f"logits of transformers: up to {abs(expected).max():.1f}")


def worst(**hints: str) -> tuple[float, float, str, list[str], int]:
    """Differences in the first call and in later ones; type of the cache; types and bytes that states report."""
    compiled = openvino.Core().compile_model(f"{folder}/converted/openvino_model.xml", "CPU", hints)
    request, gaps = compiled.create_infer_request(), []
    for begin in range(0, LENGTH, STEP):
        end = begin + STEP
        feed = {
            "input_ids": ids[:, begin:end],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(begin, end)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        gaps.append(abs(request.infer(feed)["logits"] - expected[:, begin:end]).max())
    states = [one.state for one in request.query_state()]
    kinds = sorted({one.element_type.get_type_name() for one in states})
    kept = compiled.get_property("KV_CACHE_PRECISION").get_type_name()
    print(f"{hints}: off by {gaps[0]:.1e}, later {max(gaps[1:]):.1e}; cache {kept}, states say {kinds}")
    return gaps[0], max(gaps[1:]), kept, kinds, sum(one.byte_size for one in states)


hint = worst(INFERENCE_PRECISION_HINT="f32")
both = worst(INFERENCE_PRECISION_HINT="f32", KV_CACHE_PRECISION="f32")
assert hint[2] == "f16" and both[2] == "f32"
assert hint[3] == both[3] == ["f32"] and hint[4] == both[4]
assert hint[0] < 1e-4 and max(both[:2]) < 1e-4 and hint[1] > 20 * both[1]
PY
"$folder/venv/bin/python" -W ignore "$folder/cache.py" "$folder"
