"""Measures a model that was probed: sizes and biases of its modules."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from a3.core.errors import A3Error
from a3.models.built import SCALES

# Names that attention modules and configs have for the size of a head.
HEAD_DIMS = ("head_dim", "head_size", "attention_head_size", "d_head", "size_per_head", "dim_head")

# Names that configs have for the number of experts per token.
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


@dataclass
class Attention:
    """A layer's attention: the module, its projections and norms by name in the layer."""

    module: str
    projections: dict[str, str]
    norms: dict[str, str] = field(default_factory=dict)


def attention_sizes(
    layer: nn.Module, found: Attention, config: PreTrainedConfig
) -> dict[str, Any] | None:
    """heads, kv_heads, head_dim and biases of an attention; None if its shapes are no such."""
    attention = layer.get_submodule(found.module)
    if set(found.projections) != set("qkvo"):
        return None
    h, d = head_dim_of(attention, config), config.hidden_size
    modules = {p: layer.get_submodule(name) for p, name in found.projections.items()}
    wide = {p: columns_first(module) for p, module in modules.items()}
    rows = wide["o"][0]
    if wide["o"][1] != d or any(wide[p][0] != d for p in "qkv") or rows % h:
        return None
    heads = rows // h
    fused = found.projections["q"] == found.projections["k"]
    kv = ((wide["q"][1] - rows) // 2 if fused else wide["k"][1]) // h
    whole = heads + 2 * kv if fused else heads
    if kv == 0 or heads % kv or wide["q"][1] != whole * h:
        return None
    if not fused and (wide["k"][1], wide["v"][1]) != (kv * h, kv * h):
        return None
    biased = {p: module.bias is not None for p, module in modules.items()}
    if len({biased[p] for p in "qkv"}) != 1:
        return None
    return {
        "heads": heads,
        "kv_heads": kv,
        "head_dim": h,
        "qkv_bias": biased["q"],
        "o_bias": biased["o"],
        "scaling": scale_of(attention, h),
        "transposed": isinstance(modules["q"], Conv1D),
    }


def scale_of(attention: nn.Module, head_dim: int) -> float:
    """The softmax scale by the attribute that a module has for it, else the usual one."""
    found = (getattr(attention, name, None) for name in SCALES)
    return next((float(scale) for scale in found if isinstance(scale, float)), head_dim**-0.5)


def head_dim_of(attention: nn.Module, config: PreTrainedConfig) -> int:
    """The size of a head by the attribute of a module or a config, else that of the usual rule."""
    # A config whose layers differ raises an error of its own.
    for of in (attention,) if has_own_layers(config) else (attention, config):
        for name in HEAD_DIMS:
            if isinstance(size := getattr(of, name, None), int):
                return size
    return config.hidden_size // config.num_attention_heads


def has_own_layers(config: PreTrainedConfig) -> bool:
    """Whether the layers of a config have configs of their own."""
    return getattr(config, "per_layer_config", None) is not None


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a linear layer, of torch or GPT-2's."""
    return isinstance(module, nn.Linear | Conv1D)


def columns_first(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    shape = tuple(module.weight.shape)
    return shape if isinstance(module, Conv1D) else shape[::-1]


def measured(
    layers: nn.ModuleList, structure: dict[str, Any], config: PreTrainedConfig
) -> dict[str, Any]:
    """The fields of `Arch` that are sizes and biases, of the layers that a structure compresses.

    Raises A3Error if attention's matrices have other shapes than those of heads.
    """
    fixed = structure["fixed"]
    heads = getattr(config, "num_attention_heads", 1)
    found: dict[str, Any] = {
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": max(1, config.hidden_size // heads),
        "scaling": 1.0,
        "qkv_bias": False,
        "o_bias": False,
    }
    attended = [n for n in range(len(layers)) if not (n in fixed["qk"] and n in fixed["ov"])]
    if attended:
        attention = Attention(structure["attention_name"], attention_of(structure))
        sizes = attention_sizes(layers[attended[0]], attention, config)
        if sizes is None:
            raise A3Error(
                f"config.json: shapes of {structure['attention_name']} in layer {attended[0]} are "
                "not those of heads. This model is not supported."
            )
        found |= {key: sizes[key] for key in found}
    return found | {"layers": len(layers)} | measured_mlp(layers, structure, config)


def experts_per_token(config: PreTrainedConfig) -> int:
    """How many experts each token uses; of layers that differ, the most.

    Raises A3Error if the config does not say it.
    """
    key = next((key for key in ACTIVE if getattr(config, key, None) is not None), None)
    said = getattr(config, key) if key else None
    counts = said if isinstance(said, list | tuple) else [said]
    if not counts or not all(isinstance(count, int) for count in counts):
        found = f"{key} is {said!r}" if key else f"none of {', '.join(ACTIVE)}"
        raise A3Error(
            f"config.json: {found}; expected the number of experts per token, or a list of it by "
            "layer. This model is not supported."
        )
    return max(counts)


def attention_of(structure: dict[str, Any]) -> dict[str, str]:
    """The projections of attention."""
    return {p: name for p, name in structure["projections"].items() if p in "qkvo"}


def measured_mlp(
    layers: nn.ModuleList, structure: dict[str, Any], config: PreTrainedConfig
) -> dict[str, Any]:
    """The same of MLPs or experts."""
    none = {"intermediate_size": 1, "experts": 0, "experts_per_token": 0, "mlp_bias": False}
    left = [n for n in range(len(layers)) if n not in structure["fixed"]["mlp"]]
    if structure["experts"]:
        name = structure["experts_module"]
        # Experts that stay are counted, too.
        experts = next(m for layer in layers if (m := dict(layer.named_modules()).get(name)))
        count, *shape = experts.down_proj.shape
        return {
            "intermediate_size": shape[0 if structure["turned"] else 1],
            "experts": count,
            "experts_per_token": experts_per_token(config),
            "mlp_bias": any(hasattr(experts, f"{n}_bias") for n in ("gate_up_proj", "up_proj")),
        }
    if not left:
        return none
    down = layers[left[0]].get_submodule(structure["projections"]["down"])
    return none | {
        "intermediate_size": columns_first(down)[0],
        "mlp_bias": down.bias is not None,
    }
