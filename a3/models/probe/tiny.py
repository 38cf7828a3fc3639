"""A tiny random model of a config: all its features, small sizes, no value that it starts with."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from a3.models.built import empty_model

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
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    # Recurrent layers.
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
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

LAYERS = 4

# Parameters of a model that is tiny enough.
LARGEST = 2e7

# Of a type without a content: what it needs beside sizes, to be a decoder with all its layers.
OWN: dict[str, dict[str, Any]] = {
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "dots1": {"num_key_value_heads": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "zaya": {"num_experts_per_tok": 1},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
}


def keys_of(model_type: str) -> set[str]:
    """The keys that a type's config knows."""
    known = CONFIG_MAPPING[model_type]
    parameters = set(inspect.signature(known.__init__).parameters)
    return parameters | set(getattr(known, "__dataclass_fields__", {})) | set(known.attribute_map)


def tiny_content(model_type: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """The keys of a tiny model's config: those of `content`, or the type's own, with small sizes.

    The number of layers stays; of a type without a content it is LAYERS.
    """
    known, given = CONFIG_MAPPING[model_type], dict(content or {})
    heads = heads_of(model_type, given)
    small = SMALL | {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    if not given:
        small |= {"num_hidden_layers": LAYERS, "is_decoder": True, "first_k_dense_replace": 1}
    names = known.attribute_map
    # What a config leaves out, by 0 or null, stays out.
    out = {key for key in small if given.get(names.get(key, key), given.get(key, 1)) in (0, None)}
    small = {key: small[key] for key in (small.keys() & keys_of(model_type)) - out}
    aliases = {known.attribute_map.get(key) for key in small}
    given = {key: value for key, value in given.items() if key not in aliases}
    own = {} if content else OWN.get(model_type, {})
    return given | small | own | {"dtype": None}


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
    shorten(getattr(config, "rope_parameters", None))
    for key, value in list(vars(config).items()):
        cap = any(word in key for word in CAPS) and "final" not in key
        if cap and isinstance(value, int | float) and value > SMALL_CAP:
            setattr(config, key, SMALL_CAP)
    return config


def shorten(rope: Any) -> None:
    """Let what begins at long positions begin in a short text, in RoPE's parameters."""
    if isinstance(rope, dict):
        if "original_max_position_embeddings" in rope:
            rope["original_max_position_embeddings"] = SMALL["original_max_position_embeddings"]
        for each in rope.values():
            shorten(each)


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
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
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


def is_list_of(module: nn.Module, count: int) -> bool:
    """Whether a module is a list of `count` others."""
    return isinstance(module, nn.ModuleList) and len(module) == count
