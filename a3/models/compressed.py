"""The compressed model that Hugging Face loads: its tensors really are smaller.

A compressed folder has model_type "a3" and, under `a3` in its config, the family it was made of and
the ranks of every layer. Its classes derive from the family's own: attention is replaced by
`A3Attention`, the MLP's projections are resized, everything else is transformers' code. Heads of QK
and OV have their own sizes, so the KV cache holds r_qk + r_ov numbers a key/value head.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from a3 import LazyConfig
from a3.models.attention import ATTENTION, A3Attention, LowRank
from a3.models.families import FAMILIES
from a3.models.family import Family
from a3.models.quantised import emulate


class Expert(nn.Module):
    """A gated MLP of `rank` channels, without its activation function."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, rank, bias=False)
        self.up_proj = nn.Linear(hidden_size, rank, bias=False)
        self.down_proj = nn.Linear(rank, hidden_size, bias=False)


class Experts(nn.ModuleList):
    """A mixture's experts, each of its own size: those that few tokens reached are dense."""

    def __init__(self, dense: nn.Module, ranks: list[int]) -> None:
        super().__init__(Expert(dense.hidden_dim, rank) for rank in ranks)
        self.act_fn = dense.act_fn

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """hidden_states (T, d); index and weights (T, top k): where each token goes."""
        out = torch.zeros_like(hidden_states)
        for number in index.unique().tolist():
            token, place = torch.where(index == number)
            expert, x = self[number], hidden_states[token]
            x = expert.down_proj(self.act_fn(expert.gate_proj(x)) * expert.up_proj(x))
            out.index_add_(0, token, (x * weights[token, place, None]).to(out.dtype))
        return out


class Compressed:
    """Mixed into a family's ForCausalLM: gives every layer its own sizes."""

    # Flash attention's kernels want one head size for q, k and v.
    _supports_flash_attn = False

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        family = FAMILIES[config.a3["family"]]
        for index, rank in enumerate(config.a3["mlp_ranks"]):
            if family.experts:
                experts = family.experts_module(index)
                self.set_submodule(experts, Experts(self.get_submodule(experts), rank))
            name = family.attention_module(index)
            dense = self.get_submodule(name)
            attention = ATTENTION.get(config.a3["family"], A3Attention)
            self.set_submodule(name, attention(config, index, dense))
            for part in ("up", "gate", "down"):
                if part in family.parts:
                    self.resize(family, index, part, rank)
            # A product of two stands under the name of the first of the parts that are fused.
            for part in config.a3["factors"][index].keys() & family.parts.keys() - set("qkvo"):
                self.factor(family, index, part, config.a3["factors"][index][part])
        if "quantised" in config.a3:
            emulate(self, config.a3["quantised"])
        self.post_init()

    def resize(self, family: Family, layer: int, part: str, rank: int) -> None:
        """Replace one projection of the MLP by one of `rank` channels."""
        name = family.name(layer, part).removesuffix(".weight")
        linear = self.get_submodule(name)
        inputs, outputs = family.sizes(part, rank, self.config.hidden_size)
        if isinstance(linear, Conv1D):
            resized: nn.Module = Conv1D(outputs, inputs)
        else:
            added = part == "down" and self.config.a3["down_bias"]
            resized = nn.Linear(inputs, outputs, bias=added or linear.bias is not None)
        self.set_submodule(name, resized)

    def factor(self, family: Family, layer: int, part: str, rank: int) -> None:
        """Replace one projection of the MLP by a product of two."""
        name = family.name(layer, part).removesuffix(".weight")
        dense = self.get_submodule(name)
        inputs, outputs = family.sizes(
            part, self.config.a3["mlp_ranks"][layer], self.config.hidden_size
        )
        self.set_submodule(name, LowRank(inputs, outputs, rank, dense.bias is not None))


@cache
def classes(family: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Configuration and ForCausalLM of a family's compressed models, registered with transformers.

    The configuration's `a3` holds: family, heads, kv_heads; `scaling`, the dense model's softmax
    scale; qkv_bias, o_bias, `down_bias` that the family may not have; qk_norm; rope, nope_layers;
    `rope_pairs`, `qk_ranks`, `ov_ranks` and `mlp_ranks`, one number a layer (of experts, one list a
    layer); `factors`, a dictionary a layer, the rank of each matrix that is a product of two;
    `quantised`, where the model is (a3.models.quantised).
    head_dim stays the dense one, because RoPE's frequencies derive from it.
    """
    dense_config = CONFIG_MAPPING[family]
    dense_model = MODEL_FOR_CAUSAL_LM_MAPPING[dense_config]
    config = type(
        f"A3{dense_config.__name__}",
        (dense_config,),
        {
            "__annotations__": {"a3": dict[str, Any] | None},
            "__module__": __name__,
            "a3": None,
            "model_type": LazyConfig.model_type,
            "base_model_tp_plan": None,
        },
    )
    model = type(
        f"A3{dense_model.__name__}",
        (Compressed, dense_model),
        {"__module__": __name__, "config_class": config},
    )
    # What a family's files call otherwise than its modules, ours call alike.
    renaming = get_checkpoint_conversion_mapping(dense_model.__name__)
    if renaming is not None:
        register_checkpoint_conversion_mapping(model.__name__, renaming)
    AutoModelForCausalLM.register(config, model)
    return config, model
