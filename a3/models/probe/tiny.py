"""A tiny random model of a config: all its features, small sizes, no value that it starts with."""

import inspect
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from a3.core.errors import A3Error
from a3.models.built import empty_model, with_trunk
from a3.models.wrappers import WRAPPERS, auto_class, text_of, wrapper_of

# Sizes by the keys that configs have for them. No two that could be taken for another are equal.
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 80,
    "ffn_hidden_size": 80,
    "n_inner": 80,
    "ffn_dim": 80,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "dff": 80,
    "dim_ff": 80,
    "head_dim": 16,
    "dim_head": 16,
    "d_head": 16,
    "rotary_dim": 8,
    "global_head_dim": 32,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "input_embedding_size": 64,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    # Latent attention.
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    # Recurrent layers.
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_dt_rank": 4,
    "ssm_state_size": 8,
    "lru_width": 64,
    "attention_window_size": 8,
    # Positions: windows are shorter than the text.
    "sliding_window": 8,
    "window_size": 8,
    "attention_chunk_size": 8,
    "original_max_position_embeddings": 8,
    "floor_scale": 4,
    "attn_scale": 0.5,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

# Caps of scores, queries, keys and values, which a tiny model's small numbers would not reach.
CAPS = ("softcap", "soft_cap", "logit_cap", "clip")

SMALL_CAP = 0.5

# Sizes of what is no language model, which is built and kept but not run.
LITTLE = {
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "layers"), 2),
    **dict.fromkeys(("intermediate_size", "mlp_dim"), 48),
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size"), 64),
    # Of models that make images, too.
    "base_channels": 32,
    **dict.fromkeys(("num_embeddings", "projection_dim", "image_token_embed_dim"), 64),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads"), 4),
    "head_dim": 16,
}

# Lists of layers, which would have to be among those few.
AMONG = {"deepstack_visual_indexes": [0], "fullatt_block_indexes": [1], "global_attn_indexes": [1]}

LAYERS = 4

# More layers than any model has: configs and models have lists of that length.
MOST_LAYERS = 1000

# Parameters of a model that is tiny enough.
LARGEST = 2e7

# Sections of RoPE's pairs that turn by time, height and width.
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}

# Of a type without a content: what it needs beside sizes, to be a decoder with all its layers.
OWN: dict[str, dict[str, Any]] = {
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "dots1": {"num_key_value_heads": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "glm4v_moe_text": MROPE,
    "glm4v_text": MROPE,
    "glm_ocr_text": MROPE,
    "paddleocr_vl_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen3_vl_moe_text": MROPE,
    "qwen3_vl_text": MROPE,
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
}


def require_causal(path: Path, model_type: str) -> None:
    """Raise A3Error for a type without a causal language model in transformers.

    A config could name code of its own for it, and a probe runs the model.
    """
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise A3Error(
            f"{path}: model_type is {model_type!r}, for which transformers has no causal language "
            "model. a3 families lists the types that a3 knows."
        )


def require_few_layers(path: Path, content: dict[str, Any]) -> None:
    """Raise A3Error if a config.json, or a config in it, has more than MOST_LAYERS layers."""
    for each in (content, *(value for value in content.values() if isinstance(value, dict))):
        kind = each.get("model_type")
        known = isinstance(kind, str) and kind in CONFIG_MAPPING
        names = CONFIG_MAPPING[kind].attribute_map if known else {}
        for key in {"num_hidden_layers", names.get("num_hidden_layers", "num_hidden_layers")}:
            count = each.get(key)
            if isinstance(count, int | float) and count > MOST_LAYERS:
                raise A3Error(
                    f"{path}: {key} is {count}, and a3 expects at most {MOST_LAYERS}. Correct the "
                    "config, or fetch the model again."
                )


def keys_of(model_type: str) -> set[str]:
    """The keys that a type's config knows."""
    known = CONFIG_MAPPING[model_type]
    parameters = set(inspect.signature(known.__init__).parameters)
    return parameters | set(getattr(known, "__dataclass_fields__", {})) | set(known.attribute_map)


def tiny_content(model_type: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """The keys of a tiny model's config: those of `content`, or the type's own, with small sizes.

    The number of layers stays; of a type without a content it is LAYERS.
    """
    if model_type in WRAPPERS:
        return wrapper_content(model_type, content)
    known, given = CONFIG_MAPPING[model_type], dict(content or {})
    heads = heads_of(model_type, given)
    small = SMALL | {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    if not given:
        small |= {"num_hidden_layers": LAYERS, "is_decoder": True, "first_k_dense_replace": 1}
    names = known.attribute_map
    # What a config leaves out, by 0 or null, stays out.
    out = {key for key in small if given.get(names.get(key, key), given.get(key, 1)) in (0, None)}
    # What the class derives from other keys is not among its own, but may be in a content.
    small = {key: small[key] for key in (small.keys() & (keys_of(model_type) | set(given))) - out}
    if "head_dim" in given and given["head_dim"] == given.get("qk_rope_head_dim"):
        small["head_dim"] = SMALL["qk_rope_head_dim"]
    aliases = {known.attribute_map.get(key) for key in small}
    # Dictionaries of older configs, too, whose sizes the class takes over to keys of its own.
    own_keys = keys_of(model_type)
    old = {k for k, v in given.items() if k.endswith("_config") and isinstance(v, dict)} - own_keys
    given = {key: value for key, value in given.items() if key not in aliases | old}
    # Configs change what they are given.
    own = {} if content else deepcopy(OWN.get(model_type, {}))
    given.pop("auto_map", None)
    return given | small | own | {"dtype": None}


def wrapper_content(model_type: str, content: dict[str, Any] | None) -> dict[str, Any]:
    """`tiny_content` of a model of several modalities: beside text, few small layers."""
    given = content or CONFIG_MAPPING[model_type]().to_dict()
    found = dict(given)
    for key, part in given.items():
        if key.endswith("_config") and isinstance(part, dict):
            found[key] = part | {name: LITTLE[name] for name in part.keys() & LITTLE.keys()}
            found[key] |= {name: AMONG[name] for name in part.keys() & AMONG.keys()}
            if isinstance(types := part.get("layer_types"), list):
                found[key]["layer_types"] = types[: LITTLE["num_hidden_layers"]]
    text = given["text_config"]["model_type"]
    of = tiny_content(text, given["text_config"] if content else None)
    found["text_config"] = of | {"model_type": text}
    if "hidden_size" in found:
        found["hidden_size"] = of["hidden_size"]
    return found


def heads_of(model_type: str, content: dict[str, Any]) -> tuple[int, int]:
    """Query and key/value heads of the tiny model, shared as in the config."""
    names = CONFIG_MAPPING[model_type].attribute_map
    found = [
        content.get(key, content.get(names.get(key, key)))
        for key in ("num_attention_heads", "num_key_value_heads")
    ]
    if "kv_lora_rank" in keys_of(model_type):
        return 4, 4
    if not content:
        return 4, 2
    heads, groups = found[0] or 1, found[1] or found[0] or 1
    return 4, 4 if groups == heads else 1 if groups == 1 else 2


def tiny_config(model_type: str, content: dict[str, Any]) -> PreTrainedConfig:
    """The config of `tiny_content`; transformers' own exceptions are passed on."""
    known = CONFIG_MAPPING[model_type]
    config = known.from_dict({key: value for key, value in content.items() if key != "model_type"})
    text = text_of(config)
    shorten(getattr(text, "rope_parameters", None), text)
    for key, value in list(vars(text).items()):
        cap = any(word in key for word in CAPS) and "final" not in key
        if cap and isinstance(value, int | float) and value > SMALL_CAP:
            setattr(text, key, SMALL_CAP)
    return config


def shorten(rope: Any, config: PreTrainedConfig) -> None:
    """Let what begins at long positions begin in a short text, in RoPE's parameters.

    Factors and sections of RoPE pairs become as many as the tiny model has pairs.
    """
    if isinstance(rope, dict):
        if "original_max_position_embeddings" in rope:
            rope["original_max_position_embeddings"] = SMALL["original_max_position_embeddings"]
        for key in ("short_factor", "long_factor"):
            if isinstance(rope.get(key), list):
                rope[key] = rope[key][: rotated_pairs(rope, config)]
        if isinstance(rope.get("mrope_section"), list):
            pairs = rotated_pairs(rope, config)
            first, second = pairs // 4, 3 * pairs // 8
            rope["mrope_section"] = [first, second, pairs - first - second]
        for each in rope.values():
            shorten(each, config)


def rotated_pairs(rope: dict[str, Any], config: PreTrainedConfig) -> int:
    """How many pairs of a head RoPE rotates."""
    return int(head_size(config) * rope.get("partial_rotary_factor", 1.0)) // 2


def head_size(config: PreTrainedConfig) -> int:
    """The size of a head as RoPE of transformers takes it from a config."""
    said = getattr(config, "head_dim", None)
    return said or config.hidden_size // config.num_attention_heads


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model, float32, none of whose numbers is the one that it starts with.

    A gain of 1, a bias or a sink of 0 would hide that it was forgotten. Raises ValueError if sizes
    that are not in SMALL leave it large.
    """
    count = sum(value.numel() for value in empty_model(config).parameters())
    if count > LARGEST:
        raise ValueError(f"it has {count:,} parameters, with all sizes small that a3 knows")
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = auto_class(wrapper_of(config)).from_config(
        config, attn_implementation="eager", trust_remote_code=False
    )
    model = with_trunk(model.float().eval())
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            value.copy_(redrawn(name, value))
        for name, value in sorted(model.named_buffers()):
            if "bias" in name and value.is_floating_point() and value.ndim <= 2:
                value.copy_(0.1 * torch.randn_like(value))
    return model


def redrawn(name: str, value: Tensor) -> Tensor:
    """Another value of a parameter: random matrices, and vectors off their start."""
    if value.ndim > 1:
        return 0.15 * torch.randn_like(value)
    return value + 0.3 * torch.randn_like(value)
