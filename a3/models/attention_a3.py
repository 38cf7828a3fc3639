"""Attention of compressed models, with different head sizes for QK and OV.

A module of this file replaces the family's attention module. A family has its own class here if its
layers call attention or apply RoPE in a different way. This file needs only torch and transformers,
because a copy of it is in every compressed folder, beside modeling_a3.py.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

# cos and sin of RoPE.
Tables: TypeAlias = tuple[Tensor, Tensor]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the p kept pairs, which come first, in halves: x (..., L, r), cos, sin (..., L, p)."""
    pairs = cos.shape[-1]
    # Not by split, which is a sequence of tensors in an ONNX graph.
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    # OLMo's tables stay float32 in a model of bfloat16.
    return rotated.to(x.dtype)


def gather(table: Tensor, pairs: Tensor) -> Tensor:
    """Select the kept pairs (G, p) of each group from a full table (B, L, h): (B, G, L, p)."""
    kept = table.index_select(-1, pairs.flatten())
    return kept.unflatten(-1, pairs.shape).transpose(1, 2)


def widen(x: Tensor, width: int) -> Tensor:
    """Pad the last dimension with zeros up to `width`; this changes no score and no output."""
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


class HeadNorm(nn.Module):
    """RMS norm of q or k with each head's own gains, over each head or over all heads together."""

    def __init__(self, heads: int, rank: int, over_heads: bool, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, rank))
        self.dims = (-2, -1) if over_heads else (-1,)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., heads, r); computed in at least float32, as in the families' code."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(self.dims, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


class A3Attention(nn.Module):
    """Attention with separate QK and OV head sizes and, per group, the kept RoPE pairs.

    Pair indices are kept as integers and the family's own float32 cos/sin are gathered: inverse
    frequencies in bfloat16 would be off by radians at position 2048. `dense` is the family's module
    that this one replaces; sliding windows and score caps are copied from it. `config` is that of
    the layers, `a3` the entry of the model's config. Subclasses have the `forward` that the
    family's layers call.
    """

    def __init__(
        self, config: PreTrainedConfig, a3: dict[str, Any], layer_idx: int, dense: nn.Module
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.groups = a3["kv_heads"]
        self.num_key_value_groups = a3["heads"] // a3["kv_heads"]
        self.qk_rank = a3["qk_ranks"][layer_idx]
        self.ov_rank = a3["ov_ranks"][layer_idx]
        self.scaling = a3["scaling"]
        self.attention_dropout = dropout_of(dense)
        self.is_causal = True
        # Arguments, besides the scale, that the family passes to attention functions.
        self.options = {}
        if hasattr(dense, "sliding_window"):
            self.options["sliding_window"] = dense.sliding_window
        # The family's own eager attention caps scores where the family does.
        family = import_module(type(dense).__module__)
        self.eager = getattr(family, "eager_attention_forward", eager_attention_forward)
        d, bias = config.hidden_size, a3["qkv_bias"]
        queries, keys = a3["heads"] * self.qk_rank, a3["kv_heads"] * self.qk_rank
        values, outputs = a3["kv_heads"] * self.ov_rank, a3["heads"] * self.ov_rank
        self.q_proj = nn.Linear(d, queries, bias)
        self.k_proj = nn.Linear(d, keys, bias)
        self.v_proj = nn.Linear(d, values, bias)
        self.o_proj = nn.Linear(outputs, d, a3["o_bias"])
        self.q_norm: HeadNorm | None = None
        self.k_norm: HeadNorm | None = None
        if a3["qk_norm"]:
            over_heads, eps = a3["qk_norm"] == "layer", a3["norm_eps"]
            self.q_norm = HeadNorm(a3["heads"], self.qk_rank, over_heads, eps)
            self.k_norm = HeadNorm(self.groups, self.qk_rank, over_heads, eps)
        self.resid_dropout = getattr(dense, "resid_dropout", nn.Identity())
        pairs = None
        if a3["rope"] and layer_idx not in a3["nope_layers"]:
            pairs = torch.arange(a3["rope_pairs"][layer_idx]).expand(self.groups, -1).contiguous()
        self.register_buffer("rope_pairs", pairs)
        # Whether cos and sin already contain only the kept pairs, gathered once for all layers.
        self.gathered = False

    def attend(
        self,
        hidden_states: Tensor,
        position_embeddings: Tables | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, L, d); position_embeddings: the family's own cos and sin (B, L, h).

        Some families call the cache `layer_past`. The mask may carry ALiBi's bias.
        """
        batch, length, _ = hidden_states.shape
        past_key_values = past_key_values if layer_past is None else layer_past
        q, k = self.queries_and_keys(hidden_states, position_embeddings)
        v = self.v_proj(hidden_states).view(batch, length, self.groups, -1).transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)

        scored: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager
        )
        dropout = self.attention_dropout if self.training else 0.0
        if length > 1 and not torch.compiler.is_exporting():
            # Fused kernels need one head size; without padding, a prompt takes 1.5 times as long.
            # An exported graph has none, and would pad the cache for every new token.
            q, k, v = (widen(x, max(self.qk_rank, self.ov_rank)) for x in (q, k, v))
        options = {"dropout": dropout, "scaling": self.scaling, **self.options, **kwargs}
        out, probabilities = scored(self, q, k, v, attention_mask, **options)
        out = out[..., : self.ov_rank].reshape(batch, length, -1)
        return self.resid_dropout(self.o_proj(out)), probabilities

    def queries_and_keys(
        self, x: Tensor, position_embeddings: Tables | None
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, d) to q (B, H, L, r) and k (B, G, L, r), normed and rotated as in the family."""
        heads = (*x.shape[:2], -1, self.qk_rank)
        q, k = self.q_proj(x).view(heads), self.k_proj(x).view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.unflatten(2, (self.groups, -1)).permute(0, 2, 3, 1, 4), k.transpose(1, 2)
        if self.rope_pairs is not None:
            assert position_embeddings is not None, "a layer with RoPE has cos and sin"
            cos, sin = position_embeddings if self.gathered else self.tables(position_embeddings)
            q, k = rotate(q, cos[:, :, None], sin[:, :, None]), rotate(k, cos, sin)
        return q.flatten(1, 2), k

    def tables(self, position_embeddings: Tables) -> Tables:
        """cos and sin of the kept pairs, (B, G, L, p), from the family's tables (B, L, h)."""
        cos, sin = position_embeddings
        return gather(cos, self.rope_pairs), gather(sin, self.rope_pairs)

    def after_rotary(self, rotary: nn.Module, inputs: tuple, position_embeddings: Tables) -> Tables:
        """Calls `tables` as a hook of the family's rotary module."""
        return self.tables(position_embeddings)


class UsualAttention(A3Attention):
    """For most families, whose layers call attention with the arguments of `attend`."""

    forward = A3Attention.attend


class BloomAttention(A3Attention):
    """BLOOM passes ALiBi separately from the mask and expects the residual to be added."""

    def __init__(
        self, config: PreTrainedConfig, a3: dict[str, Any], layer_idx: int, dense: nn.Module
    ) -> None:
        super().__init__(config, a3, layer_idx, dense)
        self.resid_dropout = nn.Dropout(dense.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states, residual (B, L, d); alibi (B · H, 1, K); attention_mask (B, 1, L, K)."""
        bias = alibi.unflatten(0, (hidden_states.shape[0], -1))
        mask = bias if attention_mask is None else bias + attention_mask
        out, probabilities = self.attend(hidden_states, attention_mask=mask, layer_past=layer_past)
        return out + residual, probabilities


class MptAttention(A3Attention):
    """MPT passes ALiBi's bias for the longest context, and a mask that is true for hidden keys."""

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        attention_mask: Tensor,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, L, d); position_bias (H, 1, K'); attention_mask (B, 1, L, K)."""
        bias = position_bias[:, :, -attention_mask.shape[-1] :].to(hidden_states.dtype)
        mask = bias.masked_fill(attention_mask, torch.finfo(bias.dtype).min)
        return self.attend(hidden_states, attention_mask=mask, past_key_values=past_key_values)


def scores_in_float32(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Eager attention of families that compute it in float32 for every dtype of the model."""
    out, probabilities = eager_attention_forward(
        module, q.float(), k.float(), v.float(), mask, **options
    )
    return out.to(v.dtype), probabilities


class GPTNeoAttention(A3Attention):
    """GPT-Neo's local layers hide all but the last `window_size` keys; the mask is causal only."""

    def __init__(
        self, config: PreTrainedConfig, a3: dict[str, Any], layer_idx: int, dense: nn.Module
    ) -> None:
        super().__init__(config, a3, layer_idx, dense)
        self.eager = scores_in_float32
        self.local = dense.attention_type == "local"

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, L, d); attention_mask (B, 1, L, K)."""
        if self.local:
            length, seen = attention_mask.shape[-2:]
            keys = torch.arange(seen, device=attention_mask.device)
            oldest = keys[seen - length :, None] - self.config.window_size
            lowest = torch.finfo(attention_mask.dtype).min
            attention_mask = attention_mask.masked_fill(keys <= oldest, lowest)
        return self.attend(hidden_states, attention_mask=attention_mask, **kwargs)


class GPTJAttention(A3Attention):
    """GPT-J passes positions; each of its layers has its own table of sines and cosines."""

    def __init__(
        self, config: PreTrainedConfig, a3: dict[str, Any], layer_idx: int, dense: nn.Module
    ) -> None:
        super().__init__(config, a3, layer_idx, dense)
        self.eager = scores_in_float32

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, L, d); position_ids (B or 1, L)."""
        dims = torch.arange(0, self.config.rotary_dim, 2, device=hidden_states.device)
        frequencies = 1 / 10000 ** (dims / self.config.rotary_dim)
        angles = position_ids[..., None].float() * frequencies
        tables = (angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype))
        return self.attend(hidden_states, tables, **kwargs)


class CohereAttention(UsualAttention):
    """Cohere's tables have every angle twice, side by side."""

    def tables(self, position_embeddings: Tables) -> Tables:
        """As in A3Attention."""
        cos, sin = position_embeddings
        return super().tables((cos[..., ::2], sin[..., ::2]))


class Gemma2Attention(UsualAttention):
    """Gemma 2 caps its scores. Gemma 3 has the key, too, and ignores it."""

    def __init__(
        self, config: PreTrainedConfig, a3: dict[str, Any], layer_idx: int, dense: nn.Module
    ) -> None:
        super().__init__(config, a3, layer_idx, dense)
        self.options["softcap"] = dense.attn_logit_softcapping


# Families whose layers call attention or apply RoPE in a different way.
ATTENTION = {
    "bloom": BloomAttention,
    "cohere": CohereAttention,
    "cohere2": CohereAttention,
    "gemma2": Gemma2Attention,
    "gpt_neo": GPTNeoAttention,
    "gptj": GPTJAttention,
    "mpt": MptAttention,
}


def dropout_of(attention: nn.Module) -> float:
    """Dropout of the attention probabilities, under any of the names that families use."""
    names = ("attention_dropout", "attn_dropout", "attn_dropout_p", "dropout")
    found = next((getattr(attention, name) for name in names if hasattr(attention, name)), 0.0)
    return found.p if isinstance(found, nn.Dropout) else found
