"""Llama and its relatives: RoPE, and a gated MLP or experts."""

from typing import ClassVar

from torch import nn
from transformers import PreTrainedConfig

from a3.core.errors import A3Error
from a3.models.family import ATTENTION, Family


class Mistral(Family):
    """Llama without biases; also Ministral, whose layers differ in their sliding windows."""

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """No projection has a bias."""
        return {"qkv_bias": False, "o_bias": False, "mlp_bias": False}


class Qwen2(Family):
    """Biases in q, k and v only."""

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """Only q, k and v have a bias."""
        return {"qkv_bias": True, "o_bias": False, "mlp_bias": False}


class AttentionBiased(Family):
    """`attention_bias` for q, k, v and o; the MLP has none."""

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """As the config says."""
        bias = config.attention_bias
        return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": False}


class Qwen3(AttentionBiased):
    """RMS norm of each head of q and k before RoPE."""

    qk_norm = "head"


class Qwen3Moe(Qwen3):
    """Qwen 3 with experts in every layer."""

    projections: ClassVar[dict[str, str]] = ATTENTION
    experts: ClassVar[dict[str, str]] = {
        "gate": "mlp.experts.{}.gate_proj",
        "up": "mlp.experts.{}.up_proj",
        "down": "mlp.experts.{}.down_proj",
    }

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a mixture in some layers only."""
        super().check(config)
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            raise A3Error(
                f"config.json: mlp_only_layers is {config.mlp_only_layers}, decoder_sparse_step "
                f"{config.decoder_sparse_step}; a3 supports this family with experts in every "
                "layer only. This model is not supported."
            )

    def intermediate_size(self, config: PreTrainedConfig) -> int:
        """The intermediate size of one expert."""
        return config.moe_intermediate_size

    def mixture(self, config: PreTrainedConfig) -> dict[str, int]:
        """The key num_experts, and num_experts_per_tok."""
        return {"experts": config.num_experts, "experts_per_token": config.num_experts_per_tok}


class Mixtral(Mistral):
    """Mistral with experts in every layer; files have names other than the modules in memory."""

    projections: ClassVar[dict[str, str]] = ATTENTION
    experts: ClassVar[dict[str, str]] = {
        "gate": "mlp.experts.{}.w1",
        "up": "mlp.experts.{}.w3",
        "down": "mlp.experts.{}.w2",
    }

    def mixture(self, config: PreTrainedConfig) -> dict[str, int]:
        """The key num_local_experts, and num_experts_per_tok."""
        count = config.num_local_experts
        return {"experts": count, "experts_per_token": config.num_experts_per_tok}


class Olmo2(AttentionBiased):
    """RMS norm of q and k before RoPE, over all heads together."""

    qk_norm = "layer"


class Olmo(AttentionBiased):
    """OLMo 1; its option to clip q, k and v makes neither scores nor values linear."""

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse clip_qkv."""
        super().check(config)
        if config.clip_qkv is not None:
            raise A3Error(
                f"config.json: clip_qkv is {config.clip_qkv}; clipped values are not linear in the "
                "weights, so no low-rank solution applies. This model is not supported."
            )


class Gemma2(AttentionBiased):
    """A softmax scale of its own, and scores that are capped after scaling."""

    def scaling(self, config: PreTrainedConfig, head_dim: int) -> float:
        """The key query_pre_attn_scalar to the power -½."""
        return config.query_pre_attn_scalar**-0.5


class Gemma3(Gemma2):
    """Norms of q and k in Gemma's form, x̂ (1 + w); RoPE of two kinds, by layer."""

    qk_norm = "head"
    gain_offset = 1.0
    norm_heads_first = True

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse attention that looks ahead."""
        super().check(config)
        if config.use_bidirectional_attention:
            raise A3Error(
                "config.json: use_bidirectional_attention is true; a3 compresses causal language "
                "models. This model is not supported."
            )


class SmolLM3(Family):
    """Llama with some layers that have no RoPE."""

    def rotates(self, attention: nn.Module) -> bool:
        """Layers for which no_rope_layers is 1 have RoPE."""
        return bool(attention.use_rope)


class Phi3(Mistral):
    """q, k and v in one matrix, gate and up in another."""

    projections: ClassVar[dict[str, str]] = {
        "q": "self_attn.qkv_proj",
        "k": "self_attn.qkv_proj",
        "v": "self_attn.qkv_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_up_proj",
        "up": "mlp.gate_up_proj",
        "down": "mlp.down_proj",
    }


class StableLm(Family):
    """Llama with partial RoPE and, in some sizes, biases of q, k and v."""

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """The key use_qkv_bias holds for q, k and v."""
        return {"qkv_bias": config.use_qkv_bias, "o_bias": False, "mlp_bias": False}


class Cohere(AttentionBiased):
    """Pairs are neighbours; attention and MLP side by side."""

    rope_layout = "neighbours"

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse use_qk_norm."""
        super().check(config)
        if getattr(config, "use_qk_norm", False):
            raise A3Error(
                "config.json: use_qk_norm is true; a3 does not support this family with normed "
                "queries and keys. This model is not supported."
            )


class Cohere2(Cohere):
    """Layers with full attention have no RoPE; the others have a sliding window."""

    def rotates(self, attention: nn.Module) -> bool:
        """Layers with a sliding window have RoPE."""
        return attention.sliding_window is not None


class Glm(Family):
    """GLM 4: pairs are neighbours; gate and up in one matrix; biases of q, k and v."""

    rope_layout = "neighbours"
    projections: ClassVar[dict[str, str]] = Family.projections | {
        "gate": "mlp.gate_up_proj",
        "up": "mlp.gate_up_proj",
    }

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """The key attention_bias holds for q, k and v."""
        return {"qkv_bias": config.attention_bias, "o_bias": False, "mlp_bias": False}
