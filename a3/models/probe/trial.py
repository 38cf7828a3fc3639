"""Trials by numbers: a compressed tiny model against the dense one in the original shapes.

What a3's solutions do to a model is done here at random: RoPE pairs of queries and keys are
dropped, all else of queries, keys and values is changed to another basis and cut, channels of MLPs
are dropped and reordered. A structure is right if the compressed model then computes what the dense
one computes with zeros or products in its own shapes: at full size, cut, with a cache, with
padding, far into a text, and after saving and loading.
"""

import inspect
import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from a3.core.files import read_json
from a3.models.checkpoint import Checkpoint
from a3.models.families import family_of
from a3.models.family import AttentionWeights, MLPWeights
from a3.models.layerwise import Layerwise
from a3.models.load import auto_in
from a3.models.packing import compressed_config, outside, pairs_name, staying
from a3.models.shape import Arch
from a3.models.wrappers import text_of, wrapper_of

# Largest difference of logits, as a share of their spread; in float32.
SAME = 1e-4

# The least that a cut has to change, as a share of the logits' spread; less would show nothing.
SEEN = 2e-2

PROMPT, STEPS, PADDED = 20, 4, 3


@dataclass
class Cut:
    """One layer of a compressed model, and what it changes in the dense one."""

    solved: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    experts: list[dict[str, Tensor]] = field(default_factory=list)
    dropped: list[Tensor] = field(default_factory=list)
    pairs: Tensor | None = None
    ranks: dict[str, Any] = field(default_factory=dict)


class Trial:
    """A tiny dense model in `folder`, against which structures are tried.

    `positions`: whether it has a table of positions, which ends somewhere.
    """

    def __init__(
        self, model: PreTrainedModel, config: PreTrainedConfig, folder: Path, positions: bool
    ) -> None:
        self.model, self.config, self.folder = model, config, folder
        model.save_pretrained(folder / "dense")
        inside = model.state_dict()
        self.known = frozenset(inside) | frozenset(revert_weight_conversion(model, inside))
        accepted = inspect.signature(model.forward).parameters
        # Indexers look for positions among the tokens that are there.
        positions |= any("indexer" in name for name, _ in model.named_modules())
        self.ways = [padded] + ([far] if "position_ids" in accepted and not positions else [])
        self.has_cache = hasattr(config.get_text_config(), "use_cache")
        if self.has_cache and has_usual_cache(model):
            self.ways.append(decoded)
        torch.manual_seed(7)
        self.ids = torch.randint(2, config.get_text_config().vocab_size, (2, PROMPT + STEPS))

    def refutes(self, structure: dict[str, Any]) -> str | None:
        """Why a structure is wrong, by the first thing that differs; None if nothing does."""
        try:
            return self.compared(structure)
        # Code that is called with something that it does not expect raises anything.
        except Exception as error:
            return self.said(error)

    def said(self, error: Exception) -> str:
        """An exception in a line, without the trial's own folder."""
        text = str(error).strip().partition("\n")[0].replace(f"{self.folder}/", "")
        return f"{type(error).__name__}: {text}"[:200]

    def compared(self, structure: dict[str, Any]) -> str | None:
        """As `refutes`; exceptions of the family's code are passed on."""
        arch = self.arch(structure)
        checkpoint = Checkpoint(self.folder / "dense", arch.adapter.prefix)
        for name, shape in arch.adapter.shapes(vars(arch)).items():
            checkpoint.expect(name, shape)
        expected = logits(self.model, self.ids)
        for share in (1.0, 0.5):
            torch.manual_seed(11)
            cuts = [cut(checkpoint, arch, layer, share) for layer in range(arch.layers)]
            small = self.small(checkpoint, arch, cuts)
            dense = self.emulated(arch, cuts)
            wanted, found = logits(dense, self.ids), logits(small, self.ids)
            name = "cut to half" if share < 1 else "at full size"
            if said := difference(found, wanted, f"logits {name}"):
                return said
            if share < 1 and gap(wanted, expected) < SEEN:
                return (
                    f"a cut to half changes logits by {gap(wanted, expected):.1e} of their spread"
                )
        for how in self.ways:
            if said := difference(how(small, self.ids), how(dense, self.ids), how.__name__):
                return said
        small.save_pretrained(self.folder / "again")
        again = load(self.folder / "again")
        return difference(logits(again, self.ids), logits(small, self.ids), "saved and loaded")

    def layers_differ(self, structure: dict[str, Any]) -> str | None:
        """Why layers cannot be run one by one, as statistics are collected; None if they can."""
        try:
            model = Layerwise(deepcopy(self.model), self.arch(structure))
            block = self.ids[0]
            with model.entrance():
                model.record(block)
                hidden = model.enter(block)
            for number in range(len(model.layers)):
                with torch.no_grad():
                    hidden = model.run(number, hidden)
            if hidden.shape != (1, len(block), self.config.get_text_config().hidden_size):
                return f"a layer's output is {tuple(hidden.shape)} for {len(block)} tokens"
            with torch.no_grad():
                found = model.leave(hidden).logits
        # Code that is called with something that it does not expect raises anything.
        except Exception as error:
            return f"run layer by layer: {self.said(error)}"
        return difference(found, logits(self.model, block[None]), "run layer by layer")

    def arch(self, structure: dict[str, Any]) -> Arch:
        """The description of the tiny model by a structure."""
        wrapper = wrapper_of(self.config)
        family = family_of(self.config.model_type, structure, wrapper)
        fields = family.describe(text_of(self.config), self.model) | {"wrapper": wrapper}
        return Arch(**fields, dtype="float32", weights_sha256="", size={})

    def small(self, checkpoint: Checkpoint, arch: Arch, cuts: list[Cut]) -> PreTrainedModel:
        """The compressed model, as written to files and loaded from them."""
        tensors = outside(checkpoint, arch, self.known)
        for layer, one in enumerate(cuts):
            solved = arch.adapter.pack(layer, one.solved, vars(arch)) if one.solved else {}
            for number, expert in enumerate(one.experts):
                solved |= arch.adapter.pack(layer, expert, vars(arch), number)
            if one.pairs is not None:
                solved[pairs_name(arch, layer)] = one.pairs
            tensors |= solved | staying(checkpoint, arch, self.known, layer, solved)
        config = compressed_config(
            read_json(self.folder / "dense" / "config.json"),
            arch,
            [(one.ranks["qk"], one.ranks["ov"], one.ranks["mlp"]) for one in cuts],
            [0 if one.pairs is None else one.pairs.shape[1] for one in cuts],
            [{} for _ in cuts],
            down_bias=False,
            same_pairs=False,
        )
        folder = self.folder / "small"
        folder.mkdir(exist_ok=True)
        contiguous = {
            name: (value.float() if value.is_floating_point() else value).contiguous().clone()
            for name, value in sorted(tensors.items())
        }
        save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return load(folder)

    def emulated(self, arch: Arch, cuts: list[Cut]) -> PreTrainedModel:
        """The dense model with the cuts in its own shapes."""
        model = deepcopy(self.model)
        for layer, one in enumerate(cuts):
            for projection, W in one.dense.items():
                put(model, arch, layer, projection, W)
            if "q_gain" in one.solved and arch.solves("qk", layer):
                scale_eps(model, arch, layer, one.ranks["qk"] / arch.head_dim)
            if one.dropped and arch.experts:
                name = arch.adapter.experts_module(layer)
                down = model.get_submodule(name).down_proj.data
                down = down.mT if arch.structure and arch.structure["turned"] else down
                for number, channels in enumerate(one.dropped):
                    down[number][:, channels] = 0
        return model


def scale_eps(model: PreTrainedModel, arch: Arch, layer: int, share: float) -> None:
    """Make norms with zeros in some places equal norms of the others, except for a factor."""
    attention = model.get_submodule(arch.adapter.attention_module(layer))
    for name in arch.adapter.norms.values():
        norm = attention.get_submodule(name)
        for key in ("variance_epsilon", "eps"):
            if isinstance(getattr(norm, key, None), float):
                setattr(norm, key, getattr(norm, key) * share)


def put(model: PreTrainedModel, arch: Arch, layer: int, projection: str, W: Tensor) -> None:
    """Replace a projection of a dense model by W, (heads, d̂, h), (H, h, d) or (n, d)."""
    adapter = arch.adapter
    module = model.get_submodule(f"{adapter.prefix}.{adapter.module(layer, projection)}")
    weight = module.weight.data if isinstance(module, Conv1D) else module.weight.data.T
    W = W.to(weight.dtype)
    if projection in ("o", "down"):
        weight.copy_(W.flatten(0, -2))
        return
    outputs = sum(adapter.width(other, vars(arch)) for other in adapter.fused(projection))
    places = adapter.unfuse(torch.arange(outputs), projection, vars(arch))
    rows = W.movedim(0, 1).flatten(1)
    if arch.qkv_bias:
        module.bias.data[places] = rows[-1]
        rows = rows[:-1]
    weight[:, places] = rows


def cut(checkpoint: Checkpoint, arch: Arch, layer: int, share: float) -> Cut:
    """A layer's components in other bases and orders, with a share of their dimensions."""
    one = Cut(ranks={"qk": arch.head_dim, "ov": arch.head_dim, "mlp": arch.intermediate_size})
    if not arch.keeps_attention(layer):
        weights = arch.adapter.attention(checkpoint, layer, vars(arch))
        cut_scores(one, arch, layer, weights, share)
        cut_values(one, arch, layer, weights, share)
    if arch.experts:
        one.ranks["mlp"] = [arch.intermediate_size] * arch.experts
    if arch.solves("mlp", layer):
        cut_mlp(one, checkpoint, arch, layer, share)
    return one


def cut_scores(one: Cut, arch: Arch, layer: int, weights: AttentionWeights, share: float) -> None:
    """Keep some RoPE pairs, different ones in each group, and all else in another basis."""
    if not arch.solves("qk", layer):
        if arch.adapter.own(vars(arch)) is None:
            one.solved |= {"q": weights.q, "k": weights.k}
            if weights.q_gain is not None and weights.k_gain is not None:
                one.solved |= {"q_gain": weights.q_gain, "k_gain": weights.k_gain}
        if arch.has_rope(layer):
            one.pairs = torch.arange(arch.rope_dims // 2).expand(arch.kv_heads, -1).contiguous()
        return
    groups, shared = arch.kv_heads, arch.heads // arch.kv_heads
    half, rest = weights.rope_dims // 2, arch.head_dim - weights.rope_dims
    count, left = round(share * half), round(share * rest)
    kept = torch.stack([torch.randperm(half)[:count].sort()[0] for _ in range(groups)])
    dims = torch.cat((kept, kept + half), dim=1)
    E = torch.zeros(groups, arch.head_dim, 2 * count + left, dtype=torch.float64)
    E.scatter_(1, dims[:, None], 1.0)
    D = E.mT.clone()
    E[:, 2 * half :, 2 * count :], D[:, 2 * count :, 2 * half :] = bases(groups, rest, left)
    of_head = (E.repeat_interleave(shared, 0), D.repeat_interleave(shared, 0))
    one.solved |= {"q": weights.q @ of_head[1].mT, "k": weights.k @ E}
    if weights.q_gain is not None and weights.k_gain is not None:
        scale = (arch.head_dim / E.shape[-1]) ** 0.5
        for name, gain, basis in (("q", weights.q_gain, of_head[0]), ("k", weights.k_gain, E)):
            one.solved[f"{name}_gain"] = (gain[:, None] @ basis)[:, 0] * scale
        keeps = {"q": of_head[0].sum(-1), "k": E.sum(-1)}
        one.dense |= {p: getattr(weights, p) * keeps[p][:, None] for p in "qk"}
    else:
        one.dense["q"] = weights.q @ (of_head[0] @ of_head[1]).mT
    one.pairs = kept.contiguous() if half else None
    one.ranks["qk"] = E.shape[-1]


def bases(groups: int, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """E (G, size, rank) and its left inverse D; the columns have lengths of 0.5 to 2."""
    E = torch.linalg.qr(torch.randn(groups, size, rank, dtype=torch.float64))[0]
    lengths = 2 ** (2 * torch.rand(groups, 1, rank, dtype=torch.float64) - 1)
    return E * lengths, (E / lengths).mT


def cut_values(one: Cut, arch: Arch, layer: int, weights: AttentionWeights, share: float) -> None:
    """Values and outputs in another basis."""
    if not arch.solves("ov", layer):
        if arch.adapter.own(vars(arch)) is None:
            one.solved |= {"v": weights.v, "o": weights.o}
        return
    E, D = bases(arch.kv_heads, arch.head_dim, round(share * arch.head_dim))
    shared = arch.heads // arch.kv_heads
    one.solved["v"] = weights.v @ E
    one.solved["o"] = D.repeat_interleave(shared, 0) @ weights.o
    one.dense["o"] = (E @ D).repeat_interleave(shared, 0) @ weights.o
    one.ranks["ov"] = E.shape[-1]


def cut_mlp(one: Cut, checkpoint: Checkpoint, arch: Arch, layer: int, share: float) -> None:
    """Some channels of the MLP, or of each expert, in another order."""
    rank = round(share * arch.intermediate_size)
    for expert in range(arch.experts) if arch.experts else [None]:
        weights = arch.adapter.mlp(checkpoint, layer, vars(arch), expert)
        order = torch.randperm(arch.intermediate_size)
        solved = sliced(weights, order[:rank])
        if expert is None:
            one.solved |= solved
            one.dense["down"] = weights.down.index_fill(0, order[rank:], 0.0)
            one.ranks["mlp"] = rank
        else:
            one.experts.append(solved)
            one.dropped.append(order[rank:])
            one.ranks["mlp"][expert] = rank


def sliced(weights: MLPWeights, channels: Tensor) -> dict[str, Tensor]:
    """Some channels of an MLP, in this order."""
    found = {"up": weights.up[:, channels], "down": weights.down[channels]}
    return found if weights.gate is None else found | {"gate": weights.gate[:, channels]}


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, float32; every tensor has to be there, and none too many."""
    model, info = auto_in(folder).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        trust_remote_code=False,
    )
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if wrong:
        raise ValueError(f"the compressed files do not fit the model: {wrong}")
    return model.eval()


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the spread."""
    return ((found - expected).abs().max() / expected.std()).item()


def difference(found: Tensor, expected: Tensor, what: str) -> str | None:
    """What differs, and by how much; None if nothing does."""
    size = gap(found, expected)
    return None if size <= SAME else f"{what}: they differ by {size:.1e} of their spread"


@torch.inference_mode()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, L, V) without a cache."""
    return model(ids, **uncached(model)).logits


def norms_outputs(model: nn.Module, layer: nn.Module, projection: str) -> bool:
    """Whether twice the output of a projection leaves its layer's as it is: it is normed before it
    is added.
    """
    found: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _, __, y: found.append(y))]
    # Large, so that what a norm adds to the mean square is nothing beside it.
    for scale in (1000, 2):
        module = layer.get_submodule(projection)
        handles.append(module.register_forward_hook(lambda _, __, y, scale=scale: scale * y))
        logits(model, torch.arange(2, 13)[None])
    for handle in handles:
        handle.remove()
    # A layer may be called more than once in a pass.
    one, two = (y[0] if isinstance(y, tuple) else y for y in (found[0], found[len(found) // 2]))
    return torch.allclose(one, two, rtol=1e-3, atol=1e-4)


def uncached(model: nn.Module) -> dict[str, bool]:
    """The option for a pass without a cache, of models that have one."""
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}


@torch.inference_mode()
def has_usual_cache(model: nn.Module) -> bool:
    """Whether a model returns its cache as most do."""
    out = model(torch.arange(2, 8)[None], use_cache=True)
    return getattr(out, "past_key_values", None) is not None


@torch.inference_mode()
def decoded(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a prompt and of tokens after it, one by one, with a cache."""
    out = model(ids[:, :PROMPT], use_cache=True)
    found = [out.logits]
    for step in range(PROMPT, ids.shape[1]):
        out = model(ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, dim=1)


@torch.inference_mode()
def far(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a text that begins at position 131,072: some code does more for long texts."""
    positions = torch.arange(2**17, 2**17 + ids.shape[1]).expand(ids.shape)
    return model(ids, position_ids=positions, **uncached(model)).logits


@torch.inference_mode()
def padded(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a batch whose second row has padding on the left, without those of padding."""
    mask = torch.ones_like(ids)
    mask[1, :PADDED] = 0
    found = model(ids, attention_mask=mask, **uncached(model)).logits
    return torch.cat((found[0], found[1, PADDED:]))
