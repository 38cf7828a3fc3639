"""The config of a GGUF file: every key of its architecture is used or checked.

These are llama.cpp's keys; the rest of each architecture is in its code. Other keys in a file could
silently change the model, so a3 refuses them by name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from a3.core.errors import A3Error
from a3.models import gguf_rope
from a3.models.gguf import Gguf
from a3.models.gguf_keys import OWN
from a3.models.gguf_rope import rope_parameters

# A bias of a layer.
BIAS = re.compile(r"blk\.\d+\.(\w+)\.bias")

RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}

SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}

GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}

BLOOM = {
    "embedding_length": "hidden_size",
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}

SPECIAL = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}

WINDOW = "attention.sliding_window"

# Of how a file was made; nothing of them is used.
SAID = ("tensor_data_layout",)


def nothing(file: Gguf, head_dim: int) -> dict[str, Any]:
    """An architecture that has no more to say."""
    return {}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's architecture is one of a family of transformers.

    `keys` have to be in the file, and have the name on their right in the config; `used` are those
    that `more` reads, which says the rest of the config by the file and its head size.
    """

    family: str
    keys: dict[str, str]
    used: tuple[str, ...] = ()
    more: Callable[[Gguf, int], dict[str, Any]] = nothing
    rope: bool = True


def llama(file: Gguf, head_dim: int) -> dict[str, Any]:
    """Biases are there or not; transformers has all of attention's, or none."""
    biased = {match[1] for name in file.tensors if (match := BIAS.fullmatch(name))}
    return {
        "attention_bias": bool(biased & {"attn_q", "attn_k", "attn_v", "attn_output"}),
        "mlp_bias": bool(biased & {"ffn_gate", "ffn_up", "ffn_down"}),
    }


def gemma2(file: Gguf, head_dim: int) -> dict[str, Any]:
    """Caps, and a scale that llama.cpp has for the largest one alone."""
    return {
        "attn_logit_softcapping": file.own("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.own("final_logit_softcapping", 30.0) or None,
        "sliding_window": window(file, 4096),
        "query_pre_attn_scalar": scalar(file, head_dim, 46),
    }


def gemma3(file: Gguf, head_dim: int) -> dict[str, Any]:
    """One RoPE of layers with a window, one of the others."""
    local = {"rope_type": "default", "rope_theta": file.own("rope.freq_base_swa", 10000.0)}
    return {
        "final_logit_softcapping": file.own("final_logit_softcapping") or None,
        "sliding_window": window(file, None),
        "query_pre_attn_scalar": scalar(file, head_dim, 62),
        "rope_parameters": {
            "full_attention": rope_parameters(file, head_dim),
            "sliding_attention": local,
        },
    }


def window(file: Gguf, default: int | None) -> int:
    """Positions that a layer with a window sees; raises A3Error if it is none."""
    found = file.own(WINDOW, default)
    if not found:
        raise A3Error(
            f"{file.path}: {file.architecture}.{WINDOW} is {'missing' if found is None else 0}, "
            "expected a whole number above 0. Fetch it again."
        )
    return found


def scalar(file: Gguf, head_dim: int, largest: int) -> float:
    """Gemma's scale of scores, to the power of -2; the largest model has another."""
    if file.own("block_count") != largest:
        return head_dim
    return file.needed("embedding_length") / file.needed("attention.head_count")


def partial(file: Gguf, head_dim: int) -> dict[str, Any]:
    """RoPE on a part of each head."""
    rotated = file.own("rope.dimension_count", head_dim)
    if rotated > head_dim or rotated % 2:
        raise A3Error(
            f"{file.path}: {file.architecture}.rope.dimension_count is {rotated}, expected an even "
            f"number up to the {head_dim} dimensions of a head. Fetch it again."
        )
    rope = rope_parameters(file, rotated) | {"partial_rotary_factor": rotated / head_dim}
    return {"rope_parameters": rope}


def phi3(file: Gguf, head_dim: int) -> dict[str, Any]:
    """Its window is in files, though llama.cpp does without."""
    original = file.own("rope.scaling.original_context_length", file.needed("context_length"))
    return partial(file, head_dim) | {
        "sliding_window": file.own(WINDOW, 0) or None,
        "original_max_position_embeddings": original,
    }


def stablelm(file: Gguf, head_dim: int) -> dict[str, Any]:
    """Biases and the second norm are there or not."""
    return partial(file, head_dim) | {
        "use_qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in file.tensors,
    }


def qwen3moe(file: Gguf, head_dim: int) -> dict[str, Any]:
    """Experts in every layer; llama.cpp makes the weights of those that are taken sum to 1."""
    experts, taken = file.needed("expert_count"), file.needed("expert_used_count")
    if not 1 <= taken <= experts:
        raise A3Error(
            f"{file.path}: {file.architecture}.expert_used_count is {taken}, and "
            f"{file.architecture}.expert_count {experts}. Fetch it again."
        )
    return {
        "num_experts": experts,
        "num_experts_per_tok": taken,
        "moe_intermediate_size": file.needed("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


CAPS = ("attn_logit_softcapping", "final_logit_softcapping")

EXPERTS = ("expert_count", "expert_used_count", "expert_feed_forward_length")

LAYER_NORM = {"attention.layer_norm_epsilon": "layer_norm_eps"}

ARCHITECTURES = {
    "llama": Architecture("llama", SIZES | RMS, more=llama),
    "qwen2": Architecture("qwen2", SIZES | RMS),
    "qwen3": Architecture("qwen3", SIZES | RMS),
    "qwen3moe": Architecture("qwen3_moe", SIZES | RMS, EXPERTS, qwen3moe),
    "gemma2": Architecture("gemma2", SIZES | RMS, (WINDOW, *CAPS), gemma2),
    "gemma3": Architecture(
        "gemma3_text", SIZES | RMS, (WINDOW, CAPS[1], "rope.freq_base_swa"), gemma3
    ),
    "phi3": Architecture("phi3", SIZES | RMS, (WINDOW, "rope.dimension_count"), phi3),
    "stablelm": Architecture(
        "stablelm", SIZES | LAYER_NORM, ("use_parallel_residual", "rope.dimension_count"), stablelm
    ),
    "gpt2": Architecture("gpt2", GPT2, rope=False),
    "bloom": Architecture("bloom", BLOOM, ("context_length", "feed_forward_length"), rope=False),
}


def config_of(file: Gguf) -> PreTrainedConfig:
    """The config of a file's model.

    Raises A3Error for an architecture that a3 does not read, a key that is missing or of another
    kind, and a key that says what the family's code in transformers would not do.
    """
    known = ARCHITECTURES.get(file.architecture)
    if known is None:
        raise A3Error(
            f"{file.path}: its architecture is {file.architecture!r}; a3 reads GGUF files of "
            f"{', '.join(ARCHITECTURES)}. Name the folder in Hugging Face's layout instead."
        )
    head_dim = head_size(file)
    refuse_others(file, known, head_dim)
    content = {name: file.needed(key) for key, name in known.keys.items()}
    content |= {"vocab_size": vocabulary_size(file), "dtype": "float32"}
    content |= {name: token_id(file, key) for name, key in SPECIAL.items()}
    content["tie_word_embeddings"] = "output.weight" not in file.tensors
    if known.rope:
        content |= {
            "head_dim": head_dim,
            "num_key_value_heads": key_value_heads(file),
            "rope_parameters": rope_parameters(file, head_dim) if known.more is not gemma3 else {},
        }
    return CONFIG_MAPPING[known.family].from_dict(content | known.more(file, head_dim))


def token_id(file: Gguf, key: str) -> int | None:
    """The number of a special token, if there is one; raises A3Error if it is no row's."""
    number = file.of_file(key)
    if number is not None and number >= vocabulary_size(file):
        raise A3Error(
            f"{file.path}: {key} is {number}, and the embedding has {vocabulary_size(file)} rows. "
            "Fetch it again."
        )
    return number


def key_value_heads(file: Gguf) -> int:
    """Key/value heads; a file that does not say has one for each head."""
    key = "attention.head_count_kv"
    return file.needed(key if file.own(key) is not None else "attention.head_count")


def head_size(file: Gguf) -> int:
    """Dimensions of a head."""
    if file.own("attention.key_length") is not None:
        return file.needed("attention.key_length")
    return file.needed("embedding_length") // file.needed("attention.head_count")


def vocabulary_size(file: Gguf) -> int:
    """Rows of the embedding; raises A3Error for fewer than tokens."""
    place = file.tensors.get("token_embd.weight")
    if place is None:
        raise A3Error(f"{file.path}: no tensor token_embd.weight. Fetch it again.")
    if (tokens := len(file.of_file("tokenizer.ggml.tokens", []))) > place.shape[0]:
        raise A3Error(
            f"{file.path}: tokenizer.ggml.tokens has {tokens}, and token_embd.weight "
            f"{place.shape[0]} rows. Fetch it again."
        )
    return place.shape[0]


def refuse_others(file: Gguf, known: Architecture, head_dim: int) -> None:
    """Raise A3Error for a key of the architecture that is not used and says what does not hold."""
    used = {*known.keys, *known.used, *SAID}
    expected: dict[str, tuple[Any, ...]] = {
        "vocab_size": (vocabulary_size(file),),
        "attention.head_count_kv": (key_value_heads(file),),
        "attention.key_length": (head_dim,),
        "attention.value_length": (head_dim,),
        "rope.dimension_count": (head_dim,),
        "attention.causal": (True,),
        "attention.scale": (0.0, head_dim**-0.5),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "nextn_predict_layers": (0,),
        **{key: (value,) for key, value in gguf_rope.BETAS.items()},
    }
    if known.rope:
        used |= set(gguf_rope.KEYS)
    elif key_value_heads(file) != file.needed("attention.head_count"):
        expected["attention.head_count_kv"] = (file.needed("attention.head_count"),)
    prefix = f"{file.architecture}."
    for key, value in file.values.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix):
            continue
        if name in OWN:
            file.own(name)
        if name in used:
            continue
        # A window as long as the context hides nothing.
        harmless = name == WINDOW and (value == 0 or value >= file.needed("context_length"))
        if not harmless and not any(close(value, one) for one in expected.get(name, ())):
            raise A3Error(
                f"{file.path}: {key} is {repr(value)[:60]}, which a3 does not read into a model of "
                f"{known.family}. Name the folder in Hugging Face's layout instead."
            )


def close(value: Any, expected: Any) -> bool:
    """Whether a value of a header is an expected one, to float32's rounding."""
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return abs(value - expected) <= 1e-6 * abs(expected)
    return value == expected
