#!/usr/bin/env bash
# Guess: a chat goes on from its own KV cache, whatever the same model did for another chat in between: nothing but the
#        cache belongs to a chat.
# What happens: Qwen2.5-VL keeps one more thing, `rope_deltas`, by which an image shortens the positions of what follows
#        it, as an attribute of the model. The next call with a cache takes that of the last prompt that the model read,
#        of whichever chat. So a text chat that goes on after somebody else's image has its tokens at other positions than
#        before it (forward and generate), and a chat with an image, after somebody else's text, too (generate). There is
#        no message, and positions may run backwards.
# Versions: transformers 5.23.0 (Qwen2.5-VL here; Qwen2-VL, Qwen3-VL, Qwen3.5, GLM-4V, PaddleOCR-VL … have the same code).
# Who is hit: servers and scripts that serve several chats with one model and keep a cache for each, caches of a
#        common system prompt, and evaluations that alternate texts and images.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > "$folder/chats.py" <<'PY'
import torch
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, logging

logging.set_verbosity_error()
text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
text |= dict(num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]})
vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=32, patch_size=14)
vision |= dict(spatial_merge_size=2, temporal_patch_size=2, window_size=56, fullatt_block_indexes=[0])
config = Qwen2_5_VLConfig(
    text_config=text, vision_config=vision, image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63
)
torch.manual_seed(0)
model = Qwen2_5_VLForConditionalGeneration(config).eval()
with torch.no_grad():
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=0.3)

words = torch.arange(1, 21)[None]
image = torch.tensor([[1, 2, 62, *[60] * 16, 63, 3, 4]])
seen = dict(
    input_ids=image, mm_token_type_ids=(image == 60).int(), image_grid_thw=torch.tensor([[1, 8, 8]]), pixel_values=torch.randn(64, 1176)
)
more = torch.arange(21, 27)[None]


def goes_on(first, between, through):
    """The logits of the tokens `more` after a chat's first prompt, with another chat's prompt in between."""
    with torch.no_grad():
        cache = DynamicCache(config=config)
        model(**first, past_key_values=cache)
        if between is not None and through == "forward":
            model(**between, past_key_values=DynamicCache(config=config))
        elif between is not None:
            model.generate(**between, max_new_tokens=1, do_sample=False)
        if through == "forward":
            return model(input_ids=more, past_key_values=cache).logits
        whole = torch.cat((first["input_ids"], more), 1)
        said = model.generate(
            whole, past_key_values=cache, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return torch.stack(said.logits, 1)


plain = dict(input_ids=words)
for chat, first, between in (("of text, after another's image", plain, seen), ("with an image, after another's text", seen, plain)):
    for through in ("forward", "generate"):
        model.model.rope_deltas = None
        alone = goes_on(first, None, through)
        model.model.rope_deltas = None
        again = goes_on(first, first, through)
        model.model.rope_deltas = None
        disturbed = goes_on(first, between, through)
        scale = alone.abs().max()
        same, off = ((x - alone).abs().max() / scale for x in (again, disturbed))
        print(f"{through}: a chat {chat}: logits off by {off:.1e} of the largest (after the same prompt {same:.0e})")
        # forward leaves the attribute alone where a prompt has no image; generate sets it to 0.
        assert same < 1e-5 and (off > 0.1) == ((chat, through) != ("with an image, after another's text", "forward"))
PY
"$folder/venv/bin/python" "$folder/chats.py"
