"""a3 export dense: puts a compressed model back into the dense model's shapes, with zeros.

Channels, value dimensions and RoPE pairs that were dropped are there again, with weights of zero,
so that the logits are the compressed model's, in any code that runs the dense one; nothing is
smaller. It is also a model to compress further: statistics of it say what the next step loses,
where those of the dense model, by which all of it would be dropped at once, no longer do.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from a3.artifacts.targets import IN_SHAPE
from a3.core.errors import A3Error
from a3.core.files import read_json, whole_folder
from a3.models.arch import is_compressed
from a3.models.checkpoint import Checkpoint
from a3.models.compressed import compressed_record
from a3.models.folders import write_index
from a3.models.older import older_rope
from a3.models.packing import pairs_name
from a3.models.shape import Arch
from a3.models.wrappers import held_by
from a3.stages.export.hf import finish


def export_dense(folder: Path, out: Path) -> None:
    """Write the compressed `folder` in the dense model's shapes to `out`, whole or not at all.

    Tensors keep their dtype, and names that the family's code reads. Tokenizer, chat template,
    model card and generation config are copied; export.json records the source and the hash of each
    file. Raises A3Error, with the reason, for models that have no such form: two factors, experts,
    queries or keys that are normed, and weights that the compressed folder lays out in another way.
    """
    if not is_compressed(folder):
        raise A3Error(f"{folder}: a dense model already. Name a compressed folder.")
    arch = Arch.from_json(compressed_record(folder)["base"], folder / "approx.json")
    if reason := obstacle(folder, arch):
        raise A3Error(f"{folder}: it has no form in the dense model's shapes: {reason}.")
    checkpoint = Checkpoint(folder)
    with whole_folder(out, IN_SHAPE.seal, [folder]) as made:
        places, shapes = places_of(arch), arch.adapter.shapes(vars(arch))
        for file, names in checkpoint.files().items():
            tensors: dict[str, Tensor] = {}
            for name in names.values():
                if name in places:
                    layer, projection, dense = places[name]
                    rotated = projection in "qk" and arch.has_rope(layer)
                    at = positions(checkpoint, arch, layer) if rotated else None
                    small = checkpoint.tensor(name)
                    tensors[dense] = filled(small, shapes[dense], projection, arch, at)
                elif not name.endswith(".rope_pairs"):
                    tensors[name] = checkpoint.tensor(name)
            save_file(dict(sorted(tensors.items())), made / file, {"format": "pt"})
        files = list(checkpoint.files())
        if len(files) > 1:
            write_index(made, files)
        finish(made, folder, content_of(folder, arch), checkpoint, files, __name__)


def obstacle(folder: Path, arch: Arch) -> str | None:
    """Why a compressed model cannot be put into the dense shapes; None if it can."""
    said = read_json(folder / "config.json")["a3"]
    if arch.wrapper is not None:
        return held_by(arch.wrapper)
    if arch.experts:
        return "it has experts, whose weights other code keeps together"
    if arch.qk_norm is not None:
        return "its queries and keys are normed, over all dimensions of a dense head"
    if arch.adapter.repacked or arch.runs_own_attention:
        return f"a3 does not lay out q, k, v and o as {arch.family} does"
    if arch.rope_layout is not None and arch.rope_dims != arch.head_dim:
        return f"RoPE turns {arch.rope_dims} of {arch.head_dim} dimensions of a head"
    if any(said["factors"]):
        return "some of its matrices are two factors"
    if "quantised" in said:
        return "it is quantised; name the folder that it was made of"
    if said["down_bias"] and not arch.mlp_bias:
        return "its down projections have a bias, which the family's have not"
    return None


def places_of(arch: Arch) -> dict[str, tuple[int, str, str]]:
    """Of each tensor of a component in the compressed folder: layer, projection, dense name."""
    adapter = arch.adapter
    return {
        adapter.packed_name(layer, projection, field): (
            *(layer, projection),
            adapter.name(layer, projection, field),
        )
        for layer in range(arch.layers)
        for projection in adapter.places
        for field in ("weight", "bias")
    }


def positions(checkpoint: Checkpoint, arch: Arch, layer: int) -> Tensor:
    """Where the dimensions of q's and k's heads were in a dense head, (groups, r), for a layer with
    RoPE: those of pair j at j and j + h / 2."""
    pairs = checkpoint.tensor(pairs_name(arch, layer))
    return torch.cat((pairs, pairs + arch.head_dim // 2), dim=1)


def filled(
    small: Tensor, shape: tuple[int, ...], projection: str, arch: Arch, at: Tensor | None
) -> Tensor:
    """A tensor (out, in) or (out,) of a projection in its dense shape, zeros where it was dropped.

    `at` (groups, r) are the places of the dimensions of a head; without it they come first.
    """
    W, large = small, small.new_zeros(shape)
    if projection in ("o", "down"):
        # What was dropped are their inputs; biases are whole.
        if W.ndim == 1:
            return W
        heads = arch.heads if projection == "o" else 1
        inner = W.unflatten(1, (heads, -1))
        large.unflatten(1, (heads, -1))[..., : inner.shape[2]] = inner
        return large
    heads = {"q": arch.heads, "k": arch.kv_heads, "v": arch.kv_heads}.get(projection, 1)
    rows, whole = W.unflatten(0, (heads, -1)), large.unflatten(0, (heads, -1))
    for head in range(heads):
        group = head * arch.kv_heads // heads
        whole[head, slice(rows.shape[1]) if at is None else at[group]] = rows[head]
    return large


def content_of(folder: Path, arch: Arch) -> dict[str, Any]:
    """config.json of the dense model, from the compressed one's, with RoPE's older keys."""
    content = read_json(folder / "config.json")
    dense = {key: value for key, value in content.items() if key not in ("a3", "auto_map")}
    dense |= {
        "model_type": arch.family,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[arch.family]],
    }
    return dense | older_rope(dense)
