"""The compressed model that Hugging Face loads: its tensors really are smaller.

A compressed folder has model_type "a3" and, under `a3` in its config, the family it was made of and
the ranks of every layer. Its classes derive from the family's own: attention is replaced by
`A3Attention`, the MLP's projections are resized, everything else is transformers' code. Heads of QK
and OV have their own sizes, so the KV cache holds r_qk + r_ov numbers a key/value head.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama.modeling_llama import eager_attention_forward

from a3 import LazyConfig
from a3.models.families import FAMILIES


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in halves on kept pairs: x (..., L, r), cos and sin (..., L, r / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def widen(x: Tensor, width: int) -> Tensor:
    """Fill the last dimension with zeros up to `width`; they change no score and no output."""
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


class A3Attention(nn.Module):
    """Attention with separate QK and OV head sizes and, per group, the kept RoPE pairs.

    Pair indices are kept as integers and the family's own float32 cos/sin are gathered: inverse
    frequencies in bfloat16 would be off by radians at position 2048.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        a3 = config.a3
        self.config = config
        self.layer_idx = layer_idx
        self.groups = a3["kv_heads"]
        self.num_key_value_groups = a3["heads"] // a3["kv_heads"]
        self.qk_rank = a3["qk_ranks"][layer_idx]
        self.ov_rank = a3["ov_ranks"][layer_idx]
        self.scaling = a3["scaling"]
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        d, bias = config.hidden_size, a3["qkv_bias"]
        self.q_proj = nn.Linear(d, a3["heads"] * self.qk_rank, bias=bias)
        self.k_proj = nn.Linear(d, a3["kv_heads"] * self.qk_rank, bias=bias)
        self.v_proj = nn.Linear(d, a3["kv_heads"] * self.ov_rank, bias=bias)
        self.o_proj = nn.Linear(a3["heads"] * self.ov_rank, d, bias=a3["o_bias"])
        pairs = torch.arange(self.qk_rank // 2).expand(self.groups, -1).contiguous()
        self.register_buffer("rope_pairs", pairs)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, L, d); position_embeddings: the family's own cos and sin (B, L, h)."""
        batch, length, _ = hidden_states.shape
        split = (batch, length, self.groups, -1)
        # (B, L, G, r / 2) to (B, G, L, r / 2)
        cos, sin = (table[..., self.rope_pairs].transpose(1, 2) for table in position_embeddings)

        q = self.q_proj(hidden_states).view(*split, self.qk_rank).permute(0, 2, 3, 1, 4)
        q = rotate(q, cos[:, :, None], sin[:, :, None]).flatten(1, 2)
        k = rotate(self.k_proj(hidden_states).view(split).transpose(1, 2), cos, sin)
        v = self.v_proj(hidden_states).view(split).transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        if length > 1:
            # The fused kernels want one head size; without it a prompt takes half as long again.
            q, k, v = (widen(x, max(self.qk_rank, self.ov_rank)) for x in (q, k, v))
        out, probabilities = attend(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        out = out[..., : self.ov_rank].reshape(batch, length, -1)
        return self.o_proj(out), probabilities


class Compressed:
    """Mixed into a family's ForCausalLM: gives every layer its own sizes."""

    # Flash attention's kernels want one head size for q, k and v.
    _supports_flash_attn = False

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        family = FAMILIES[config.a3["family"]]
        for index, rank in enumerate(config.a3["mlp_ranks"]):
            self.set_submodule(family.attention_module(index), A3Attention(config, index))
            for part in ("up", "gate", "down"):
                name = f"{self.base_model_prefix}.{family.module(index, part)}"
                linear = self.get_submodule(name)
                sizes = (
                    (linear.in_features, rank) if part != "down" else (rank, linear.out_features)
                )
                self.set_submodule(name, nn.Linear(*sizes, bias=linear.bias is not None))
        self.post_init()


@cache
def classes(family: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Configuration and ForCausalLM of a family's compressed models, registered with transformers.

    The configuration's `a3` holds: family, heads, kv_heads; `scaling`, the dense model's softmax
    scale; qkv_bias, o_bias; `qk_ranks`, `ov_ranks`, `mlp_ranks`, one number a layer. head_dim stays
    the dense one, because RoPE's frequencies derive from it.
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
    AutoModelForCausalLM.register(config, model)
    return config, model
