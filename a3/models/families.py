"""The families that a3 knows, as data plus narrow adapters, and those that it refuses.

A new family is one subclass here and one row in FAMILIES; it inherits the whole adapter test suite.
"""

from typing import Any, ClassVar

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
        "gate": "block_sparse_moe.experts.{}.w1",
        "up": "block_sparse_moe.experts.{}.w3",
        "down": "block_sparse_moe.experts.{}.w2",
    }

    def mixture(self, config: PreTrainedConfig) -> dict[str, int]:
        """The key num_local_experts, and num_experts_per_tok."""
        count = config.num_local_experts
        return {"experts": count, "experts_per_token": config.num_experts_per_tok}

    def packed_rest(self, name: str) -> str:
        """The name of the router's tensor in the module."""
        return name.replace(".block_sparse_moe.", ".mlp.")


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


class NoRope(Family):
    """Learned positions or ALiBi, one key/value head a query head, biases everywhere."""

    rope_layout = None
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

# Why a family cannot be one, and its model types.
_REFUSED = {
    "an encoder-decoder: cross-attention takes keys and values from another sequence than queries, "
    "for which a3 has no statistics": (
        "bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 "
        "marian mbart mt5 mvp nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5 "
        "t5gemma t5gemma2 umt5 whisper"
    ),
    "with multi-head latent attention: keys and values are made from a shared low-rank latent, and "
    "the latent is what could be cached, so smaller heads would not make it smaller": (
        "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 "
        "mistral4 youtu"
    ),
    "with layers that are recurrent, convolutional or linear attention: they have no softmax over "
    "products of queries and keys, to which the solutions of QK and OV belong": (
        "bailing_hybrid bamba falcon_h1 falcon_mamba jamba kimi_linear lfm2 "
        "lfm2_moe mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_next "
        "recurrent_gemma rwkv xlstm zamba zamba2"
    ),
}

REFUSED: dict[str, str] = {
    model_type: reason for reason, types in _REFUSED.items() for model_type in types.split()
}
