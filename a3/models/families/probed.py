"""Families without an adapter of their own: all that is particular is data, which a probe found."""

import json
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from a3.core.errors import A3Error
from a3.models.built import rope_widths
from a3.models.checkpoint import Checkpoint
from a3.models.families.measure import measured
from a3.models.family import Family
from a3.models.sizes import component_of


class Probed(Family):
    """Found by a probe: see `structure` in arch.json.

    `structure` (a3.models.probe.find) has the class attributes of `Family` by name, and: `own`,
    whether attention stays the family's own code; `interleave`, whether fused q, k, v alternate;
    `fixed`, `nope_layers` and `norm_eps` as in `Arch`; `gains`, whether norms have any;
    `experts_module` in a layer; `stacked`, whether a file has all experts of a layer in one tensor,
    (E, out, in), or (E, in, out) where `turned`, and whether gate's and up's outputs are
    `alternating` in it; `rope_share`, how much of a head RoPE rotates.
    """

    structure: ClassVar[dict[str, Any]] = {}

    # --- what the model says ---

    def describe(self, config: PreTrainedConfig, model: PreTrainedModel) -> dict[str, Any]:
        """As in Family, from the modules of `model` and the structure alone."""
        said, text = self.structure, config.get_text_config()
        layers = model.base_model.get_submodule(self.layer_path)
        assert isinstance(layers, nn.ModuleList), "a probe finds lists of layers only"
        sizes, layout = measured(layers, said, text), said["rope_layout"]
        rotated = round(said["rope_share"] * sizes["head_dim"]) if layout else 0
        if rotated and rotated not in rope_widths(self.body(model)):
            raise A3Error(
                f"config.json: RoPE tables have the widths {sorted(rope_widths(self.body(model)))},"
                f" and a probe's heads of {sizes['head_dim']} rotate {rotated} dimensions. This "
                "model is not supported."
            )
        grouped = "gqa" if sizes["kv_heads"] < sizes["heads"] else "mha"
        return {
            "family": config.model_type,
            "attention": f"{grouped}-rope" if layout else grouped,
            "mlp": "3-layer" if "gate" in self.places else "2-layer",
            "mlp_inputs": len(self.first_of_mlp),
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
            **sizes,
            "qk_norm": said["qk_norm"],
            "norm_eps": said["norm_eps"],
            "rope_layout": layout,
            "rope_dims": rotated,
            "nope_layers": said["nope_layers"],
            "fixed": said["fixed"],
            "structure": said,
            "rest": self.rest(model, sizes),
        }

    def rest(self, model: PreTrainedModel, sizes: dict[str, Any]) -> list[dict[str, int]]:
        """What each layer has besides its components (`Arch.rest`)."""
        fixed = self.structure["fixed"]
        active = sizes["experts_per_token"] / sizes["experts"] if sizes["experts"] else 1.0
        stay = [n for n in fixed["qk"] if n in fixed["ov"]]
        cached = (
            cached_numbers(self.body(model), sizes["layers"]) if stay else [0] * sizes["layers"]
        )
        found = []
        for number in range(sizes["layers"]):
            solved = {c for c, layers in fixed.items() if number not in layers}
            names = {self.module(number, p) for p in self.projections if component_of(p) in solved}
            where = f"{self.layer_path}.{number}"
            experts = f"{where}.{self.structure['experts_module']}." if self.experts else "-"
            weights = 0.0
            for name, module in model.base_model.get_submodule(where).named_modules(prefix=where):
                if name in names or (f"{name}.".startswith(experts) and "mlp" in solved):
                    continue
                share = active if f"{name}.".startswith(experts) else 1.0
                own = module.named_parameters(recurse=False)
                weights += share * sum(value.numel() for _, value in own if value.ndim > 1)
            router = sizes["experts"] * model.config.get_text_config().hidden_size
            weights -= router if self.experts and "mlp" in solved else 0
            found.append({"weights": max(0, round(weights)), "cached": cached[number]})
        return [
            one | {"cached": one["cached"] if number in stay else 0}
            for number, one in enumerate(found)
        ]

    def own(self, fields: dict[str, Any]) -> dict[str, Any] | None:
        """As in Family."""
        if not self.structure["own"]:
            return None
        where = f"{self.modules['attention']}."
        layer = f"{self.prefix}.{self.layer_path}.{{}}."
        return {
            "projections": {p: layer + self.projections[p] for p in "qkvo"},
            "norms": {p: where + name for p, name in self.norms.items()} if self.qk_norm else {},
            "head_dim": fields["head_dim"],
            "hidden_size": fields["hidden_size"],
            "rope_dims": fields["rope_dims"],
            "rope_layout": fields["rope_layout"],
            "interleaved": self.structure["interleave"],
            "heads_first": self.norm_heads_first,
            "norm_eps": fields["norm_eps"],
        }

    def mixture(self, config: PreTrainedConfig) -> dict[str, int]:
        """As in Family; a config alone does not say how many there are."""
        return {"experts": 0, "experts_per_token": 0}

    def interleaved(self, fields: dict[str, Any]) -> bool:
        """As in Family."""
        return self.structure["interleave"]

    # --- names ---

    @property
    def modules(self) -> dict[str, str]:
        """As in Family."""
        layer = f"{self.prefix}.{self.layer_path}.{{}}"
        mlp = {p: f"{layer}.{name}" for p, name in self.projections.items() if p not in "qkvo"}
        experts = {"experts": f"{layer}.{self.structure['experts_module']}"} if self.experts else {}
        attention = {"attention": f"{layer}.{self.attention_name}"} if self.attention_name else {}
        return attention | mlp | experts

    def name(
        self, layer: int, projection: str, field: str = "weight", expert: int | None = None
    ) -> str:
        """As in Family; a tensor of all experts is no module."""
        name = super().name(layer, projection, field, expert)
        stacked = expert is not None and self.structure["stacked"]
        return name.removesuffix(f".{field}") if stacked else name

    def packed_name(
        self, layer: int, projection: str, field: str = "weight", expert: int | None = None
    ) -> str:
        """As in Family; where attention is the family's own code, it keeps its names."""
        if self.structure["own"] and projection in "qkvo":
            return self.name(layer, projection, field)
        return super().packed_name(layer, projection, field, expert)

    def packed_norm_name(self, layer: int, projection: str) -> str:
        """As in Family."""
        if self.structure["own"]:
            return self.norm_name(layer, projection)
        return super().packed_norm_name(layer, projection)

    # --- weights ---

    def shapes(self, fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """As in Family, of the layers in which a component can be compressed."""
        names = {
            self.name(layer, projection, field, expert)
            for layer in range(fields["layers"])
            for projection in self.places
            if layer not in fields["fixed"][component_of(projection)]
            for field in ("weight", "bias")
            for expert in self.copies(projection, fields)
        }
        fields = fields | ({"mlp_bias": False} if self.experts else {})
        found = {name: shape for name, shape in super().shapes(fields).items() if name in names}
        if self.experts and self.structure["stacked"]:
            count, d, n = fields["experts"], fields["hidden_size"], fields["intermediate_size"]
            for layer in range(fields["layers"]):
                for together, rows, columns in ((["down"], d, n), (self.fused("up"), n, d)):
                    shape = (len(together) * rows, columns)
                    shape = shape[::-1] if self.structure["turned"] else shape
                    for projection in together:
                        name = self.name(layer, projection, "weight", 0)
                        if name in found:
                            found[name] = (count, *shape)
        return found

    def gains(self, checkpoint: Checkpoint, layer: int, projection: str) -> Tensor | None:
        """As in Family."""
        if not self.structure["gains"]:
            return None
        return super().gains(checkpoint, layer, projection)

    def _rows(
        self,
        checkpoint: Checkpoint,
        layer: int,
        projection: str,
        fields: dict[str, Any],
        expert: int | None = None,
    ) -> Tensor:
        """As in Family; of stacked experts, one."""
        if expert is None or not self.structure["stacked"]:
            return super()._rows(checkpoint, layer, projection, fields, expert)
        name = self.name(layer, projection, "weight", expert)
        W = checkpoint.tensor(name)[expert]
        W = W.T if self.structure["turned"] else W
        if projection != "down" and fields["mlp_bias"]:
            W = torch.cat((W, checkpoint.tensor(f"{name}_bias")[expert][:, None]), dim=1)
        if projection != "down" and self.structure["alternating"]:
            return W[("gate", "up").index(projection) :: 2].T
        return self.unfuse(W, projection, fields).T

    def layer_tensors(
        self, checkpoint: Checkpoint, layer: int, fields: dict[str, Any]
    ) -> dict[str, Tensor]:
        """As in Family."""
        if self.has_stored_experts(checkpoint, layer):
            return super().layer_tensors(checkpoint, layer, fields)
        return {
            name.removeprefix(f"{self.prefix}."): checkpoint.tensor(name)
            for name in self.names_in(checkpoint, layer)
        }

    def has_stored_experts(self, checkpoint: Checkpoint, layer: int) -> bool:
        """Whether files have each expert of a layer, and memory all of them in one."""
        stacked = not self.experts or self.structure["stacked"]
        return not stacked and self.name(layer, "down", "weight", 0) in checkpoint.names()


def cached_numbers(body: nn.Module, layers: int) -> list[int]:
    """Numbers that each layer caches per token, as its own code does; 0 where it has no keys.

    `body` is the model without a head, and may be without weights.
    """
    device, tokens = next(body.parameters()).device, 4
    ids = torch.ones((1, tokens), dtype=torch.long, device=device)
    with torch.device(device), torch.no_grad():
        cache = getattr(body(ids, use_cache=True), "past_key_values", None)
    found = [0] * layers
    for number, one in enumerate(getattr(cache, "layers", [])[:layers]):
        kept = [getattr(one, name, None) for name in ("keys", "values")]
        found[number] = sum(x.numel() // tokens for x in kept if isinstance(x, torch.Tensor))
    return found


@cache
def _family(content: str) -> Family:
    said = json.loads(content)
    # Projections that share a matrix are fused in this order.
    order = [p for p in ("q", "k", "v", "o", "gate", "up", "down") if p in said["projections"]]
    said |= {"projections": {p: said["projections"][p] for p in order}}
    own = {name: said[name] for name in ATTRIBUTES}
    return type("Probed", (Probed,), own | {"structure": said, "__doc__": Probed.__doc__})()


def probed(structure: dict[str, Any]) -> Family:
    """The adapter that a structure describes."""
    return _family(json.dumps(structure, sort_keys=True))


# What `structure` has of `Family`'s own attributes.
ATTRIBUTES = (
    *("prefix", "layer_path", "attention_name", "projections", "experts", "transposed"),
    *("rope_layout", "qk_norm", "gain_offset", "norm_heads_first", "norms", "positions"),
)
