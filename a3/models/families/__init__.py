"""The supported families, as data plus small adapters, and the unsupported ones.

A new family is one subclass in llama.py or gpt.py and one row in FAMILIES; it inherits the whole
adapter test suite.
"""

from functools import cache
from typing import Any

from a3.models.families.gpt import (
    GPT2,
    GPTJ,
    OPT,
    Bloom,
    Falcon,
    GPTBigCode,
    GPTNeo,
    GPTNeoX,
    Mpt,
    Phi,
)
from a3.models.families.llama import (
    Cohere,
    Cohere2,
    Gemma2,
    Gemma3,
    Glm,
    Mistral,
    Mixtral,
    Olmo,
    Olmo2,
    Phi3,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    SmolLM3,
    StableLm,
)
from a3.models.families.probed import probed
from a3.models.families.refused import REFUSED
from a3.models.family import Family
from a3.models.wrappers import WRAPPERS

__all__ = ["BACKBONES", "FAMILIES", "REFUSED", "family_of"]

FAMILIES: dict[str, Family] = {
    "bloom": Bloom(),
    "cohere": Cohere(),
    "cohere2": Cohere2(),
    "falcon": Falcon(),
    "gemma2": Gemma2(),
    "gemma3_text": Gemma3(),
    "glm": Glm(),
    "glm4": Glm(),
    "gpt2": GPT2(),
    "gpt_bigcode": GPTBigCode(),
    "gpt_neo": GPTNeo(),
    "gpt_neox": GPTNeoX(),
    "gptj": GPTJ(),
    "llama": Family(),
    "ministral": Mistral(),
    "mistral": Mistral(),
    "mixtral": Mixtral(),
    "mpt": Mpt(),
    "olmo": Olmo(),
    "olmo2": Olmo2(),
    "opt": OPT(),
    "phi": Phi(),
    "phi3": Phi3(),
    "qwen2": Qwen2(),
    "qwen3": Qwen3(),
    "qwen3_moe": Qwen3Moe(),
    "smollm3": SmolLM3(),
    "stablelm": StableLm(),
}


# Language models that exist in models of several modalities only.
BACKBONES: dict[str, Family] = {
    "qwen2_5_vl_text": Qwen2(),
    "qwen2_vl_text": Qwen2(),
    "qwen3_vl_text": Qwen3(),
}


def family_of(
    model_type: str, structure: dict[str, Any] | None, wrapper: str | None = None
) -> Family:
    """The adapter of a family, or of what a probe found of it (`Arch.structure`).

    `wrapper` is the type of the model of several modalities that holds it, if one does.
    """
    found = (FAMILIES | BACKBONES)[model_type] if structure is None else probed(structure)
    return found if wrapper is None else held(found, WRAPPERS[wrapper])


@cache
def held(family: Family, backbone: str) -> Family:
    """The adapter of a family whose models are at `backbone` in another model."""
    own = {"layer_path": f"{backbone}.{family.layer_path}", "backbone": backbone}
    return type(type(family).__name__, (type(family),), own | {"__doc__": type(family).__doc__})()
