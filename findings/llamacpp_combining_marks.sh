#!/usr/bin/env bash
# Guess: with pre-tokenizer `tekken`, `gpt-4o` or `llama4` in a GGUF file, llama.cpp cuts text by the rule that these
#        tokenizers' tokenizer.json states, so that the same vocabulary and merges give the same ids.
# What happens: the published rule counts marks (\p{M}) as parts of a word. llama.cpp replaces it by one that knows
#        letters only, so a word ends at each combining mark. Hindi, where vowels after consonants are marks, falls to
#        pieces: a sentence of 9 tokens becomes 54, mostly single bytes; so does Latin text with decomposed accents.
#        Composed accents and Cyrillic come out the same, so the usual spot checks pass. No warning.
# Versions: llama.cpp in xllamacpp 2026.10.11549, gguf 0.19.0, tokenizers 0.23.3.
# Who is hit: Devanagari, Bengali, Tamil, Thai and other scripts with marks, in GGUF files of models that have
#        Mistral's Tekken or OpenAI's o200k vocabulary (Mistral Nemo, gpt-oss, Llama 4): other ids than in training,
#        more of them, and scores that do not compare.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3 gguf==0.19.0 xllamacpp==2026.10.11549 numpy==2.4.6
cat > "$folder/marks.py" <<'PY'
import ctypes
import json
import pathlib
import sys

import gguf
import numpy as np
import xllamacpp
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

TEXTS = {
    "Hindi": "हिन्दी विकिपीडिया एक मुक्त विश्वकोश है। नमस्ते दुनिया",
    "decomposed": "cafe\u0301 de\u0301ja\u0300",
    "composed": "caf\u00e9 d\u00e9j\u00e0",
    "Cyrillic": "Привет мир",
}
# Tekken's rule as its tokenizer.json has it: upper-case letters, then lower-case ones, marks in both. (The other
# two rules differ in contractions and digits, of which there are none here.)
upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
start = r"[^\r\n\p{L}\p{N}]?"
RULE = (
    rf"{start}{upper}*{lower}+|{start}{upper}+{lower}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained() -> Tokenizer:
    """A byte-level BPE that knows the words of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(RULE), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS.values()] * 9, trainer)
    return tokenizer


def write(path: str, tokenizer: Tokenizer, pre: str) -> None:
    """A GGUF file with this vocabulary and an empty model."""
    state = json.loads(tokenizer.to_str())["model"]
    words = sorted(state["vocab"], key=state["vocab"].get)
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(1)
    file.add_context_length(8)
    file.add_embedding_length(32)
    file.add_feed_forward_length(32)
    file.add_head_count(1)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(words)
    file.add_token_types([gguf.TokenType.NORMAL] * len(words))
    file.add_token_merges([" ".join(pair) for pair in state["merges"]])
    shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), (32, 32))
    shapes |= {"attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    for name, shape in ({"token_embd": (len(words), 32), "output_norm": (32,)} | shapes).items():
        file.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


# A structure larger than llama.cpp's, which passes on its own defaults.
Opaque = type("Opaque", (ctypes.Structure,), {"_fields_": [("bytes", ctypes.c_char * 1024)]})
llama = ctypes.CDLL(str(next(pathlib.Path(xllamacpp.__file__).parent.glob("*.so"))))
llama.llama_model_default_params.restype = Opaque
llama.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Opaque]
llama.llama_model_load_from_file.restype = llama.llama_model_get_vocab.restype = ctypes.c_void_p
llama.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
llama.llama_tokenize.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
llama.llama_tokenize.argtypes += [ctypes.c_bool, ctypes.c_bool]
silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
llama.llama_log_set(silent, None)

tokenizer, path = trained(), sys.argv[1]
for pre in ("tekken", "gpt-4o", "llama4"):
    write(path, tokenizer, pre)
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    assert model
    vocabulary = llama.llama_model_get_vocab(model)
    for kind, text in TEXTS.items():
        content, found = text.encode(), (ctypes.c_int * 256)()
        count = llama.llama_tokenize(vocabulary, content, len(content), found, 256, False, False)
        ids, expected = list(found[:count]), tokenizer.encode(text).ids
        print(f"{pre}, {kind}: {len(expected)} tokens in tokenizers, {count} in llama.cpp")
        assert (ids == expected) == (kind in ("composed", "Cyrillic"))
        assert ids == expected or count > 2 * len(expected)
PY
"$folder/venv/bin/python" "$folder/marks.py" "$folder/model.gguf"
