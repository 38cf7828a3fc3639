#!/usr/bin/env bash
# Guess: a model that takes a StaticCache without an error gives the same logits with it as without.
# What happens: GPT-Neo's local layers (window_size) cut the causal mask out of a table by the lengths of queries and
#        keys. A static cache is as long from the start as it will ever be, so that they get the last rows of the table
#        in place of those of the tokens that are there: the logits of the very prompt are off by 15 % of the largest,
#        without an error or a warning. With global layers alone they are the same. The class says that it cannot be
#        compiled (_can_compile_fullgraph), but nothing says that of a cache.
# Versions: transformers 5.23.0, torch 2.13.0.
# Who is hit: whoever gives GPT-Neo checkpoints, which all have local layers, a static cache.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > "$folder/static.py" <<'PY'
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, StaticCache

LENGTH = 12


def difference(kinds):
    """The largest difference of the prompt's logits with a static cache of LENGTH + 8 places, as a share of them."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64,
        window_size=4, attention_types=[[kinds, 2 // len(kinds)]], bos_token_id=0, eos_token_id=0,
    )
    model = GPTNeoForCausalLM(config).eval()
    ids = torch.arange(1, LENGTH + 1)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        cache = StaticCache(config=config, max_cache_len=LENGTH + 8)
        found = model(ids, past_key_values=cache, use_cache=True).logits
    return ((found - wanted).abs().max() / wanted.abs().max()).item(), model._can_compile_fullgraph


for kinds in (["global"], ["global", "local"]):
    far, claims = difference(kinds)
    print(f"layers {kinds}: logits differ by {far:.1e} of the largest; says it can be compiled: {claims}")
    assert (far > 0.01) == ("local" in kinds)
PY
"$folder/venv/bin/python" "$folder/static.py"
