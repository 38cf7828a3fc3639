"""Models of several modalities that hold a language model: a3 compresses it, and keeps the rest.

What a3 needs to know of such a wrapper is where its language model is in the model without a head.
Everything else follows from the language model's own type, as if it were alone.
"""

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from a3.core.errors import A3Error

# model_type of wrappers, by where the language model is.
_WRAPPERS = {
    "language_model": (
        "aria aya_vision cohere2_vision cosmos3_omni deepseek_vl deepseek_vl_hybrid exaone4_5 "
        "fuyu gemma3 gemma4 gemma4_unified glm46v glm4v glm4v_moe glm_ocr glmga got_ocr2 "
        "hyperclovax_vision_v2 internvl janus lfm2_vl lfm3_vl lighton_ocr llava llava_next "
        "llava_next_video llava_onevision minicpm_ocr minicpmv4_6 minicpmv4_7 mistral3 ovis2 "
        "paddleocr_vl paligemma qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe "
        "video_llama_3 video_llava vipllava"
    ),
    "text_model": "granite_docling idefics2 idefics3 smolvlm",
}

WRAPPERS: dict[str, str] = {
    model_type: where for where, types in _WRAPPERS.items() for model_type in types.split()
}

# Why a3 refuses others, and their types.
_REFUSED = {
    "its language model is of a type that exists in it alone, and no probe confirms it": (
        "cosmos3_edge deepseek_ocr2 diffusion_gemma emu3 ernie4_5_vl_moe glm5_next "
        "granite4_vision hunyuan_vl kosmos-2 kosmos-2.5 mistral_large4 molmo2 muse_glimmer "
        "muse_spark qwen2_5_omni_thinker qwen3_omni_moe_thinker step3p7 "
        "unlimited_ocr"
    ),
    "its language model is of a type that a3 does not support": (
        "cohere_compass dots3_note inkling2 inkling_mm_model qwen4_exp"
    ),
    "an encoder-decoder, or layers with cross-attention to images": (
        "blip evolla florence2 idefics mllama pix2struct pp_formulanet t5gemma2 udop "
        "vision-encoder-decoder"
    ),
    "its language model is no part of its own": "chameleon git mistral4 pi0",
    "its language model has its head inside": (
        "blip-2 instructblip instructblipvideo llama4 nemotron_h_omni"
    ),
    "its files have matrices that transformers converts for this type alone": (
        "kimi_k25 minimax_m3_vl qianfan_ocr shieldgemma2"
    ),
    "transformers has no class of it without a head": "pp_chart2table",
    "its vision tower is of the library timm, with which a3 has not tried it": (
        "fast_vlm gemma3n perception_lm"
    ),
}

REFUSED_WRAPPERS: dict[str, str] = {
    model_type: reason for reason, types in _REFUSED.items() for model_type in types.split()
}


def wrapper_of(config: PreTrainedConfig) -> str | None:
    """model_type of the wrapper that a config, dense or compressed, is of; None if of none."""
    return wrapper_in({"model_type": config.model_type, "a3": getattr(config, "a3", None)})


def wrapper_in(content: dict[str, Any]) -> str | None:
    """The same of the content of a config.json."""
    compressed = content.get("a3")
    if isinstance(compressed, dict):
        wrapper = compressed.get("wrapper")
        if wrapper is not None and wrapper not in WRAPPERS:
            raise A3Error(
                f"config.json: a3.wrapper is {wrapper!r}, which is no model of several modalities "
                "that a3 knows. Compress the dense model again."
            )
        return wrapper
    return content["model_type"] if content.get("model_type") in WRAPPERS else None


def text_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the layers that a3 compresses: the language model's in a wrapper."""
    return config if wrapper_of(config) is None else config.get_text_config()


def auto_class(wrapper: str | None) -> Any:
    """transformers' auto class of models that a3 reads: with a head that predicts tokens."""
    return AutoModelForCausalLM if wrapper is None else AutoModelForImageTextToText


def held_by(wrapper: str) -> str:
    """Why a model has no export to other runtimes, for a message."""
    return f"a {wrapper}, of several modalities, and a3 exports language models alone"


def of_language(model: PreTrainedModel, backbone: str) -> set[int]:
    """Identities of the parameters of the language model, at `backbone`, and of its head."""
    parts = (model.base_model.get_submodule(backbone), model.get_output_embeddings())
    return {id(value) for part in parts for value in part.parameters()}


def carried(model: PreTrainedModel) -> dict[str, int]:
    """`carried`, the parameters that are neither the language model's nor the head's; of a dense
    language model that no other model holds, nothing."""
    wrapper = wrapper_of(model.config)
    if wrapper is None:
        return {}
    language = of_language(model, WRAPPERS[wrapper])
    others = (value.numel() for value in model.parameters() if id(value) not in language)
    return {"carried": sum(others)}
