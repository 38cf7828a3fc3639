"""Finished layers of one statistic on disk, so that they need not be in memory together."""

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from a3.rxx.files import open_sealed, sum_hash, types_of, write, write_tensors


class Spool:
    """One file a layer, `<kind>.<layer>.safetensors`, each written atomically.

    In a folder of the caller's, the layers that are there already count as finished, so that a
    collection can go on after it was stopped; a layer that is put again is replaced. Without a
    folder, the files are in a temporary one (in TMPDIR) until `close`. They are open and have no
    name there, so that they go with the process, even if that is killed.
    """

    def __init__(self, kind: str, folder: Path | None = None) -> None:
        self.kind = kind
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory | None = None
        # Layers that have no name: files and records.
        self._open: dict[int, tuple[Any, dict[str, Any]]] = {}

    @property
    def folder(self) -> Path:
        """Where the files are; a temporary folder is made when it is first needed."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="a3.")
            self._folder = Path(self._temporary.name)
        return self._folder

    def layers(self) -> list[int]:
        """The finished layers, ascending."""
        found = self.folder.glob(f"{self.kind}.*.safetensors")
        return sorted([*self._open, *(int(path.name.split(".")[-2]) for path in found)])

    def put(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Write the stored tensors of one layer; raises A3Error if the disk is full."""
        hashes = {name: sum_hash(value) for name, value in tensors.items()}
        record = {"kind": self.kind, "layer": layer, "sums": hashes}
        write_tensors(self._path(layer), tensors, record)
        if self._temporary is not None:
            self._open[layer] = self._read(layer)
            self._path(layer).unlink()

    def save(self, path: Path, record: dict[str, Any]) -> None:
        """Write all layers to one file, a tensor at a time; `record` gets the hash of each.

        Raises A3Error if a layer's file is damaged, or if `path` cannot be written.
        """
        types: dict[str, tuple[str, list[int]]] = {}
        hashes: dict[str, str] = {}
        found: dict[str, Any] = {}
        for layer in self.layers():
            file, said = self._open.get(layer) or self._read(layer)
            types |= types_of(file)
            hashes |= said["sums"]
            found |= dict.fromkeys(said["sums"], file)
        write(path, types, record | {"sums": hashes}, lambda name: found[name].get_tensor(name))

    def close(self) -> None:
        """Remove the temporary folder."""
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = self._folder = None
            self._open = {}

    def _read(self, layer: int) -> tuple[Any, dict[str, Any]]:
        return open_sealed(self._path(layer), "Collect again.")

    def _path(self, layer: int) -> Path:
        return self.folder / f"{self.kind}.{layer}.safetensors"
