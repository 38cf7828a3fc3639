"""Opens the statistics that a stage reads, checks that they match the model, and records them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from a3.models.arch import model_hashes
from a3.models.checkpoint import model_source
from a3.models.shape import Arch
from a3.rxx.container import Rxx


def read_statistics(
    folder: Path, kinds: Iterable[str], model_folder: Path, arch: Arch
) -> dict[str, Rxx]:
    """Open `<kind>.safetensors` in `folder` for each of the kinds.

    Raises A3Error as `Rxx` does, also if one was collected from another model.
    """
    model = model_hashes(model_folder, arch)
    return {kind: Rxx(folder / f"{kind}.safetensors", kind, **model) for kind in kinds}


def made_from(model_folder: Path, arch: Arch, statistics: dict[str, Rxx]) -> dict[str, Any]:
    """The inputs for a record: the model's hashes and source, and the statistics."""
    return {
        **model_hashes(model_folder, arch),
        "model": model_source(model_folder),
        "statistics": {kind: rxx.summary for kind, rxx in statistics.items()},
    }
