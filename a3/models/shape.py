"""`Arch`, what a3 knows about a model, dense or compressed."""

from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from a3.core.dtypes import WIDTHS
from a3.core.errors import A3Error
from a3.models.checkpoint import Checkpoint
from a3.models.families import family_of
from a3.models.family import Family
from a3.rxx.kinds import Kind, heads_of, norms_output, shape_of


@dataclass(frozen=True)
class Arch:
    """One dense model: everything that collect and approx need to know about its shape.

    `attention` is one of mha, mha-rope, gqa, gqa-rope; `mlp` is 2-layer or 3-layer (gated), and
    `mlp_inputs` counts the matrices that read its input (gate and up may be fused); `rope_layout`
    is halves (j, j + h/2), neighbours (2j, 2j + 1) or None; `rope_dims` counts the rotated
    dimensions of a head; `nope_layers` are layers without RoPE in a model that has it elsewhere;
    `qk_norm` says whether q and k are normed before RoPE, over each "head" or the whole "layer" (or
    None); `intermediate_size` is that of one expert where there are `experts`, 0 of them otherwise;
    `scaling` is the softmax scale, which compression keeps. `norm_eps` is added to mean squares by
    the norms of q and k. `fixed` has, by component, the layers in which it cannot be compressed and
    is left as it is. `structure` is what a probe found (a3.models.families.probed), None for a
    family with an adapter of its own; `rest` is what its layers have besides the components: the
    weights of other matrices (of experts those in use), and numbers cached per token by attention
    that stays. `wrapper` is the type of the model of several modalities whose language model this
    is (a3.models.wrappers), or None. Then all else is of the language model, but for
    `size["parameters"]`, of which `size["carried"]` are others.
    """

    family: str
    attention: str
    mlp: str
    mlp_inputs: int
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    experts: int
    experts_per_token: int
    vocab_size: int
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: str | None
    rope_layout: str | None
    rope_dims: int
    nope_layers: list[int]
    scaling: float
    norm_eps: float | None
    fixed: dict[str, list[int]]
    structure: dict[str, Any] | None
    rest: list[dict[str, int]] | None
    dtype: str
    weights_sha256: str
    size: dict[str, int]
    wrapper: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of arch.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any], path: Path) -> Self:
        """The inverse of `to_json`; raises A3Error if a field is missing."""
        names = [field.name for field in fields(cls) if field.name in content or required(field)]
        if missing := [name for name in names if name not in content]:
            raise A3Error(
                f"{path}: no {', '.join(missing)} in it: written by another version of a3. Delete "
                "it and build it again."
            )
        return cls(**{name: content[name] for name in names})

    def in_dtype(self, dtype: str) -> Self:
        """The same model, stored in another dtype."""
        cached = self.size["kv_bytes_per_token"] // WIDTHS[self.dtype] * WIDTHS[dtype]
        return replace(self, dtype=dtype, size=self.size | {"kv_bytes_per_token": cached})

    def has_rope(self, layer: int) -> bool:
        """Whether q and k of this layer are rotated."""
        return self.rope_layout is not None and layer not in self.nope_layers

    def solves(self, component: str, layer: int) -> bool:
        """Whether a component of a layer can be compressed."""
        return layer not in self.fixed[component]

    def drops_pairs(self, layer: int) -> bool:
        """Whether RoPE pairs of a layer can be dropped."""
        return self.solves("qk", layer) and self.has_rope(layer)

    def keeps_attention(self, layer: int) -> bool:
        """Whether the attention module of a layer is left as it is, whatever the plan."""
        return not (self.solves("qk", layer) or self.solves("ov", layer))

    @property
    def routes(self) -> bool:
        """Whether it is known which tensor routes tokens to experts."""
        return "router" in self.adapter.modules

    @property
    def runs_own_attention(self) -> bool:
        """Whether compressed models run the family's own attention code."""
        return self.adapter.own(vars(self)) is not None

    def require_every_layer(self, what: str) -> None:
        """Raise A3Error, for a stage that needs all components of all layers, if some stay."""
        left = [component for component, layers in self.fixed.items() if layers]
        if left:
            raise A3Error(
                f"{what}: a3 leaves {', '.join(left)} of some layers of {self.family} as they are "
                f"(a3 families), and {what} needs all of them. This model is not supported."
            )

    def require_a3_attention(self, what: str) -> None:
        """Raise A3Error if compressed models run the family's own attention code."""
        if self.runs_own_attention:
            raise A3Error(
                f"{what}: compressed models of {self.family} run its own attention code, whose "
                f"matrices {what} cannot replace. This model is not supported."
            )

    def full_rank(self, component: str) -> int:
        """The size that compression reduces: the head size or the intermediate size."""
        return self.intermediate_size if component == "mlp" else self.head_dim

    def matrix_shapes(self, component: str) -> dict[str, tuple[int, int]]:
        """(in, out) of a component's projections; fused ones count as one (the first)."""
        d, n = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if component == "qk":
            return {"q": (d, queries), "k": (d, keys)}
        if component == "ov":
            return {"v": (d, keys), "o": (queries, d)}
        fused = self.adapter.first_of_mlp
        return {together[0]: (d, n * len(together)) for together in fused} | {"down": (n, d)}

    def heads_of(self, site: str) -> int:
        """Number of heads of an activation from which statistics are taken (a3.rxx.kinds.Kind)."""
        return heads_of(site, vars(self))

    def statistic_shape(self, kind: Kind) -> tuple[int, ...]:
        """Shape of one layer's statistic of a kind."""
        return shape_of(kind, vars(self))

    def norms_output(self, component: str) -> bool:
        """Whether what OV or the MLP makes is normed before it is added to the hidden state."""
        return norms_output(vars(self), component == "mlp")

    @property
    def adapter(self) -> Family:
        """The family's adapter: where its weights are."""
        return family_of(self.family, self.structure, self.wrapper)

    def module(self, layer: int, projection: str) -> str:
        """Module of one projection, relative to the trunk."""
        return self.adapter.module(layer, projection)

    def layer_tensors(self, checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
        """All tensors of one layer by their names in the trunk, laid out as in memory."""
        return self.adapter.layer_tensors(checkpoint, layer, vars(self))


def required(field: Field) -> bool:
    """Whether a field of a dataclass has no default."""
    return field.default is MISSING


class CompressedArch(Arch):
    """What collecting statistics of projections' inputs needs to know about a compressed model.

    head_dim is the largest OV head size, intermediate_size the largest MLP size. weights_sha256 and
    size belong to the compressed model; all other fields are the dense model's.
    """

    def module(self, layer: int, projection: str) -> str:
        """As in Arch."""
        name = self.adapter.packed_name(layer, projection).removeprefix(f"{self.adapter.prefix}.")
        return name.removesuffix(".weight")

    def layer_tensors(self, checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
        """As in Arch; the files of compressed models have the names and layouts in memory."""
        names = self.adapter.names_in(checkpoint, layer)
        return {n.removeprefix(f"{self.adapter.prefix}."): checkpoint.tensor(n) for n in names}
