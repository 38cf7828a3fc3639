"""Tiny random models of several modalities, with images that need no processor."""

from pathlib import Path
from typing import Any

import torch
from tiny import SIZES, VOCABULARY, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

IMAGE, START, END = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2
TEXT = SIZES | {"vocab_size": VOCABULARY + 4, "head_dim": 16, "num_hidden_layers": 3}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": IMAGE + 3}
QWEN_TOKENS |= {"vision_start_token_id": START, "vision_end_token_id": END}

# By type: the keys of a tiny config beside the sizes of text.
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"query_pre_attn_scalar": 16, "sliding_window": 8},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
    },
    "glm4v": {
        "text_config": {"rope_parameters": MROPE},
        "vision_config": QWEN_VISION | {"image_size": 16},
        "image_token_id": IMAGE,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_token_id": IMAGE + 3,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 16},
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": MROPE | {"mrope_interleaved": True}},
        "vision_config": QWEN_VISION
        | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
    "qwen3_vl_moe": {
        "text_config": {
            "rope_parameters": MROPE | {"mrope_interleaved": True},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
        },
        "vision_config": QWEN_VISION
        | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": MROPE},
        "vision_config": QWEN_VISION | {"fullatt_block_indexes": [1], "window_size": 16},
        **QWEN_TOKENS,
    },
}


def tiny_wrapper(folder: Path, model_type: str, seed: int = 0) -> Path:
    """Save a random float32 model of several modalities and its tokenizer; returns `folder`."""
    torch.manual_seed(seed)
    said = CONFIGS[model_type]
    config = AutoConfig.for_model(
        model_type,
        tie_word_embeddings=False,
        **said | {"text_config": TEXT | said["text_config"]},
    )
    model = AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for _, value in sorted(model.named_parameters()):
            spread = torch.randn_like(value)
            value.copy_(0.1 * spread if value.ndim > 1 else value + 0.2 * spread)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def image_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of 16 tokens with an image of 16 x 16 pixels among them, as a processor makes them."""
    torch.manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (1, 16))
    ids[0, 3:9] = torch.tensor([START, IMAGE, IMAGE, IMAGE, IMAGE, END])
    kinds = (ids == IMAGE).int()
    found: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vision = model.config.vision_config.model_type
    if vision.startswith(("qwen", "glm")):
        found["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4)
        found["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        found["mm_token_type_ids"] = kinds
    else:
        found["pixel_values"] = torch.randn(1, 3, 16, 16)
        if vision == "pixtral":
            found["image_sizes"] = torch.tensor([[16, 16]])
        if vision.startswith("siglip"):
            found["token_type_ids"] = kinds
    return found
