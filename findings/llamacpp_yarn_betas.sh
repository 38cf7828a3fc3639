#!/usr/bin/env bash
# Guess: what convert_hf_to_gguf.py writes of a model's YaRN scaling, llama.cpp reads: GGUF has keys for all of it,
#        and the converter fills rope.scaling.yarn_beta_fast and .yarn_beta_slow for every architecture whose config
#        has them.
# What happens: architecture `llama` reads type, factor and original length, and leaves the betas alone (only a few
#        architectures ask for them). A file with betas 8 and 2 gives, bit by bit, the logits of a file with 32 and 1,
#        where transformers' logits change by a third of their size. At 32 and 1, the defaults, both agree. Nothing is
#        said; the metadata dump shows the right numbers.
# Versions: llama.cpp in xllamacpp 2026.10.11549 (CPU), gguf 0.19.0, transformers 5.23.0, torch 2.13.0.
# Who is hit: Llama-like models tuned with YaRN ramps of their own, beyond the original context and below it alike.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 gguf==0.19.0 xllamacpp==2026.10.11549 numpy==2.4.6
cat > "$folder/betas.py" <<'PY'
import ctypes
import pathlib
import sys

import gguf
import numpy as np
import torch
import xllamacpp
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, HEADS, WORDS = 64, 2, 96
TOKENS = [i * i % WORDS for i in range(200)]
path = sys.argv[1]
# A structure larger than any of llama.cpp's: parameters pass through as its own functions fill them.
Opaque = type("Opaque", (ctypes.Structure,), {"_fields_": [("bytes", ctypes.c_char * 1024)]})
llama = ctypes.CDLL(str(next(pathlib.Path(xllamacpp.__file__).parent.glob("*.so"))))
for function, result, arguments in (
    ("llama_model_default_params", Opaque, []),
    ("llama_context_default_params", Opaque, []),
    ("llama_model_load_from_file", ctypes.c_void_p, [ctypes.c_char_p, Opaque]),
    ("llama_init_from_model", ctypes.c_void_p, [ctypes.c_void_p, Opaque]),
    ("llama_batch_get_one", Opaque, [ctypes.c_void_p, ctypes.c_int]),
    ("llama_decode", ctypes.c_int, [ctypes.c_void_p, Opaque]),
    ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int]),
):
    getattr(llama, function).restype, getattr(llama, function).argtypes = result, arguments
silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
llama.llama_log_set(silent, None)


def write(model: LlamaForCausalLM, fast: float, slow: float) -> None:
    """The model as a GGUF file in float32."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(1)
    file.add_context_length(512)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(2 * WIDTH)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    file.add_rope_scaling_factor(4.0)
    file.add_rope_scaling_orig_ctx_len(128)
    file.add_rope_scaling_yarn_beta_fast(fast)
    file.add_rope_scaling_yarn_beta_slow(slow)
    file.add_tokenizer_model("no_vocab")
    file.add_vocab_size(WORDS)
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


def last_logits() -> np.ndarray:
    """llama.cpp's logits after all tokens."""
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    context = llama.llama_init_from_model(model, llama.llama_context_default_params())
    tokens = (ctypes.c_int * len(TOKENS))(*TOKENS)
    assert llama.llama_decode(context, llama.llama_batch_get_one(ctypes.addressof(tokens), len(tokens))) == 0
    return np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (WORDS,)).copy()


def both(fast: float, slow: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits of one model (always the same weights) in transformers and in llama.cpp."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=HEADS, max_position_embeddings=512, initializer_range=0.3,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
            "beta_fast": fast, "beta_slow": slow,
        },
    )
    model = LlamaForCausalLM(config).eval()
    write(model, fast, slow)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0, -1].numpy(), last_logits()


usual, usual_llama = both(32.0, 1.0)
other, other_llama = both(8.0, 2.0)
print(f"betas 32, 1: llama.cpp differs from transformers by {abs(usual - usual_llama).max():.3f}")
print(f"betas 8, 2: by {abs(other - other_llama).max():.3f}; logits are up to {abs(other).max():.1f}")
print("llama.cpp's logits are the same with both:", np.array_equal(usual_llama, other_llama))
assert abs(usual - usual_llama).max() < 0.1 < 1 < abs(other - other_llama).max()
assert np.array_equal(usual_llama, other_llama)
PY
"$folder/venv/bin/python" "$folder/betas.py" "$folder/model.gguf"
