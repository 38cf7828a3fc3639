#!/usr/bin/env bash
# Guess: Gemma3ForCausalLM.from_pretrained on the folder of a whole Gemma 3 (4B and larger: text and vision) loads the
#        language model in it: it takes the text part of the config by itself, and the weights are all there.
# What happens: it takes the config's text part, and not one weight: the folder's names begin with
#        language_model.model., the class looks for model. All weights are random, and from_pretrained returns the model.
#        A report on the log names every one as MISSING; nothing is raised. Gemma3ForConditionalGeneration on the same
#        folder, and AutoModelForCausalLM, which picks that class, are right.
# Versions: transformers 5.23.0.
# Who is hit: scripts that evaluate, quantise or fine-tune the text part of Gemma 3 by its class: they work on noise,
#        and where logging is set to errors without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > "$folder/load.py" <<'PY'
import sys

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, logging

logging.set_verbosity_error()
text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
text |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
vision |= dict(image_size=28, patch_size=14)
torch.manual_seed(0)
whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)).eval()
whole.save_pretrained(sys.argv[1])
with safe_open(f"{sys.argv[1]}/model.safetensors", "pt") as file:
    print("names in the folder:", sorted(name for name in file.keys() if "embed_tokens" in name))
ids = torch.arange(5, 15)[None]
with torch.no_grad():
    wanted = whole(input_ids=ids).logits
    for kind in (Gemma3ForConditionalGeneration, AutoModelForCausalLM, Gemma3ForCausalLM):
        model, said = kind.from_pretrained(sys.argv[1], output_loading_info=True)
        far = ((model.eval()(input_ids=ids).logits - wanted).abs().max() / wanted.abs().max()).item()
        missing = len(said["missing_keys"])
        print(f"{kind.__name__}: a {type(model).__name__}, {missing} weights missing, logits off by {far:.1e} of the largest")
        assert (missing > 20 and far > 0.1) == (kind is Gemma3ForCausalLM)
PY
"$folder/venv/bin/python" "$folder/load.py" "$folder/model"
