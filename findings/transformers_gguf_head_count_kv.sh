#!/usr/bin/env bash
# Guess: attention.head_count_kv may be absent from a GGUF file. The specification says so ("If not present or if
#        present and equal to head_count, the model does not use GQA") and llama.cpp takes head_count then.
# What happens: transformers takes head_count too, in the config, and the model loads without a word; but its reader
#        then leaves query and key rows in GGUF's order, with rotated pairs side by side, because it asks for the key
#        itself. Attention is scrambled: the same tensors give other logits with the key and without it.
# Versions: transformers 5.23.0, gguf 0.19.0, torch 2.13.0. (llama.cpp gives the same for both files.)
# Who is hit: Llama files without grouped queries by writers that leave optional keys out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 numpy==2.4.6
cat > "$folder/heads.py" <<'PY'
import logging
import sys

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

WIDTH, HEADS, WORDS = 64, 4, 96
folder = sys.argv[1]
logging.disable()
shapes = {"token_embd": (WORDS, WIDTH), "output_norm": (WIDTH,), "output": (WORDS, WIDTH)}
shapes |= {f"blk.0.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
shapes |= {f"blk.0.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
shapes |= {f"blk.0.{name}": (WIDTH, WIDTH) for name in ("ffn_gate", "ffn_up", "ffn_down")}


def logits(with_key: bool) -> tuple[torch.Tensor, int]:
    """Logits and key heads of one GGUF file (always the same tensors) in transformers."""
    random = np.random.default_rng(0)
    file = gguf.GGUFWriter(f"{folder}/model.gguf", "llama")
    file.add_block_count(1)
    file.add_context_length(512)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(WIDTH)
    file.add_head_count(HEADS)
    if with_key:
        file.add_head_count_kv(HEADS)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_vocab_size(WORDS)
    file.add_tokenizer_model("no_vocab")
    for name, shape in shapes.items():
        tensor = 0.3 * random.standard_normal(shape) if len(shape) == 2 else np.ones(shape)
        file.add_tensor(f"{name}.weight", tensor.astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").eval()
    with torch.no_grad():
        return model(torch.arange(60)[None]).logits, model.config.num_key_value_heads


(stated, heads), (absent, heads_then) = logits(True), logits(False)
gap = (stated - absent).abs().max().item()
print(f"head_count_kv stated: {heads} heads; absent: {heads_then} heads")
print(f"logits of up to {stated.abs().max():.1f} differ by {gap:.2f}")
assert heads == heads_then == HEADS and gap > 0.5
PY
"$folder/venv/bin/python" "$folder/heads.py" "$folder" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
