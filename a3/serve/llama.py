"""Compressed models of Llama-like families in vLLM, which imports this file when it loads one.

vLLM's Llama has all of it but sizes that differ between layers and between QK and OV, and RoPE
pairs by group. Linear layers have the compressed sizes. vLLM's attention has one head size for
queries, keys and values, and only some: what is smaller is padded with zeros, which changes no
score and no output, but takes room in the KV cache.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.selector import get_attn_backend

from a3.core.errors import A3Error
from a3.models.attention_a3 import rotate, widen
from a3.models.served import obstacles

# Head sizes of vLLM's fastest kernels are multiples of this; no kernel takes a larger head.
MULTIPLE, LARGEST = 8, 512


class A3ForCausalLM(LlamaForCausalLM):
    """vLLM's Llama with the layers of a compressed folder, whose config is `hf_config`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if found := obstacles(config.a3, config.rope_parameters["rope_type"]):
            raise A3Error(
                f"{vllm_config.model_config.model}: a3's plugin for vLLM cannot run it: "
                f"{'; '.join(found)}. transformers can, after import a3."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=A3Layer)


class A3Layer(LlamaDecoderLayer):
    """A layer of vLLM's Llama with sizes of its own."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = copy(vllm_config.model_config.hf_config)
        config.intermediate_size = config.a3["mlp_ranks"][extract_layer_index(prefix)]
        super().__init__(vllm_config, prefix, config, attn_layer_type=A3Attention)


class A3Attention(nn.Module):
    """Attention with head sizes of its own for QK and OV, and the RoPE pairs that groups keep.

    The arguments are those by which vLLM's layer makes its own attention.
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: QuantizationConfig | None,
        cache_config: CacheConfig | None,
        prefix: str,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        a3, layer = config.a3, extract_layer_index(prefix)
        self.qk_rank, self.ov_rank = a3["qk_ranks"][layer], a3["ov_ranks"][layer]
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            self.qk_rank,
            num_heads,
            num_kv_heads,
            bias=a3["qkv_bias"],
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
            v_head_size=self.ov_rank,
        )
        self.o_proj = RowParallelLinear(
            num_heads * self.ov_rank,
            hidden_size,
            bias=a3["o_bias"],
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        # Those of this process, where several share the heads.
        self.heads, self.groups = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.rope_pairs = nn.Parameter(
            torch.empty(self.groups, a3["rope_pairs"][layer], dtype=torch.long),
            requires_grad=False,
        )
        self.rope_pairs.weight_loader = self.load_pairs
        head_dim = config.head_dim or hidden_size // num_heads
        # The dense model's tables, the same object in all layers.
        self.rotary_emb = get_rope(
            head_dim, max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.size = attention_size(max(self.qk_rank, self.ov_rank), cache_config)
        types = getattr(config, "layer_types", None)
        sliding = types is not None and types[layer] == "sliding_attention"
        self.attn = Attention(
            self.heads,
            self.size,
            a3["scaling"],
            num_kv_heads=self.groups,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.sliding_window if sliding else None,
            prefix=f"{prefix}.attn",
        )

    def load_pairs(self, parameter: nn.Parameter, stored: Tensor) -> None:
        """Take this process's groups of the pairs (G, p) of all."""
        rank = get_tensor_model_parallel_rank() // self.qkv_proj.num_kv_head_replicas
        first = rank * self.groups
        parameter.data.copy_(stored[first : first + self.groups])

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """positions (T,), hidden_states (T, d) to (T, d)."""
        qkv, _ = self.qkv_proj(hidden_states)
        keys, values = self.groups * self.qk_rank, self.groups * self.ov_rank
        q, k, v = qkv.split([self.heads * self.qk_rank, keys, values], -1)
        tables = self.rotary_emb.cos_sin_cache[positions].to(qkv.dtype)
        # (T, G, p), of which each group has its own.
        cos, sin = (table[:, self.rope_pairs] for table in tables.chunk(2, -1))
        q = q.unflatten(-1, (self.groups, -1, self.qk_rank))
        q = rotate(q, cos[:, :, None], sin[:, :, None]).flatten(1, 2)
        k = rotate(k.unflatten(-1, (self.groups, self.qk_rank)), cos, sin)
        v = v.unflatten(-1, (self.groups, self.ov_rank))
        q, k, v = (widen(x, self.size).flatten(1) for x in (q, k, v))
        out = self.attn(q, k, v).unflatten(-1, (self.heads, self.size))
        out, _ = self.o_proj(out[..., : self.ov_rank].flatten(1))
        return out


def attention_size(wanted: int, cache_config: CacheConfig | None) -> int:
    """The least head size, `wanted` or more, for which vLLM has attention here."""
    kind = cache_config.cache_dtype if cache_config is not None else None
    for size in range(-(-wanted // MULTIPLE) * MULTIPLE, LARGEST + 1, MULTIPLE):
        if get_attn_backend(size, torch.get_default_dtype(), kind).supports_head_size(size):
            return size
    raise A3Error(f"vLLM has no attention here for heads of {wanted} to {LARGEST}.")
