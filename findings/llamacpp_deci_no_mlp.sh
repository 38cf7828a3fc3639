#!/usr/bin/env bash
# Guess: a layer without MLP is the layer's attention alone. llama.cpp's architecture `deci` has feed_forward_length by
#        layer and takes 0, for Llama-Nemotron's layers without MLP.
# What happens: it does so only where the layer has no attention either (as Nemotron Ultra's have none). With attention and
#        a length of 0, the file loads, attention is computed, and its result is dropped: logits are, bit by bit, those of a
#        file whose layer does nothing, and not those of a file whose MLP is zeros.
# Versions: llama.cpp in xllamacpp 2026.10.11549 (CPU), gguf 0.19.0.
# Who is hit: pruned models with whole MLPs taken out, which are most of what is pruned by layer. A width of 1 of zeros is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0 xllamacpp==2026.10.11549 numpy==2.4.6
cat > "$folder/no_mlp.py" <<'PY'
import ctypes
import pathlib
import sys

import gguf
import numpy as np
import xllamacpp

WIDTH, HEADS, INNER, WORDS, LAYERS = 64, 4, 128, 96, 3
TOKENS = [i * i % WORDS for i in range(60)]
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


def logits(inner: list[int], attention: float, mlp: float) -> np.ndarray:
    """Last logits of a model with these lengths; outputs of the middle layer times `attention` and `mlp`."""
    draw = np.random.default_rng(0)
    file = gguf.GGUFWriter(path, "deci")
    file.add_block_count(LAYERS)
    file.add_context_length(512)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(inner)
    file.add_head_count([HEADS] * LAYERS)
    file.add_head_count_kv([HEADS] * LAYERS)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_dimension_count(WIDTH // HEADS)
    file.add_tokenizer_model("no_vocab")
    file.add_vocab_size(WORDS)

    def matrix(name: str, rows: int, columns: int, factor: float = 1.0, write: bool = True) -> None:
        value = (draw.standard_normal((rows, columns)) * 0.2 * factor).astype(np.float32)
        if write:
            file.add_tensor(name, value)

    matrix("token_embd.weight", WORDS, WIDTH)
    matrix("output.weight", WORDS, WIDTH)
    file.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for i in range(LAYERS):
        middle, there = i == 1, inner[i] > 0
        file.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v"):
            matrix(f"blk.{i}.{name}.weight", WIDTH, WIDTH)
        matrix(f"blk.{i}.attn_output.weight", WIDTH, WIDTH, attention if middle else 1.0)
        if there:
            file.add_tensor(f"blk.{i}.ffn_norm.weight", np.ones(WIDTH, np.float32))
        matrix(f"blk.{i}.ffn_gate.weight", INNER, WIDTH, write=there)
        matrix(f"blk.{i}.ffn_up.weight", INNER, WIDTH, write=there)
        matrix(f"blk.{i}.ffn_down.weight", WIDTH, INNER, mlp if middle else 1.0, write=there)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    context = llama.llama_init_from_model(model, llama.llama_context_default_params())
    tokens = (ctypes.c_int * len(TOKENS))(*TOKENS)
    assert llama.llama_decode(context, llama.llama_batch_get_one(ctypes.addressof(tokens), len(tokens))) == 0
    return np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (WORDS,)).copy()


without = logits([INNER, 0, INNER], attention=1, mlp=1)
zeros = logits([INNER] * LAYERS, attention=1, mlp=0)
nothing = logits([INNER] * LAYERS, attention=0, mlp=0)
print(f"no MLP in the middle layer: {abs(without - zeros).max():.3f} off a file whose MLP there is zeros")
print(f"and {abs(without - nothing).max():.2g} off a file whose attention there is zeros, too")
assert abs(without - nothing).max() < 1e-4 < 0.1 < abs(without - zeros).max()
PY
"$folder/venv/bin/python" "$folder/no_mlp.py" "$folder/model.gguf"
