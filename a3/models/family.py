"""A family's adapter: where q, k, v, o and the MLP are in a checkpoint, and their biases.

An adapter returns all weights in the paper's row-vector convention (y = x W). Attention weights are
in float64, one slice per head. MLP weights keep their stored dtype, because their channels are only
kept or dropped. If the family has biases, W has the bias as an additional row, as if x ended with a
1; this makes every formula exact.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from a3.core.errors import A3Error
from a3.models.built import rotated_width
from a3.models.checkpoint import Checkpoint
from a3.models.weights import AttentionWeights, MLPWeights

__all__ = ["ATTENTION", "AttentionWeights", "Family", "MLPWeights"]


# The attention of Llama and of many others.
ATTENTION = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
}


class Family:
    """Llama: separate q, k, v, o, gate, up, down projections; RoPE in halves."""

    rope_layout: ClassVar[str | None] = "halves"
    # RMS norm of q and k before RoPE: over each "head", over the "layer"'s heads together, or none;
    # a norm's gain is its weight plus `gain_offset`.
    qk_norm: ClassVar[str | None] = None
    gain_offset: ClassVar[float] = 0.0
    # Whether those norms get tensors whose heads come before the tokens.
    norm_heads_first: ClassVar[bool] = False
    # Their modules in the attention module.
    norms: ClassVar[dict[str, str]] = {"q": "q_norm", "k": "k_norm"}
    prefix: ClassVar[str] = "model"
    layer_path: ClassVar[str] = "layers"
    # The language model in the trunk of a model of several modalities.
    backbone: ClassVar[str] = ""
    attention_name: ClassVar[str] = "self_attn"
    # The config's key for the number of positions, if the model fails beyond them.
    positions: ClassVar[str | None] = None
    # Whether weights are stored as (in, out), like GPT-2's Conv1D; torch's Linear has (out, in).
    transposed: ClassVar[bool] = False
    # Projections that share a module are fused in it, in this order.
    projections: ClassVar[dict[str, str]] = ATTENTION | {
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    # The same for a mixture's experts, which replace the MLP; {} is the expert's number.
    experts: ClassVar[dict[str, str]] = {}

    # --- what the config says ---

    def kv_heads(self, config: PreTrainedConfig) -> int:
        """Number of key/value heads."""
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    def intermediate_size(self, config: PreTrainedConfig) -> int:
        """Number of channels of the MLP."""
        return config.intermediate_size

    def mixture(self, config: PreTrainedConfig) -> dict[str, int]:
        """Number of experts, and of experts per token; both 0 for an ordinary MLP."""
        return {"experts": 0, "experts_per_token": 0}

    def interleaved(self, fields: dict[str, Any]) -> bool:
        """Whether fused q, k, v alternate group by group instead of following one another."""
        return False

    def biases(self, config: PreTrainedConfig) -> dict[str, bool]:
        """Which projections have biases."""
        attention = config.attention_bias
        return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": config.mlp_bias}

    def scaling(self, config: PreTrainedConfig, head_dim: int) -> float:
        """The softmax scale."""
        return head_dim**-0.5

    def rotates(self, attention: nn.Module) -> bool:
        """Whether a layer's attention has RoPE, in a model that has it."""
        return True

    def check(self, config: PreTrainedConfig) -> None:
        """Raise A3Error for a variant that this adapter would get wrong."""
        if getattr(config, "qk_layernorm", False):
            raise A3Error(
                "config.json: qk_layernorm is true; a3 does not support this family with normed "
                "queries and keys. This model is not supported."
            )

    def layout(self, config: PreTrainedConfig) -> str | None:
        """How RoPE pairs the dimensions of a head; None without RoPE."""
        return self.rope_layout

    def head_dim(self, attention: nn.Module) -> int:
        """Size of a head."""
        return attention.head_dim

    def describe(self, config: PreTrainedConfig, model: PreTrainedModel) -> dict[str, Any]:
        """The fields of `Arch` that follow from the config from which `model` was built.

        `model` may be without weights. Raises A3Error as `check` does.
        """
        self.check(config)
        heads = config.num_attention_heads
        kv_heads = self.kv_heads(config)
        layers = range(config.num_hidden_layers)
        if not layers:
            key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
            found = config.num_hidden_layers
            raise A3Error(f"config.json: {key} is {found}, expected 1 or more. Correct it.")
        attentions = [model.get_submodule(self.attention_module(layer)) for layer in layers]
        head_dim = self.head_dim(attentions[0])
        grouped = "gqa" if kv_heads < heads else "mha"
        layout = self.layout(config)
        return {
            "family": config.model_type,
            "attention": f"{grouped}-rope" if layout else grouped,
            "mlp": "3-layer" if "gate" in self.places else "2-layer",
            "mlp_inputs": len(self.first_of_mlp),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": self.intermediate_size(config),
            **self.mixture(config),
            "vocab_size": config.vocab_size,
            **self.biases(config),
            "qk_norm": self.qk_norm,
            "norm_eps": config.rms_norm_eps if self.qk_norm else None,
            "rope_layout": layout,
            # The first dimensions of a head; the family's code, not the config, decides how many.
            "rope_dims": rotated_width(self.body(model)) if layout else 0,
            "nope_layers": [layer for layer in layers if not self.rotates(attentions[layer])],
            "scaling": self.scaling(config, head_dim),
            "fixed": {"qk": [], "ov": [], "mlp": []},
            "structure": None,
            "rest": None,
        }

    def body(self, model: PreTrainedModel) -> nn.Module:
        """The language model without its head."""
        return model.base_model.get_submodule(self.backbone)

    def own(self, fields: dict[str, Any]) -> dict[str, Any] | None:
        """What a compressed model has to know if its attention is the family's own code.

        See own_attention_a3.Own; None where `A3Attention` takes its place.
        """
        return None

    # --- names ---

    @property
    def places(self) -> dict[str, str]:
        """Where each projection is in a layer; {} is an expert's number."""
        return self.projections | self.experts

    def module(self, layer: int, projection: str, expert: int | None = None) -> str:
        """Module of one projection, relative to the trunk (`model.base_model`)."""
        return f"{self.layer_path}.{layer}.{self.places[projection].format(expert)}"

    def attention_module(self, layer: int) -> str:
        """The attention module of a layer, which the compressed model replaces."""
        return self.modules["attention"].format(layer)

    def experts_module(self, layer: int) -> str:
        """The experts of a layer, in memory, which the compressed model replaces."""
        return self.modules["experts"].format(layer)

    @property
    def modules(self) -> dict[str, str]:
        """What the compressed model replaces, by its name in memory; {} is the layer's number."""
        layer = f"{self.prefix}.{self.layer_path}.{{}}"
        mlp = {
            projection: f"{layer}.{name}"
            for projection, name in self.projections.items()
            if projection not in "qkvo"
        }
        experts = {"experts": f"{layer}.mlp.experts", "router": f"{layer}.mlp.gate"}
        experts = experts if self.experts else {}
        return {"attention": f"{layer}.{self.attention_name}"} | mlp | experts

    def name(
        self, layer: int, projection: str, field: str = "weight", expert: int | None = None
    ) -> str:
        """Tensor of one projection in the dense checkpoint."""
        return f"{self.prefix}.{self.module(layer, projection, expert)}.{field}"

    def packed_name(
        self, layer: int, projection: str, field: str = "weight", expert: int | None = None
    ) -> str:
        """Tensor of one projection in the compressed checkpoint: attention is never fused there."""
        if projection in "qkvo":
            return f"{self.attention_module(layer)}.{projection}_proj.{field}"
        if expert is not None:
            return f"{self.experts_module(layer)}.{expert}.{projection}_proj.{field}"
        return self.name(layer, projection, field)

    def names_in(self, checkpoint: Checkpoint, layer: int | None) -> list[str]:
        """Tensors of the dense checkpoint that are in a layer, or (None) in no layer."""
        layers = f"{self.prefix}.{self.layer_path}."
        if layer is None:
            return [name for name in checkpoint.names() if not name.startswith(layers)]
        return [name for name in checkpoint.names() if name.startswith(f"{layers}{layer}.")]

    def queries(self, layer: int) -> str:
        """Module whose output is q before RoPE, normed where it is, relative to the trunk."""
        if self.qk_norm is None:
            return self.module(layer, "q")
        return self.norm_name(layer, "q").removeprefix(f"{self.prefix}.").removesuffix(".weight")

    def norm_name(self, layer: int, projection: str) -> str:
        """Gains of the norm of q or k in the dense checkpoint."""
        return f"{self.attention_module(layer)}.{self.norms[projection]}.weight"

    def packed_norm_name(self, layer: int, projection: str) -> str:
        """Gains of the norm of q or k in the compressed checkpoint."""
        return f"{self.attention_module(layer)}.{projection}_norm.weight"

    def fused(self, projection: str) -> list[str]:
        """Projections that lie in the same tensor as `projection`, itself included, in order."""
        return [other for other in self.places if self.places[other] == self.places[projection]]

    @property
    def first_of_mlp(self) -> list[list[str]]:
        """The modules that read the MLP's input, each as the projections that are fused in it."""
        projections = [projection for projection in ("gate", "up") if projection in self.places]
        return [
            self.fused(projection)
            for projection in projections
            if self.fused(projection)[0] == projection
        ]

    @property
    def repacked(self) -> bool:
        """Whether the family stores q, k, v and o differently from the compressed model."""
        if "q" not in self.places:
            return False
        moved = self.transposed or self.rope_layout == "neighbours" or self.qk_norm is not None
        return moved or len(self.fused("q")) > 1

    def width(self, projection: str, fields: dict[str, Any]) -> int:
        """Output size of a projection of the dense model."""
        if projection in "qkv":
            return fields["heads" if projection == "q" else "kv_heads"] * fields["head_dim"]
        return fields["hidden_size"] if projection in ("o", "down") else fields["intermediate_size"]

    def has_bias(self, projection: str, fields: dict[str, Any]) -> bool:
        """Whether a projection of the dense model has a bias."""
        return fields[
            {"o": "o_bias"}.get(projection, "qkv_bias" if projection in "qkv" else "mlp_bias")
        ]

    def shapes(self, fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that compression replaces, of the dense model."""
        inputs = {"o": fields["heads"] * fields["head_dim"], "down": fields["intermediate_size"]}
        expected: dict[str, tuple[int, ...]] = {}
        for layer in range(fields["layers"]):
            for projection in self.places:
                rows = sum(self.width(other, fields) for other in self.fused(projection))
                columns = inputs.get(projection, fields["hidden_size"])
                shape = (columns, rows) if self.transposed else (rows, columns)
                for expert in self.copies(projection, fields):
                    expected[self.name(layer, projection, "weight", expert)] = shape
                    if self.has_bias(projection, fields):
                        expected[self.name(layer, projection, "bias", expert)] = (rows,)
        return expected

    def copies(self, projection: str, fields: dict[str, Any]) -> Iterable[int | None]:
        """The numbers of the experts that have a projection; [None] if experts do not have it."""
        return range(fields["experts"]) if projection in self.experts else [None]

    # --- weights ---

    def _rows(
        self,
        checkpoint: Checkpoint,
        layer: int,
        projection: str,
        fields: dict[str, Any],
        expert: int | None = None,
    ) -> Tensor:
        """One projection as x W, (d̂, out), in its dtype; the bias as the last row (not o, down)."""
        W = checkpoint.tensor(self.name(layer, projection, "weight", expert))
        W = self.unfuse(W if not self.transposed else W.T, projection, fields).T
        if projection not in ("o", "down") and self.has_bias(projection, fields):
            b = checkpoint.tensor(self.name(layer, projection, "bias"))
            W = torch.cat((W, self.unfuse(b, projection, fields)[None]))
        return W

    def unfuse(self, rows: Tensor, projection: str, fields: dict[str, Any]) -> Tensor:
        """The rows of one projection in the tensor that it shares, (out, …) to (out', …).

        RoPE pairs of q and k are returned in halves, for every layout of the family.
        """
        if projection in "qkv" and self.interleaved(fields):
            # Each group has its query heads, then its key head, then its value head.
            groups = rows.unflatten(0, (fields["kv_heads"], -1, fields["head_dim"]))
            place = {"q": slice(-2), "k": slice(-2, -1), "v": slice(-1, None)}[projection]
            rows = groups[:, place].flatten(0, 2)
        else:
            together = self.fused(projection)
            start = sum(
                self.width(other, fields) for other in together[: together.index(projection)]
            )
            rows = rows[start : start + self.width(projection, fields)]
        return self.in_halves(rows, fields) if projection in "qk" else rows

    def in_halves(self, rows: Tensor, fields: dict[str, Any]) -> Tensor:
        """Move pairs that are neighbours (2j, 2j + 1) of each head to (j, j + pairs)."""
        if fields["rope_layout"] != "neighbours":
            return rows
        order = torch.arange(fields["head_dim"])
        rotated = slice(fields["rope_dims"])
        order[rotated] = order[rotated].view(-1, 2).T.flatten()
        return rows.unflatten(0, (-1, fields["head_dim"]))[:, order].flatten(0, 1)

    def attention(
        self, checkpoint: Checkpoint, layer: int, fields: dict[str, Any]
    ) -> AttentionWeights:
        """Read one layer's attention weights; `fields` are those of `Arch`."""

        def heads(projection: str) -> Tensor:
            W = self._rows(checkpoint, layer, projection, fields).double()
            return W.unflatten(1, (-1, fields["head_dim"])).movedim(1, 0)

        def gain(projection: str) -> Tensor | None:
            if self.qk_norm is None:
                return None
            shape = (self.width(projection, fields) // fields["head_dim"], fields["head_dim"])
            gains = self.gains(checkpoint, layer, projection)
            if gains is None:
                return torch.ones(shape, dtype=torch.float64)
            gains = gains.view(shape) if self.qk_norm == "layer" else gains.expand(shape)
            return self.in_halves(gains.flatten(), fields).view(shape)

        o = self._rows(checkpoint, layer, "o", fields).double()
        rotated = 0 if layer in fields["nope_layers"] else fields["rope_dims"]
        return AttentionWeights(
            heads("q"),
            heads("k"),
            heads("v"),
            o.unflatten(0, (fields["heads"], -1)),
            rotated,
            self.qk_norm,
            gain("q"),
            gain("k"),
        )

    def gains(self, checkpoint: Checkpoint, layer: int, projection: str) -> Tensor | None:
        """Gains of the norm of q or k, float64, of one head or all; None if the norm has none."""
        return checkpoint.tensor(self.norm_name(layer, projection)).double() + self.gain_offset

    def mlp(
        self,
        checkpoint: Checkpoint,
        layer: int,
        fields: dict[str, Any],
        expert: int | None = None,
    ) -> MLPWeights:
        """Read one layer's MLP weights, or one expert's; `fields` are those of `Arch`."""

        def rows(projection: str) -> Tensor:
            return self._rows(checkpoint, layer, projection, fields, expert)

        return MLPWeights(
            up=rows("up"), gate=rows("gate") if "gate" in self.places else None, down=rows("down")
        )

    def layer_tensors(
        self, checkpoint: Checkpoint, layer: int, fields: dict[str, Any]
    ) -> dict[str, Tensor]:
        """All tensors of one layer by their names in the trunk, laid out as in memory.

        transformers keeps all experts of a layer in two tensors, (E, 2n, d) and (E, d, n); the
        first is (E, n, d) without gates.
        """
        experts = {
            projection: [
                self.name(layer, projection, "weight", expert)
                for expert in range(fields["experts"])
            ]
            for projection in self.experts
        }
        theirs = {name for names in experts.values() for name in names}
        tensors = {
            name.removeprefix(f"{self.prefix}."): checkpoint.tensor(name)
            for name in self.names_in(checkpoint, layer)
            if name not in theirs
        }
        if experts:
            where = self.experts_module(layer).removeprefix(f"{self.prefix}.")
            stacks = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
            if "gate" not in experts:
                stacks = {"up_proj": ("up",), "down_proj": ("down",)}
            for stack, together in stacks.items():
                of_each = zip(*(map(checkpoint.tensor, experts[p]) for p in together), strict=True)
                tensors[f"{where}.{stack}"] = torch.stack([torch.cat(rows) for rows in of_each])
        return tensors

    def has_stored_experts(self, checkpoint: Checkpoint, layer: int) -> bool:
        """Whether files have each expert of a layer, and memory all of them in one."""
        return bool(self.experts)

    def pack(
        self,
        layer: int,
        solved: dict[str, Tensor],
        fields: dict[str, Any],
        expert: int | None = None,
    ) -> dict[str, Tensor]:
        """Checkpoint tensors of compressed projections, with unchanged dtype.

        `solved` has W by projection: (H, d̂, r) for q, k, v; (H, r, d) for o; (d̂, r) or (r, d) for
        the MLP; gains (H, r) as q_gain and k_gain. Biases of o and down are not in it: they are
        the dense ones.
        """
        tensors: dict[str, list[Tensor]] = {
            self.packed_norm_name(layer, name[0]): [gains]
            for name, gains in solved.items()
            if name.endswith("_gain")
        }
        for projection in sorted(self.places.keys() & solved, key=list(self.places).index):
            W = solved[projection]
            if projection in "qkv":
                W = W.movedim(0, 1).flatten(1)
            elif projection == "o":
                W = W.flatten(0, 1)
            if projection not in ("o", "down") and self.has_bias(projection, fields):
                W, b = W[:-1], W[-1]
                name = self.packed_name(layer, projection, "bias", expert)
                tensors.setdefault(name, []).append(b)
            keep = self.transposed and projection not in "qkvo"
            name = self.packed_name(layer, projection, "weight", expert)
            tensors.setdefault(name, []).append(W if keep else W.T)
        return {name: torch.cat(pieces) for name, pieces in tensors.items()}
