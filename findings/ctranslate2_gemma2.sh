#!/usr/bin/env bash
# Guess: CTranslate2's converter has a loader for Gemma2Config of its own, apart from Gemma's, so a converted model
#        computes what sets Gemma 2 apart; what it cannot, it refuses, as it does with unknown scalings of positions.
# What happens: the four norms of a block are there, and all else is left out without a word: the cap of the logits
#        (final_logit_softcapping) and of attention scores, query_pre_attn_scalar (queries are scaled by the head's
#        size) and the sliding window of every other layer. With all of them off logits agree to rounding.
# Versions: ctranslate2 4.8.5 (CPU, float32), transformers 5.23.0, torch 2.13.0.
# Who is hit: scores and sampling of Gemma 2 (all sizes cap logits at 30), the 27B size (its scalar is not its head's
#        size), and texts above the window of 4096 tokens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5 numpy==2.4.6
cat > "$folder/gemma.py" <<'PY'
import logging
import sys

import ctranslate2
import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(64)]
IDS = [1] + [3 + i * i % 61 for i in range(60)]
# Off: no caps, queries scaled by the head's size, a window longer than the text.
OFF = {
    "final_logit_softcapping": None, "attn_logit_softcapping": None, "query_pre_attn_scalar": 16, "sliding_window": 512,
}
source, target = sys.argv[1:]
logging.disable()


def gap(**options: object) -> float:
    """Largest difference of logits between transformers and CTranslate2."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.3, **{**OFF, **options},
    )
    model = Gemma2ForCausalLM(config).eval()
    model.save_pretrained(source)
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2", "pad_token": "w0"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(source)
    ctranslate2.converters.TransformersConverter(source).convert(target, force=True)
    generator = ctranslate2.Generator(target, device="cpu", compute_type="float32", intra_threads=1)
    found = np.array(generator.forward_batch([[WORDS[i] for i in IDS]]))[0]
    with torch.no_grad():
        return abs(model(torch.tensor([IDS])).logits[0].numpy() - found).max()


without = gap()
gaps = {
    "final_logit_softcapping": gap(final_logit_softcapping=30.0),
    "attn_logit_softcapping": gap(attn_logit_softcapping=5.0),
    "query_pre_attn_scalar": gap(query_pre_attn_scalar=32),
    "sliding_window": gap(sliding_window=8),
}
print(f"all off: CTranslate2 differs from transformers by {without:.5f}")
for name, found in gaps.items():
    print(f"with {name}: by {found:.5f}")
assert without < 1e-3 and min(gaps.values()) > 0.1
PY
run() { "$folder/venv/bin/python" "$folder/gemma.py" "$folder/model" "$folder/converted" 2> "$folder/errors"; }
run || { cat "$folder/errors"; exit 1; }
