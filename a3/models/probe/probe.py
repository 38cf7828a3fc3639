"""Probes a model type: proposes what its modules are, and believes what a trial confirms."""

import re
import tempfile
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from a3.core.errors import A3Error
from a3.models.built import position_key, rope_widths
from a3.models.checkpoint import Checkpoint
from a3.models.experts_a3 import first_of
from a3.models.families.measure import Attention, attention_sizes
from a3.models.families.probed import cached_numbers
from a3.models.probe.find import (
    NOTHING,
    attention_in,
    experts_in,
    layer_list,
    majority,
    merged,
    mlp_in,
    norm_kind,
    shared_weights,
)
from a3.models.probe.tiny import tiny_config, tiny_content, tiny_model
from a3.models.probe.trial import Trial, decoded, difference, has_usual_cache, logits, norms_outputs
from a3.models.quiet import quiet
from a3.models.wrappers import WRAPPERS, text_of, wrapper_of

COMPONENTS = ("qk", "ov", "mlp")


@dataclass
class Outcome:
    """What a probe found: a structure, or None, and why a component is not compressed."""

    structure: dict[str, Any] | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    layers: int = 0

    @property
    def parts(self) -> dict[str, str]:
        """By component: "all" layers, "3 of 4" layers, or "" for none."""
        if self.structure is None:
            return dict.fromkeys(COMPONENTS, "")
        layers = self.layers
        left = {c: layers - len(self.structure["fixed"][c]) for c in COMPONENTS}
        return {
            c: "all" if n == layers else f"{n} of {layers}" if n else "" for c, n in left.items()
        }

    @property
    def why(self) -> dict[str, str]:
        """Why a component cannot be compressed in any layer, by component."""
        return {c: self.reasons.get(c, "") for c, part in self.parts.items() if not part}


def probe(model_type: str, content: dict[str, Any] | None = None) -> Outcome:
    """Probe a type with a config's content, or with the type's own keys.

    Raises A3Error if transformers cannot build or run a tiny model of it.
    """
    # The caller's random numbers stay as they are, and tiny models load without bars.
    with torch.random.fork_rng(devices=[]), quiet(), tempfile.TemporaryDirectory() as folder:
        config, model = build(model_type, tiny_content(model_type, content))
        positions = position_key(model, config.get_text_config())
        trial = Trial(model, config, Path(folder), positions is not None)
        return Probe(model, config, trial, positions).run()


def build(model_type: str, content: dict[str, Any]) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """A tiny random model; raises A3Error if it cannot be built, or not run."""
    try:
        config = tiny_config(model_type, content)
        if config.get_text_config() is not text_of(config):
            raise ValueError("its language model is a part of it: save that alone")
        model = tiny_model(config)
        ids = torch.arange(2, 26).view(2, 12)
        one, two = logits(model, ids), logits(model, ids.index_fill(1, torch.tensor(11), 5))
        has_usual_cache(model)
        if not one.isfinite().all():
            raise ValueError("logits are not finite")
        if difference(two[:, :11], one[:, :11], "logits"):
            raise ValueError("it looks ahead: the last token changes the logits of those before")
    # The libraries raise exceptions of any type for values that they do not expect.
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise A3Error(
            f"a tiny model of type {model_type!r} cannot be built and run ({type(error).__name__}: "
            f"{text[:200]}). A probe needs one."
        ) from error
    return config, model


class Probe:
    """One tiny model, what its modules may be, and the trial that decides."""

    def __init__(
        self, model: PreTrainedModel, config: PreTrainedConfig, trial: Trial, positions: str | None
    ) -> None:
        self.model, self.config, self.trial = model, config.get_text_config(), trial
        self.positions = positions
        # In a model of several modalities, the language model is a part of the trunk.
        self.backbone = WRAPPERS.get(wrapper_of(config) or "", "")
        self.body = model.base_model.get_submodule(self.backbone)
        self.reasons: dict[str, str] = {}

    def run(self) -> Outcome:
        """The structure that the trial confirms for as many components as possible."""
        try:
            path, self.layers = layer_list(self.body, self.config)
        except A3Error as error:
            return Outcome(None, dict.fromkeys(COMPONENTS, str(error)))
        if said := shared_weights(self.layers):
            said += ": what is solved for one would change the other, and statistics are of one"
            return Outcome(None, dict.fromkeys(COMPONENTS, said))
        everywhere = list(range(len(self.layers)))
        prefix = self.model.base_model_prefix
        if not hasattr(self.model, prefix):
            said = f"its trunk is not {prefix!r}, as its class says"
            return Outcome(None, dict.fromkeys(COMPONENTS, said))
        base: dict[str, Any] = {
            "prefix": prefix,
            "layer_path": path,
            "fixed": {component: everywhere for component in COMPONENTS},
            "positions": self.positions,
            **NOTHING,
        }
        if differs := self.trial.layers_differ(base):
            return Outcome(None, dict.fromkeys(COMPONENTS, differs))
        self.found = [attention_in(layer) for layer in self.layers]
        structure = merged(base, self.mlp(base, everywhere), None)
        if attention := self.attention(structure, everywhere):
            structure = merged(structure, None, attention)
        some = any(len(fixed) < len(everywhere) for fixed in structure["fixed"].values())
        return Outcome(structure if some else None, self.reasons, len(everywhere))

    # --- MLP ---

    def mlp(self, base: dict[str, Any], everywhere: list[int]) -> dict[str, Any] | None:
        """The part of the structure that is about MLPs or experts, if the trial confirms it."""
        experts = [experts_in(layer) for layer in self.layers]
        try:
            found = self.experts(base, experts) if any(experts) else self.dense_mlp(everywhere)
        except A3Error as error:
            self.reasons["mlp"] = str(error)
            return None
        if found["fixed"]["mlp"] == everywhere:
            return found
        if said := self.trial.refutes(merged(base, found, None)):
            self.reasons["mlp"] = said
            # Where files have each expert has to be known even so.
            return found | {"fixed": {"mlp": everywhere}} if "experts" in found else None
        return found

    def dense_mlp(self, everywhere: list[int]) -> dict[str, Any]:
        """The MLPs of all layers that have the same one."""
        width, inner = self.config.hidden_size, getattr(self.config, "intermediate_size", None)
        found = [
            mlp_in(layer, attention, width, inner)
            for layer, attention in zip(self.layers, self.found, strict=True)
        ]

        def shapes(number: int) -> Any:
            names = found[number]
            if not names:
                return None
            modules = {p: self.layers[number].get_submodule(name) for p, name in names.items()}
            return names, {
                p: (tuple(m.weight.shape), m.bias is not None) for p, m in modules.items()
            }

        all_shapes = [shapes(number) for number in everywhere]
        most = majority(all_shapes)
        if most is None:
            raise A3Error("no two or three matrices of its layers make an MLP")
        names, said = most
        if len({biased for _, biased in said.values()}) != 1:
            raise A3Error("its MLP has biases in some matrices only")
        down = self.layers[all_shapes.index(most)].get_submodule(names["down"])
        return {
            "projections": names,
            "fixed": {"mlp": [n for n in everywhere if all_shapes[n] != most]},
            "transposed": isinstance(down, Conv1D),
        }

    def experts(self, base: dict[str, Any], where: list[str | None]) -> dict[str, Any]:
        """The experts of all layers that have them, as files store them."""
        number, name = next((n, name) for n, name in enumerate(where) if name is not None)
        module = self.layers[number].get_submodule(name)
        if any(other not in (None, name) for other in where):
            raise A3Error("experts have different names in different layers")
        count, d = module.down_proj.shape[0], self.config.hidden_size
        turned = module.down_proj.shape[2] == d
        n = module.down_proj.shape[1 if turned else 2]
        first = first_of(module)
        roles = ("gate", "up") if first == "gate_up_proj" else ("up",)
        fixed = [n for n, other in enumerate(where) if other is None]
        if getattr(module, first).numel() != count * len(roles) * n * d:
            shape = tuple(getattr(module, first).shape)
            self.reasons["mlp"] = (
                f"{first} of its experts is {shape}: their inputs are not {d} wide"
            )
            fixed = list(range(len(where)))
        stored = self.stored_experts(base, number, roles)
        return {
            "experts": stored
            or dict.fromkeys(roles, f"{name}.{first}") | {"down": f"{name}.down_proj"},
            "experts_module": name,
            "stacked": not stored,
            "turned": turned,
            "alternating": not getattr(module, "is_concatenated", True),
            "fixed": {"mlp": fixed},
        }

    def layer_name(self, base: dict[str, Any], number: int) -> str:
        """How names in a layer begin."""
        parts = (base["prefix"], self.backbone, base["layer_path"], str(number), "")
        return ".".join(part for part in parts if part) + "."

    def stored_experts(
        self, base: dict[str, Any], number: int, first: tuple[str, ...]
    ) -> dict[str, str]:
        """Where files have each expert's matrices, {} for its number; empty if all are in one.

        `first` are the projections that read their input.
        """
        layer = self.layer_name(base, number)
        files = Checkpoint(self.trial.folder / "dense", base["prefix"])
        names = [name.removeprefix(layer) for name in files.names() if name.startswith(layer)]
        found = [
            match for k in names if (match := re.fullmatch(r"(.*experts)\.0\.(\w+)\.weight", k))
        ]
        roles = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
        roles |= {"w1": "gate", "w3": "up", "w2": "down"}
        stored = {roles[m[2]]: f"{m[1]}.{{}}.{m[2]}" for m in found if m[2] in roles}
        wanted = (*first, "down")
        return {p: stored[p] for p in wanted} if stored.keys() == set(wanted) else {}

    # --- attention ---

    def attention(self, base: dict[str, Any], everywhere: list[int]) -> dict[str, Any] | None:
        """The part of the structure that is about attention: the first that the trial confirms.

        a3's own attention is tried before the family's, and both components before one.
        """
        try:
            if self.trial.has_cache and decoded not in self.trial.ways:
                raise A3Error("it has a cache of its own kind, with which a probe cannot compare")
            proposal = self.proposal(everywhere)
        except A3Error as error:
            self.reasons |= {"qk": str(error), "ov": str(error)}
            return None
        fixed = proposal["fixed"]
        wanted = [c for c in ("qk", "ov") if len(fixed[c]) < len(everywhere)]
        tries = [wanted, *([[one] for one in wanted] if len(wanted) > 1 else [])]
        confirmed: dict[str, Any] | None = None
        components: list[str] = []
        evidence: dict[str, list[str]] = {}
        for components in tries:
            for own, layout, interleave in self.variants(proposal, alone=len(components) == 1):
                left = {c: fixed[c] if c in components else everywhere for c in ("qk", "ov")}
                tried = proposal | {"own": own, "rope_layout": layout, "interleave": interleave}
                tried |= {"fixed": left}
                said = self.trial.refutes(merged(base, None, tried))
                if said is None:
                    confirmed = tried
                    break
                for component in components:
                    evidence.setdefault(component, []).append(said)
            if confirmed:
                break
        for component in wanted:
            if confirmed is None or component not in components:
                # Numbers say more than files that do not fit, and the last tries the most.
                told = [said for said in evidence[component] if "differ" in said]
                self.reasons.setdefault(component, (told or evidence[component])[-1])
        return confirmed

    def variants(self, proposal: dict[str, Any], alone: bool) -> Any:
        """Whose attention, which RoPE layout, and whether fused q, k and v alternate."""
        layouts = ("halves", "neighbours") if proposal["rope_layout"] else (None,)
        fused = proposal["projections"]["q"] == proposal["projections"]["k"]
        return product(
            (True,) if alone else (False, True), layouts, (False, True) if fused else (False,)
        )

    def usual(self) -> tuple[Attention, dict[str, Any], list[int], list[int]]:
        """The attention that most layers have, its sizes, those layers, and those that also have
        its norms; A3Error if no layer has one of heads.
        """
        keyed = zip(self.layers, self.found, self.cached_keys(), strict=True)
        sizes = [
            (found.module, found.projections, size)
            if keys and found and (size := attention_sizes(layer, found, self.config))
            else None
            for layer, found, keys in keyed
        ]
        most = majority(sizes)
        if most is None:
            names = [name for layer in self.layers for name, _ in layer.named_modules()]
            if any("kv_b_proj" in name for name in names):
                raise A3Error("keys and values are made from a latent, which is what is cached")
            named = [", ".join(found.projections.values()) for found in self.found if found]
            if not named:
                raise A3Error("no module of its layers has matrices for queries and keys")
            raise A3Error(f"shapes of {named[0]} are not those of heads")
        module, projections, size = most
        layers = [number for number, one in enumerate(sizes) if one == most]
        norms = {n: found.norms for n in layers if (found := self.found[n])}
        usual = majority(list(norms.values()))
        normed = [n for n in layers if norms[n] == usual]
        return Attention(module, projections, usual), size, layers, normed

    def proposal(self, everywhere: list[int]) -> dict[str, Any]:
        """What names and shapes say about attention; A3Error if that is nothing."""
        found, size, layers, normed = self.usual()
        first = self.layers[normed[0]]
        layout, nope, width = self.rotation(found.module, layers)
        norm, reason = self.norm(first, found, size)
        qk = set(everywhere) - set(normed)
        if reason:
            qk, self.reasons["qk"] = set(everywhere), reason
        elif norm["qk_norm"] and not layout:
            qk = set(everywhere)
            self.reasons["qk"] = (
                "queries and keys are normed and not rotated: scores are not of low rank"
            )
        elif norm["qk_norm"] and layout:
            qk |= set(nope)
            if width != size["head_dim"]:
                qk = set(everywhere)
                self.reasons["qk"] = "normed queries and keys are rotated in part"
        return {
            "attention_name": found.module,
            "projections": found.projections,
            "norms": found.norms if norm["qk_norm"] else {},
            "rope_layout": layout,
            "rope_share": width / size["head_dim"],
            "nope_layers": nope if layout else [],
            "transposed": size["transposed"],
            "fixed": {"qk": sorted(qk), "ov": [n for n in everywhere if n not in layers]},
            "norms_outputs": norms_outputs(self.model, first, found.projections["o"]),
            **norm,
        }

    def cached_keys(self) -> list[bool]:
        """Of which layers the cache has keys; all, if it has none where most have them.

        Recurrent layers have none, though their matrices may have the names of attention's.
        """
        layers = len(self.layers)
        counts = cached_numbers(self.body, layers) if decoded in self.trial.ways else []
        return [count > 0 for count in counts] if any(counts) else [True] * layers

    def norm(
        self, layer: nn.Module, found: Attention, size: dict[str, Any]
    ) -> tuple[dict[str, Any], str | None]:
        """The norms of q and k, and why they are none that a3 knows."""
        none = {
            "qk_norm": None,
            "gains": True,
            "gain_offset": 0.0,
            "norm_eps": None,
            "norm_heads_first": False,
        }
        if not found.norms:
            return none, None
        if found.norms.get("q") == found.norms.get("k"):
            return none, "queries and keys share a norm"
        attention = layer.get_submodule(found.module)
        kinds = {
            p: norm_kind(
                attention.get_submodule(n),
                size["heads" if p == "q" else "kv_heads"],
                size["head_dim"],
            )
            for p, n in found.norms.items()
        }
        same = len(kinds) == 2 and kinds["q"] == kinds["k"]
        if not same or kinds["q"] is None:
            return none, "queries and keys are normed otherwise than by their root mean square"
        shapes: list[tuple[int, ...]] = []
        norm = attention.get_submodule(found.norms["q"])
        handle = norm.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        logits(self.model, torch.arange(2, 13)[None])
        handle.remove()
        first = bool(shapes) and len(shapes[0]) == 4 and shapes[0][2] == 11
        return none | kinds["q"] | {"norm_heads_first": first}, None

    def rotation(self, module: str, layers: list[int]) -> tuple[str | None, list[int], int]:
        """Whether layers have RoPE at all, those without, and how many dimensions it rotates.

        Layers without RoPE give the same with other tables. Raises A3Error for tables of several
        widths, none of which the layers get.
        """
        widths = rope_widths(self.body)
        if not widths:
            return None, [], 0
        tables = {n: self.tables(self.layers[n].get_submodule(module)) for n in layers}
        nope = [number for number, (_, turns) in tables.items() if not turns]
        if len(nope) == len(layers):
            return None, [], 0
        got = {width for width, turns in tables.values() if turns and width}
        width = widths.pop() if len(widths) == 1 else got.pop() if len(got) == 1 else 0
        if not width:
            raise A3Error(f"RoPE tables of {len(widths)} widths")
        return "halves", nope, width

    def tables(self, attention: nn.Module) -> tuple[int, bool]:
        """The width of RoPE's tables that attention gets, or 0, and whether it uses them."""
        calls: list[tuple] = []
        handle = attention.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        logits(self.model, torch.arange(2, 13)[None])
        handle.remove()
        args, kwargs = calls[0]
        tables = kwargs.get("position_embeddings")
        if not isinstance(tables, tuple):
            return 0, True
        other = tuple(t.roll(1, -2) for t in tables)
        with torch.inference_mode():
            one = attention(*args, **kwargs)[0]
            two = attention(*args, **kwargs | {"position_embeddings": other})[0]
        return tables[0].shape[-1], not torch.allclose(one, two)
