"""The compressed model that Hugging Face loads: its tensors really are smaller.

`import a3` makes `AutoModelForCausalLM.from_pretrained(folder)` know it. Per layer the heads of QK
and OV have their own sizes, so the KV cache holds r_qk + r_ov numbers a key/value head.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    eager_attention_forward,
)


class A3LlamaConfig(LlamaConfig):
    """A Llama whose layers have their own ranks.

    `a3` holds: `scaling`, the dense model's softmax scale; `qk_ranks`, `ov_ranks`, `mlp_ranks`,
    one number a layer. head_dim stays the dense one, because RoPE's frequencies derive from it.
    """

    model_type = "a3-llama"
    base_model_tp_plan = None
    a3: dict[str, Any] | None = None


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

    def __init__(self, config: A3LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.heads // self.groups
        self.qk_rank = config.a3["qk_ranks"][layer_idx]
        self.ov_rank = config.a3["ov_ranks"][layer_idx]
        self.scaling = config.a3["scaling"]
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        d, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(d, self.heads * self.qk_rank, bias=bias)
        self.k_proj = nn.Linear(d, self.groups * self.qk_rank, bias=bias)
        self.v_proj = nn.Linear(d, self.groups * self.ov_rank, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.ov_rank, d, bias=bias)
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


class A3LlamaForCausalLM(LlamaForCausalLM):
    """Llama with `A3Attention` and one MLP size per layer; otherwise transformers' own code."""

    config_class = A3LlamaConfig
    # Its kernels want one head size for q, k and v.
    _supports_flash_attn = False

    def __init__(self, config: A3LlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = A3Attention(config, index)
            sized = copy.copy(config)
            sized.intermediate_size = config.a3["mlp_ranks"][index]
            layer.mlp = LlamaMLP(sized)
        self.post_init()


AutoConfig.register(A3LlamaConfig.model_type, A3LlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(A3LlamaConfig, A3LlamaForCausalLM)
