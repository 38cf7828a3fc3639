#!/usr/bin/env bash
# Guess: from_pretrained(..., gguf_file=...) gives the model that the file holds. An F32 file loses nothing, and
#        architecture `llama` is the best supported one.
# What happens: of the position encoding only rope.freq_base is read. The tensor rope_freqs.weight, by which GGUF
#        holds Llama 3.1's scaling, and the keys rope.scaling.* (linear, YaRN) are dropped, for every architecture but
#        gpt-oss: rope_parameters becomes "default", without a warning. In a random model logits are off by as much as
#        they are large, within the original context too; llama.cpp gives the right ones from such files.
# Versions: transformers 5.23.0, gguf 0.19.0, torch 2.13.0.
# Who is hit: whoever evaluates, dequantises or fine-tunes a GGUF file of Llama 3.1, 3.2 or 3.3 (or one with a
#        stretched context) in transformers: the loss looks like that of the quantisation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 numpy==2.4.6
cat > "$folder/scaling.py" <<'PY'
import logging
import sys

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

WIDTH, HEADS, WORDS = 128, 2, 96
HEAD = WIDTH // HEADS
KINDS = {
    "none": {"rope_type": "default"},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
}
folder = sys.argv[1]
logging.disable()


def write(model: LlamaForCausalLM) -> None:
    """The model as a GGUF file in float32, as llama.cpp's converter lays it out."""
    rope = model.config.rope_parameters
    file = gguf.GGUFWriter(f"{folder}/model.gguf", "llama")
    file.add_block_count(1)
    file.add_context_length(1024)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(2 * WIDTH)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_rope_dimension_count(HEAD)
    file.add_rope_freq_base(1e4)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_vocab_size(WORDS)
    file.add_tokenizer_model("no_vocab")
    if rope["rope_type"] == "linear":
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        plain = 1e4 ** -(torch.arange(0, HEAD, 2) / HEAD)
        file.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # rotated pairs lie side by side in GGUF
            array = array.reshape(HEADS, 2, -1, WIDTH).swapaxes(1, 2).reshape(WIDTH, WIDTH)
        file.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(array))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


for kind, rope in KINDS.items():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=HEADS, max_position_embeddings=1024, initializer_range=0.2,
        rope_parameters={"rope_theta": 1e4, **rope},
    )
    model = LlamaForCausalLM(config).eval()
    write(model)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").eval()
    ids = torch.randint(WORDS, (1, 200))
    with torch.no_grad():
        logits = model(ids).logits
        gap = (logits - read(ids).logits).abs().max().item()
    print(f"{kind}: logits up to {logits.abs().max():.1f}, off by {gap:.5f}; read as {read.config.rope_parameters}")
    assert gap < 1e-3 if kind == "none" else gap > 1
PY
"$folder/venv/bin/python" "$folder/scaling.py" "$folder" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
