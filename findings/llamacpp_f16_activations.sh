#!/usr/bin/env bash
# Guess: an F16 file in llama.cpp means weights of 16 bits and activations in float32, so where every weight is a
#        number of float16 exactly, the F16 file and the F32 file give the same logits.
# What happens: on CPUs a product rounds the activations to the type of the weights first. With F16 they end at 65504:
#        where gate times up is larger, the product with ffn_down is infinite and logits are NaN, in a model that is
#        harmless in F32 and BF16. Far below the limit, too, the F16 file is off (by 0.004 of 7), and the BF16 file,
#        whose activations get 8 bits, ten times as much, though no weight was rounded.
# Versions: llama.cpp in xllamacpp 2026.10.11549 (CPU), gguf 0.19.0.
# Who is hit: models trained in bfloat16 with large activations, put in F16 files since "all weights fit"; and whoever
#        takes a 16-bit file as the exact reference for the loss of a quantised one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0 xllamacpp==2026.10.11549 numpy==2.4.6
cat > "$folder/activations.py" <<'PY'
import ctypes
import pathlib
import sys

import gguf
import numpy as np
import xllamacpp

WIDTH, WORDS = 64, 96
TOKENS = [i * i % WORDS for i in range(50)]
TYPES = gguf.GGMLQuantizationType
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


def cast(array: np.ndarray, kind: TYPES) -> np.ndarray:
    """The same numbers in another type, none of them rounded."""
    cut = gguf.quants.quantize(array, kind)
    assert np.array_equal(gguf.quants.dequantize(cut, kind), array)
    return cut


def write(kind: TYPES, scale: float) -> None:
    """A model whose gate and up are `scale` times as large, and down smaller by its square."""
    random = np.random.default_rng(0)
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(1)
    file.add_context_length(512)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(WIDTH)
    file.add_head_count(2)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_tokenizer_model("no_vocab")
    file.add_vocab_size(WORDS)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        file.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    scales = {"ffn_gate": scale, "ffn_up": scale, "ffn_down": scale**-2}
    blocks = [f"blk.0.{name}" for name in ("attn_q", "attn_k", "attn_v", "attn_output", *scales)]
    for name in ("token_embd", "output", *blocks):
        rows = WIDTH if name in blocks else WORDS
        array = random.integers(-8, 9, (rows, WIDTH)) / 16 * scales.get(name.removeprefix("blk.0."), 1.0)
        file.add_tensor(f"{name}.weight", cast(array.astype(np.float32), kind), raw_dtype=kind)
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


for scale in (1.0, 128.0):
    found = {}
    for kind in (TYPES.F32, TYPES.F16, TYPES.BF16):
        write(kind, scale)
        found[kind] = last_logits()
    gaps = {kind.name: abs(logits - found[TYPES.F32]).max() for kind, logits in found.items()}
    print(f"scale {scale:.0f}: logits of F32 up to {abs(found[TYPES.F32]).max():.1f};", end=" ")
    print("off by", {name: f"{gap:.4f}" for name, gap in gaps.items()})
    assert np.isfinite(found[TYPES.F32]).all() and 0.01 < gaps["BF16"] < 1
    assert 0.001 < gaps["F16"] < 0.1 if scale == 1 else np.isnan(gaps["F16"])
PY
"$folder/venv/bin/python" "$folder/activations.py" "$folder/model.gguf"
