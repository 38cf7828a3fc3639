"""Families as data plus a narrow adapter: where q, k, v, o and the MLP are, and their biases.

A new family is one subclass here; it inherits the whole adapter test suite. All weights leave an
adapter in the row-vector convention of the paper (y = x W), float64, one slice a head; where the
family has biases, W has the bias as one more row, which makes every formula exact (`augment`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from a3.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class AttentionWeights:
    """Weights of one layer's attention; d̂ is the hidden size, plus one where there are biases.

    q (H, d̂, h), k (G, d̂, h), v (G, d̂, h), o (H, h, d); head i belongs to group i // (H / G).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    def grouped(self, heads: Tensor) -> Tensor:
        """(H, a, b) to (G, H / G, a, b)."""
        return heads.unflatten(0, (self.k.shape[0], -1))


@dataclass(frozen=True)
class MLPWeights:
    """Weights of one layer's MLP: up and gate (d̂, n), or no gate; down (n, d)."""

    up: Tensor
    gate: Tensor | None
    down: Tensor


class Family:
    """Llama: separate q, k, v, o, gate, up, down projections; RoPE in halves."""

    model_type = "llama"
    rope_layout: str | None = "halves"
    parts: ClassVar[dict[str, str]] = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "up": "mlp.up_proj",
        "gate": "mlp.gate_proj",
        "down": "mlp.down_proj",
    }
    # The projection whose input is each of the three autocorrelations' x.
    sites: ClassVar[dict[str, str]] = {"attn_input": "q", "o_proj_input": "o", "down_input": "down"}

    def module(self, layer: int, part: str) -> str:
        """Module of one projection, relative to the trunk (`model.base_model`)."""
        return f"layers.{layer}.{self.parts[part]}"

    def attention_module(self, layer: int) -> str:
        """The attention module of a layer, which the compressed model replaces."""
        return f"model.layers.{layer}.self_attn"

    def name(self, layer: int, part: str, field: str = "weight") -> str:
        """Tensor of one projection in the checkpoint."""
        return f"model.{self.module(layer, part)}.{field}"

    def describe(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The fields of `Arch` that the config decides."""
        grouped = config.num_key_value_heads < config.num_attention_heads
        return {
            "family": self.model_type,
            "attention": "gqa-rope" if grouped else "mha-rope",
            "mlp": "3-layer",
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "qkv_bias": config.attention_bias,
            "o_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            "rope_layout": self.rope_layout,
            "rope_dims": config.head_dim,
            "scaling": config.head_dim**-0.5,
            "tied_embeddings": config.tie_word_embeddings,
        }

    def shapes(self, fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that compression replaces, of the dense model."""
        d, n = fields["hidden_size"], fields["intermediate_size"]
        wide, narrow = (fields[key] * fields["head_dim"] for key in ("heads", "kv_heads"))
        weights = {"q": (wide, d), "k": (narrow, d), "v": (narrow, d), "o": (d, wide)}
        weights |= {"up": (n, d), "gate": (n, d), "down": (d, n)}
        biased = {part: fields["qkv_bias"] for part in "qkv"} | {"o": fields["o_bias"]}
        biased |= {part: fields["mlp_bias"] for part in ("up", "gate", "down")}
        expected: dict[str, tuple[int, ...]] = {}
        for layer in range(fields["layers"]):
            for part, shape in weights.items():
                expected[self.name(layer, part)] = shape
                if biased[part]:
                    expected[self.name(layer, part, "bias")] = shape[:1]
        return expected

    def _rows(self, checkpoint: Checkpoint, layer: int, part: str, bias: bool) -> Tensor:
        """One projection as x W, (d̂, out), with the bias as the last row."""
        W = checkpoint.tensor(self.name(layer, part)).double().T
        if bias:
            b = checkpoint.tensor(self.name(layer, part, "bias")).double()
            W = torch.cat((W, b[None]))
        return W

    def attention(self, checkpoint: Checkpoint, layer: int, fields: Any) -> AttentionWeights:
        """Read one layer's attention weights; `fields` is the model's `Arch`."""

        def heads(part: str) -> Tensor:
            W = self._rows(checkpoint, layer, part, fields.qkv_bias)
            return W.unflatten(1, (-1, fields.head_dim)).movedim(1, 0)

        o = self._rows(checkpoint, layer, "o", False).unflatten(0, (fields.heads, -1))
        return AttentionWeights(q=heads("q"), k=heads("k"), v=heads("v"), o=o)

    def mlp(self, checkpoint: Checkpoint, layer: int, fields: Any) -> MLPWeights:
        """Read one layer's MLP weights; `fields` is the model's `Arch`."""
        gated = fields.mlp == "3-layer"
        return MLPWeights(
            up=self._rows(checkpoint, layer, "up", fields.mlp_bias),
            gate=self._rows(checkpoint, layer, "gate", fields.mlp_bias) if gated else None,
            down=self._rows(checkpoint, layer, "down", False),
        )

    def pack(self, layer: int, part: str, W: Tensor, bias: bool) -> dict[str, Tensor]:
        """Checkpoint tensors of one compressed projection.

        W is (H, d̂, r) for q, k, v, (H, r, d) for o, and (d̂, r) or (r, d) for the MLP.
        """
        if part in "qkv":
            W = W.movedim(0, 1).flatten(1)
        elif part == "o":
            W = W.flatten(0, 1)
        tensors = {}
        if bias:
            W, tensors[self.name(layer, part, "bias")] = W[:-1], W[-1]
        tensors[self.name(layer, part)] = W.T
        return tensors


FAMILIES: dict[str, Family] = {family.model_type: family for family in (Family(),)}
