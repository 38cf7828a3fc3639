"""Files of a model folder: what travels with the weights, and the index of shards."""

from collections.abc import Iterable
from pathlib import Path

from a3.core.files import write_json
from a3.models.checkpoint import Checkpoint


def write_index(folder: Path, names: Iterable[str]) -> None:
    """The index by which transformers finds the tensors of several files."""
    handles = {name: Checkpoint.open(folder / name) for name in names}
    where = {key: name for name, handle in handles.items() for key in handle.keys()}  # noqa: SIM118
    size = sum((folder / name).stat().st_size for name in handles)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    write_json(folder / "model.safetensors.index.json", index)
