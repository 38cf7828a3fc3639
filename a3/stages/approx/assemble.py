"""Joins shards of a compressed model, each a range of layers, to one Hugging Face folder."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from a3.artifacts.card import base_of, write_card
from a3.artifacts.targets import APPROXIMATED
from a3.core.dtypes import WIDTHS
from a3.core.errors import A3Error
from a3.core.files import RECORDS, read_json, sha256, whole_folder, write_record
from a3.core.shards import LARGEST_SHARD, weight_files
from a3.models import modeling_a3
from a3.models.arch import load_arch
from a3.models.checkpoint import (
    CARD,
    Checkpoint,
    combined,
    hash_files,
    model_source,
)
from a3.models.folders import write_index
from a3.models.load import count_parameters, tensors_of_model
from a3.models.packing import bring_code, compressed_config, in_dtype, outside
from a3.models.shape import Arch
from a3.models.sizes import Ranks, sizes
from a3.models.travel import bring
from a3.solutions.modes import COMPONENTS
from a3.stages.approx.shards import Shard, read_shards


def gather(model_folder: Path, paths: list[Path], out: Path) -> None:
    """Make the Hugging Face folder `out` from all shards of a model, atomically.

    Raises A3Error as `read_shards` does, and for the shards of another model.
    """
    shards = read_shards(paths)
    require_base(load_arch(model_folder), paths[0], shards[0])
    with whole_folder(out, APPROXIMATED.seal, [model_folder, *paths]) as folder:
        near = paths[0].stat().st_dev == folder.stat().st_dev
        bring = os.link if near else shutil.copyfile
        copies = [folder / f".{i}of{len(paths)}.safetensors" for i in range(len(paths))]
        for path, copy in zip(paths, copies, strict=True):
            bring(path, copy)
        assemble(model_folder, shards, copies, folder)


def require_base(arch: Arch, path: Path, shard: Shard) -> None:
    """Raise A3Error unless the shard was made of this model."""
    found = shard.said["provenance"]["weights_sha256"]
    if found != arch.weights_sha256:
        raise A3Error(
            f"{path}: made of a model whose weights_sha256 is {found}, this one's is "
            f"{arch.weights_sha256}. Name that model's folder, or make the shards again."
        )


def file_numbers(arch: Arch) -> list[str]:
    """The shards that become the files of weights: of 1 GiB, or of one layer if it is larger."""
    size = arch.size["parameters"] * WIDTHS[arch.dtype]
    count = min(arch.layers, -(-size // LARGEST_SHARD))
    return [f"{i}of{count}" for i in range(count)]


def assemble_written(model_folder: Path, paths: list[Path], folder: Path) -> None:
    """Like `assemble`, for shards that were written to the folder, with their descriptions."""
    shards = read_shards(paths)
    for path in paths:
        path.with_suffix(".json").unlink()
    assemble(model_folder, shards, paths, folder)


def assemble(model_folder: Path, shards: list[Shard], paths: list[Path], folder: Path) -> None:
    """Make a Hugging Face folder of the shards whose files lie in it already."""
    arch, stored = load_arch(model_folder), shards[0].dtype
    reports = [report for shard in shards for report in shard.layers]
    seconds = [took for shard in shards for took in shard.seconds]
    ranks = [layer_ranks(arch, report) for report in reports]
    write_weights(model_folder, arch, paths, folder, stored)
    write_config(model_folder, folder, arch, ranks, reports, stored)
    names = weight_files(len(paths))
    total = sum(sum(took.values()) for took in seconds)
    write_record(folder / "timing.json", {"seconds": total, "layers": seconds})
    record = shards[0].said | {
        "base": arch.to_json(),
        "base_card": base_of(model_source(model_folder), model_folder / CARD),
        "layers": reports,
        "dtype": stored or arch.dtype,
        # Caches are counted in the dense model's dtype, so that shares are of numbers.
        "size": {
            "dense": arch.size,
            "compressed": sizes(
                arch.to_json(),
                ranks,
                count_parameters(folder),
                arch.dtype,
                [layer_factors(report) for report in reports],
                [layer_merged(report) for report in reports],
            ),
        },
    }
    hashes = dict(zip(names, (shard.content_sha256 for shard in shards), strict=False))
    # With several shards, an additional file has the tensors outside the layers.
    hashes |= {name: sha256(folder / name) for name in names if name not in hashes}
    record["weights_sha256"] = combined([hashes[name] for name in names])
    write_card(folder, record)
    write_record(folder / "approx.json", record | {"files": hash_files(folder, hashes)})


def write_weights(
    model_folder: Path, arch: Arch, paths: list[Path], folder: Path, stored: str | None
) -> None:
    """Put the shards in place; for several, also write the tensors outside layers, and an index."""
    names = weight_files(len(paths))
    for path, name in zip(paths, names, strict=False):
        path.rename(folder / name)
    if len(paths) > 1:
        checkpoint = Checkpoint(model_folder, arch.adapter.prefix)
        rest = outside(checkpoint, arch, tensors_of_model(model_folder))
        rest = in_dtype(rest, stored) if stored else rest
        save_file(dict(sorted(rest.items())), folder / names[-1], {"format": "pt"})
        write_index(folder, names)


def layer_ranks(arch: Arch, report: dict[str, Any]) -> Ranks:
    """Sizes of a layer, the dense ones where a component is not compressed, or only factored."""
    qk, ov, mlp = (
        arch.full_rank(component)
        if component not in report or "factors" in report[component]
        else report[component]["rank"]
        for component in COMPONENTS
    )
    if arch.experts:
        stay = [arch.intermediate_size] * arch.experts
        return qk, ov, report.get("mlp", {}).get("expert_ranks", stay)
    return qk, ov, mlp


def layer_merged(report: dict[str, Any]) -> list[int] | None:
    """Into which expert each of a layer's was merged; None where none was."""
    return report.get("mlp", {}).get("merged")


def layer_factors(report: dict[str, Any]) -> dict[str, int]:
    """Ranks of the factored matrices of a layer, by name."""
    return {
        name: rank for said in report.values() for name, rank in said.get("factors", {}).items()
    }


def in_products(
    tensors: dict[str, Tensor], arch: Arch, layer: int, report: dict[str, Any]
) -> dict[str, Tensor]:
    """A layer's tensors under the model's names: factors are below the name of their matrix.

    They come as if a product were a linear layer with an encoder: `q_proj.encoder.weight`,
    `q_proj.weight`, `q_proj.bias`.
    """
    linears = [
        arch.adapter.packed_name(layer, projection).removesuffix(".weight")
        for projection in layer_factors(report)
    ]

    def renamed(name: str) -> str:
        linear = next((each for each in linears if name.startswith(f"{each}.")), None)
        if linear is None:
            return name
        field = name.removeprefix(f"{linear}.")
        decoder = "" if field.startswith("encoder.") else f"{linear.rpartition('.')[2]}."
        return f"{modeling_a3.product_name(linear)}.{decoder}{field}"

    return {renamed(name): value for name, value in tensors.items()}


def write_config(
    dense: Path,
    folder: Path,
    arch: Arch,
    ranks: list[Ranks],
    reports: list[dict[str, Any]],
    stored: str | None,
) -> None:
    """Write the config, the code that loads it, and copied files: tokenizer, chat template …"""
    every = [list(range(arch.rope_dims // 2))] * arch.kv_heads
    kept = [report.get("qk", {}).get("rope_pairs", every) for report in reports]
    rotated = [pairs for layer, pairs in enumerate(kept) if arch.has_rope(layer)]
    # Attention that is left as it is takes RoPE's whole tables.
    others = any(map(arch.keeps_attention, range(arch.layers)))
    factors = [layer_factors(report) for report in reports]
    biased = any(report.get("mlp", {}).get("bias", False) for report in reports)
    config = read_json(dense / "config.json")
    counts = [len(pairs[0]) for pairs in kept]
    config = compressed_config(
        config,
        arch,
        ranks,
        counts,
        factors,
        down_bias=biased,
        same_pairs=all(pairs == rotated[0] for pairs in rotated) and not others,
        merged=[layer_merged(report) for report in reports],
    )
    if stored:
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        config["dtype"] = stored
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    bring_code(folder)
    bring(dense, folder, "config.json", CARD, *RECORDS)
