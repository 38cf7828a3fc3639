"""A checkpoint whose layers are shards of their own, so that a killed run keeps those it solved."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from a3.artifacts.targets import APPROXIMATED
from a3.core.errors import A3Error
from a3.core.files import sha256, whole_folder
from a3.core.progress import Bar, bars
from a3.core.shards import share
from a3.models.arch import load_arch
from a3.models.checkpoint import Checkpoint
from a3.models.load import tensors_of_model
from a3.models.packing import outside
from a3.models.shape import Arch
from a3.solutions.plan import Plan
from a3.stages.approx.approximate import solve_shard, solver_for
from a3.stages.approx.assemble import assemble_written, file_numbers, require_base
from a3.stages.approx.shards import Shard, read_shard, read_shards, write_shard


def layer_paths(model_folder: Path, folder: Path) -> list[Path]:
    """The file in `folder` of each layer's shard."""
    layers = load_arch(model_folder).layers
    return [folder / f"{layer}of{layers}.safetensors" for layer in range(layers)]


def is_whole(path: Path) -> bool:
    """Whether a shard is there and has not changed since it was written."""
    try:
        return path.is_file() and sha256(path) == read_shard(path).content_sha256
    except A3Error:
        return False


def solve_missing(
    model_folder: Path,
    rxx_folder: Path,
    plan: Plan,
    paths: list[Path],
    allocation: Path | None,
    **solving: Any,
) -> None:
    """Solve layers whose shards, `paths`, are missing or damaged; otherwise as `approximate`."""
    solver = solver_for(model_folder, rxx_folder, plan, allocation, **solving)
    for path in Bar(paths, unit="layer", desc="approx"):
        for damaged in (path, path.with_suffix(".json")):
            damaged.unlink(missing_ok=True)
        with bars(False):
            solve_shard(solver, plan, path.stem, path)


def join(model_folder: Path, paths: list[Path], out: Path) -> None:
    """Make the folder `out` of the shards of all layers, with the bytes that `approximate` writes.

    Raises A3Error as `gather` does.
    """
    arch, shards = load_arch(model_folder), read_shards(paths)
    require_base(arch, paths[0], shards[0])
    arch = arch.in_dtype(shards[0].dtype or arch.dtype)
    with whole_folder(out, APPROXIMATED.seal, [model_folder, *paths]) as folder:
        written = []
        for number in file_numbers(arch):
            own = share(arch.layers, number, "layers")
            written.append(folder / f".{number}.safetensors")
            join_layers(model_folder, arch, [paths[i] for i in own], shards, number, written[-1])
        assemble_written(model_folder, written, folder)


def join_layers(
    model_folder: Path,
    arch: Arch,
    paths: list[Path],
    shards: list[Shard],
    number: str,
    out: Path,
) -> None:
    """Write one shard of several layers to `out`, of their own shards."""
    tensors: dict[str, Tensor] = {}
    if len(paths) == arch.layers:
        dense = Checkpoint(model_folder, arch.adapter.prefix)
        tensors |= outside(dense, arch, tensors_of_model(model_folder))
    for path in paths:
        tensors |= load_file(path)
    found = [shards[layer] for layer in share(arch.layers, number, "layers")]
    write_shard(
        out,
        tensors,
        number=number,
        dtype=found[0].dtype,
        said=found[0].said,
        layers=[report for shard in found for report in shard.layers],
        seconds=[took for shard in found for took in shard.seconds],
    )
