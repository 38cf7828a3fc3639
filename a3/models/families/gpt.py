"""GPT-2 and its relatives: an MLP of two layers; learned positions, ALiBi or RoPE."""

from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig

from a3.core.errors import A3Error
from a3.models.family import Family


class NoRope(Family):
    """Learned positions or ALiBi, one key/value head a query head, biases everywhere."""

    rope_layout: ClassVar[str | None] = None
    prefix = "transformer"
    layer_path = "h"
    attention_name = "attn"

    def kv_heads(self, config: PreTrainedConfig) -> int:
        """As many key/value heads as query heads."""
        return config.num_attention_heads

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """Every projection has a bias."""
        return {"qkv_bias": True, "o_bias": True, "mlp_bias": True}


class GPT2(NoRope):
    """Fused q, k, v; all weights transposed (Conv1D)."""

    positions = "max_position_embeddings"
    transposed = True
    projections: ClassVar[dict[str, str]] = {
        "q": "attn.c_attn",
        "k": "attn.c_attn",
        "v": "attn.c_attn",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }

    def intermediate_size(self, config: PreTrainedConfig) -> int:
        """Four times the hidden size unless the config says otherwise."""
        return config.n_inner or 4 * config.hidden_size

    def scaling(self, config: PreTrainedConfig, head_dim: int) -> float:
        """1 where scale_attn_weights is false."""
        return head_dim**-0.5 if config.scale_attn_weights else 1.0

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a softmax scale that differs between layers."""
        super().check(config)
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise A3Error(
                "config.json: scale_attn_by_inverse_layer_idx is true; a3 keeps one softmax scale "
                "for all layers. This model is not supported."
            )


class GPTBigCode(GPT2):
    """GPT-2 with plain Linear layers; one key/value head for all (MQA), or q, k, v interleaved."""

    transposed = False

    def kv_heads(self, config: PreTrainedConfig) -> int:
        """One key/value head with multi_query, else as many as query heads."""
        return 1 if config.multi_query else config.num_attention_heads

    def interleaved(self, fields: dict[str, Any]) -> bool:
        """They alternate unless all query heads share one key/value head."""
        return fields["kv_heads"] == fields["heads"]


class OPT(NoRope):
    """Separate projections; the MLP lies in the layer itself."""

    positions = "max_position_embeddings"
    prefix = "model"
    layer_path = "decoder.layers"
    attention_name = "self_attn"
    projections: ClassVar[dict[str, str]] = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    }

    def intermediate_size(self, config: PreTrainedConfig) -> int:
        """The key ffn_dim."""
        return config.ffn_dim

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """The key enable_bias holds for all projections."""
        return dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), config.enable_bias)


class GPTNeo(NoRope):
    """Separate q, k, v without biases; the softmax has no scale; some layers see a window only."""

    positions = "max_position_embeddings"
    attention_name = "attn.attention"
    projections: ClassVar[dict[str, str]] = {
        "q": "attn.attention.q_proj",
        "k": "attn.attention.k_proj",
        "v": "attn.attention.v_proj",
        "o": "attn.attention.out_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }

    def intermediate_size(self, config: PreTrainedConfig) -> int:
        """Four times the hidden size unless the config says otherwise."""
        return config.intermediate_size or 4 * config.hidden_size

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """Only o and the MLP have a bias."""
        return {"qkv_bias": False, "o_bias": True, "mlp_bias": True}

    def scaling(self, config: PreTrainedConfig, head_dim: int) -> float:
        """The scores are not scaled."""
        return 1.0


class Bloom(NoRope):
    """ALiBi; q, k, v interleaved head by head in one matrix."""

    attention_name = "self_attention"
    projections: ClassVar[dict[str, str]] = {
        "q": "self_attention.query_key_value",
        "k": "self_attention.query_key_value",
        "v": "self_attention.query_key_value",
        "o": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse projections in slices, whose modules are passed by."""
        super().check(config)
        tp = getattr(config, "pretraining_tp", 1)
        if getattr(config, "slow_but_exact", False) and tp > 1:
            raise A3Error(
                f"config.json: slow_but_exact is true, and pretraining_tp {tp}; the products of o "
                "and down are then summed in slices, of which there are no statistics. It is the "
                "same function without: set slow_but_exact to false."
            )

    def intermediate_size(self, config: PreTrainedConfig) -> int:
        """Four times the hidden size."""
        return 4 * config.hidden_size

    def interleaved(self, fields: dict[str, Any]) -> bool:
        """They always alternate."""
        return True


class Falcon(Bloom):
    """RoPE or ALiBi; one key/value head for all, one a group or one a query head, interleaved.

    The mask that its layers hand over holds ALiBi, divided as the scores are. (The dense model adds
    it once more with eager attention; the compressed one does what the default, sdpa, does.)
    """

    rope_layout = "halves"

    def layout(self, config: PreTrainedConfig) -> str | None:
        """None with ALiBi, which takes the place of RoPE."""
        return None if config.alibi else self.rope_layout

    def kv_heads(self, config: PreTrainedConfig) -> int:
        """num_kv_heads counts in the new decoder architecture only."""
        if config.new_decoder_architecture:
            return config.num_kv_heads
        return 1 if config.multi_query else config.num_attention_heads

    def intermediate_size(self, config: PreTrainedConfig) -> int:
        """The key ffn_hidden_size."""
        return config.ffn_hidden_size

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """The key `bias` holds for all projections."""
        return dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), config.bias)


class Mpt(NoRope):
    """ALiBi; fused q, k, v; no biases at all."""

    positions = "max_seq_len"
    layer_path = "blocks"
    projections: ClassVar[dict[str, str]] = {
        "q": "attn.Wqkv",
        "k": "attn.Wqkv",
        "v": "attn.Wqkv",
        "o": "attn.out_proj",
        "up": "ffn.up_proj",
        "down": "ffn.down_proj",
    }

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """No projection has a bias."""
        return {"qkv_bias": False, "o_bias": False, "mlp_bias": False}

    def intermediate_size(self, config: PreTrainedConfig) -> int:
        """Four times the hidden size."""
        return 4 * config.hidden_size

    def scaling(self, config: PreTrainedConfig, head_dim: int) -> float:
        """The key softmax_scale where it is set."""
        return config.attn_config.softmax_scale or head_dim**-0.5

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse clip_qkv and qk_ln."""
        for key in ("clip_qkv", "qk_ln"):
            if getattr(config.attn_config, key):
                raise A3Error(
                    f"config.json: attn_config.{key} is {getattr(config.attn_config, key)}; q, k "
                    "and v are then not linear in the weights. This model is not supported."
                )


class GPTNeoX(Family):
    """Pythia and GPT-NeoX: partial RoPE; q, k, v interleaved head by head in one matrix."""

    prefix = "gpt_neox"
    attention_name = "attention"
    projections: ClassVar[dict[str, str]] = {
        "q": "attention.query_key_value",
        "k": "attention.query_key_value",
        "v": "attention.query_key_value",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }

    def kv_heads(self, config: PreTrainedConfig) -> int:
        """As many key/value heads as query heads."""
        return config.num_attention_heads

    def interleaved(self, fields: dict[str, Any]) -> bool:
        """They always alternate."""
        return True

    def head_dim(self, attention: nn.Module) -> int:
        """Size of a head, which this family calls head_size."""
        return attention.head_size

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """The MLP always has a bias."""
        bias = config.attention_bias
        return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": True}


class Phi(Family):
    """Phi 1 to 2: partial RoPE, a 2-layer MLP, biases everywhere."""

    projections: ClassVar[dict[str, str]] = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.dense",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """Every projection has a bias."""
        return {"qkv_bias": True, "o_bias": True, "mlp_bias": True}


class GPTJ(Family):
    """Pairs are neighbours, of the first rotary_dim dimensions; biases in the MLP only."""

    positions = "max_position_embeddings"
    rope_layout = "neighbours"
    prefix = "transformer"
    layer_path = "h"
    attention_name = "attn"
    projections: ClassVar[dict[str, str]] = {
        "q": "attn.q_proj",
        "k": "attn.k_proj",
        "v": "attn.v_proj",
        "o": "attn.out_proj",
        "up": "mlp.fc_in",
        "down": "mlp.fc_out",
    }

    def kv_heads(self, config: PreTrainedConfig) -> int:
        """As many key/value heads as query heads."""
        return config.num_attention_heads

    def intermediate_size(self, config: PreTrainedConfig) -> int:
        """Four times the hidden size unless the config says otherwise."""
        return config.n_inner or 4 * config.hidden_size

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """Only the MLP has a bias."""
        return {"qkv_bias": False, "o_bias": False, "mlp_bias": True}
