#!/usr/bin/env bash
# Guess: CTranslate2 knows Llama 3.1's scaling of positions: its converter takes rope_type "llama3" (and refuses
#        "yarn", which it does not know) and stores low_freq_factor and high_freq_factor.
# What happens: the scaling is off. The factor is stored for "linear" alone; "llama3" without it is a scaling by 1. A
#        converted model gives, bit by bit, the logits of one converted with rope_type "default", where transformers'
#        are far apart; "linear" and "default" agree with transformers. No warning.
# Versions: ctranslate2 4.8.5 (CPU, float32), transformers 5.23.0, torch 2.13.0.
# Who is hit: Llama 3.1, 3.2 and 3.3, and what is derived from them, in CTranslate2: the slow frequencies stay eight
#        or 32 times too fast, those of Llama 3.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5 numpy==2.4.6
cat > "$folder/scaling.py" <<'PY'
import sys

import ctranslate2
import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(64)]
IDS = [1] + [3 + i * i % 61 for i in range(100)]
source, target = sys.argv[1:]


def both(**rope: object) -> tuple[np.ndarray, np.ndarray]:
    """Logits of one model (always the same weights) in transformers and in CTranslate2."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.3, rope_parameters={"rope_theta": 1e4, **rope},
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(source)
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special).save_pretrained(source)
    ctranslate2.converters.TransformersConverter(source).convert(target, force=True)
    generator = ctranslate2.Generator(target, device="cpu", compute_type="float32", intra_threads=1)
    found = np.array(generator.forward_batch([[WORDS[i] for i in IDS]]))[0]
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy(), found


llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
results = {
    "default": both(rope_type="default"),
    "linear": both(rope_type="linear", factor=4.0),
    "llama3": both(original_max_position_embeddings=64, **llama3),
}
gaps = {kind: abs(ours - theirs).max() for kind, (ours, theirs) in results.items()}
for kind, gap in gaps.items():
    print(f"{kind}: CTranslate2 differs from transformers by {gap:.5f}")
same = np.array_equal(results["default"][1], results["llama3"][1])
print("CTranslate2's logits are the same for default and llama3:", same)
assert same and gaps["llama3"] > 1 and max(gaps["default"], gaps["linear"]) < 1e-3
PY
"$folder/venv/bin/python" "$folder/scaling.py" "$folder/model" "$folder/converted"
