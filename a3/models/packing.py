"""How a compressed model's tensors are named and its config.json is written."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from a3.models import attention_a3, experts_a3, modeling_a3, own_attention_a3
from a3.models.checkpoint import FINITE_WEIGHTS, Checkpoint
from a3.models.registry import LazyConfig
from a3.models.shape import Arch
from a3.models.sizes import Ranks
from a3.models.wrappers import auto_class
from a3.numerics.finite import require_finite

# The code that travels with a compressed model.
CODE = (attention_a3, experts_a3, modeling_a3, own_attention_a3)

HELD = "numbers that it can hold. Ask for another dtype."


def outside(checkpoint: Checkpoint, arch: Arch, known: frozenset[str]) -> dict[str, Tensor]:
    """Tensors that are in no layer: embeddings, the last norm, the head."""
    names = names_to_keep(checkpoint, arch, known, None)
    return {name: copied(checkpoint, name) for name in names}


def names_to_keep(
    checkpoint: Checkpoint, arch: Arch, known: frozenset[str], layer: int | None
) -> list[str]:
    """Tensors of a layer (or outside the layers) that the model has, by `known`.

    Older checkpoints hold masks and RoPE's frequencies, too.
    """
    names = arch.adapter.names_in(checkpoint, layer)
    return [name for name in names if name in known]


def copied(checkpoint: Checkpoint, name: str) -> Tensor:
    """An unchanged tensor; raises A3Error if it is not finite."""
    value = checkpoint.tensor(name)
    require_finite(value, f"{checkpoint.folder}: tensor {name!r}", FINITE_WEIGHTS)
    return value


def staying(
    checkpoint: Checkpoint, arch: Arch, known: frozenset[str], layer: int, solved: Iterable[str]
) -> dict[str, Tensor]:
    """Tensors of a layer that are `known` and not `solved`; all RoPE pairs where none were chosen.

    Attention tensors get the compressed model's names. Repacked q, k, v, o and experts are left
    out, because they are always packed again.
    """
    renamed = new_names(arch, layer)
    names = names_to_keep(checkpoint, arch, known, layer)
    kept = {name: renamed.get(name, name) for name in names}
    tensors = {
        new: copied(checkpoint, name)
        for name, new in kept.items()
        if new is not None and new not in solved
    }
    if not arch.solves("mlp", layer) and arch.adapter.has_stored_experts(checkpoint, layer):
        # Experts that stay are stored as memory has them, all in one.
        where = arch.adapter.experts_module(layer)
        inside = arch.layer_tensors(checkpoint, layer)
        tensors |= {
            f"{arch.adapter.prefix}.{name}": value
            for name, value in inside.items()
            if f"{arch.adapter.prefix}.{name}".startswith(f"{where}.")
        }
    known_pairs = arch.keeps_attention(layer) or pairs_name(arch, layer) in solved
    if arch.has_rope(layer) and not known_pairs:
        pairs = torch.arange(arch.rope_dims // 2).expand(arch.kv_heads, -1).contiguous()
        tensors[pairs_name(arch, layer)] = pairs
    return tensors


def new_names(arch: Arch, layer: int) -> dict[str, str | None]:
    """Compressed names of a layer's projections by dense names; None for those packed again."""
    adapter = arch.adapter
    renamed: dict[str, str | None] = {}
    own = adapter.own(vars(arch)) is not None
    for projection in "" if arch.keeps_attention(layer) else "qkvo":
        if own and not arch.solves("qk" if projection in "qk" else "ov", layer):
            continue
        for field in ("weight", "bias"):
            # No solution contains the bias of o; all models store it in the same way.
            drop = adapter.repacked and (projection, field) != ("o", "bias")
            name = adapter.packed_name(layer, projection, field)
            renamed[adapter.name(layer, projection, field)] = None if drop else name
        if projection in "qk" and arch.qk_norm:
            renamed[adapter.norm_name(layer, projection)] = None
    for projection in adapter.experts:
        if arch.mlp_bias and arch.solves("mlp", layer):
            renamed[f"{adapter.name(layer, 'up', 'weight', 0)}_bias"] = None
        for expert in range(arch.experts if drops_experts(arch, layer) else 0):
            renamed[adapter.name(layer, projection, "weight", expert)] = None
    return renamed


def drops_experts(arch: Arch, layer: int) -> bool:
    """Whether the experts' tensors of a layer get other names; stacked ones that stay do not."""
    stays = not arch.solves("mlp", layer)
    return not (stays and arch.structure is not None and arch.structure["stacked"])


def compressed_config(
    dense: dict[str, Any],
    arch: Arch,
    ranks: list[Ranks],
    pairs: list[int],
    factors: list[dict[str, int]],
    *,
    down_bias: bool,
    same_pairs: bool,
    merged: Sequence[list[int] | None] = (),
) -> dict[str, Any]:
    """The content of a compressed model's config.json, from the dense one's.

    `ranks`, `pairs` (kept RoPE pairs of a head, if a layer has RoPE) and `factors` (ranks of
    factored matrices) have one item per layer. `down_bias`: the MLP's output gets a bias, even if
    the family has none. `same_pairs`: all layers with RoPE keep the same pairs. `merged`: into
    which expert each dense one was merged, per layer, None where none was.
    """
    qk_ranks, ov_ranks, mlp_ranks = map(list, zip(*ranks, strict=True))
    config = dense | {"model_type": LazyConfig.model_type}
    classes = modeling_a3.classes(arch.wrapper or arch.family)
    # Replaces references to code of the dense model, which is not copied.
    config["auto_map"] = {
        auto: f"{Path(modeling_a3.__file__).stem}.{own.__name__}" for auto, own in classes.items()
    }
    config["architectures"] = [classes[auto_class(arch.wrapper).__name__].__name__]
    config["a3"] = {
        "family": arch.family,
        "structure": arch.structure,
        "modules": arch.adapter.modules,
        "heads": arch.heads,
        "kv_heads": arch.kv_heads,
        "scaling": arch.scaling,
        "qkv_bias": arch.qkv_bias,
        "o_bias": arch.o_bias,
        "qk_norm": arch.qk_norm,
        "norm_eps": arch.norm_eps,
        "fixed": arch.fixed,
        "own": arch.adapter.own(vars(arch)),
        "rope": arch.rope_layout is not None,
        "nope_layers": arch.nope_layers,
        "same_pairs": same_pairs,
        "rope_pairs": [n if arch.has_rope(layer) else 0 for layer, n in enumerate(pairs)],
        "qk_ranks": qk_ranks,
        "ov_ranks": ov_ranks,
        "mlp_ranks": mlp_ranks,
        "factors": factors,
        "down_bias": down_bias,
    }
    if any(merged):
        config["a3"]["merged"] = list(merged)
    if arch.wrapper is not None:
        config["a3"] |= {"wrapper": arch.wrapper, "backbone": arch.adapter.backbone}
    return config


def bring_code(folder: Path) -> None:
    """Copy the code of compressed models, with which `trust_remote_code=True` runs without a3."""
    for module in CODE:
        code = Path(str(module.__file__))
        shutil.copyfile(code, folder / code.name)


def in_dtype(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Tensors with all numbers in one dtype, but for whole ones; A3Error if it cannot hold them."""
    found = dict(tensors)
    for name, value in tensors.items():
        if value.is_floating_point():
            found[name] = value.to(getattr(torch, dtype))
            require_finite(found[name], f"tensor {name!r} in {dtype}", HELD)
    return found


def pairs_name(arch: Arch, layer: int) -> str:
    """Tensor of the kept RoPE pairs of one layer."""
    return f"{arch.adapter.attention_module(layer)}.rope_pairs"
