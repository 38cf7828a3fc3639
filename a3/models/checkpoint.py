"""Lazy reading of a Hugging Face folder's safetensors, whole or sharded."""

import hashlib
import math
import shlex
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from a3.errors import A3Error
from a3.files import read_json, sha256

PICKLED = "pytorch_model*.bin*"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def refuse_pickled(folder: Path) -> None:
    """Raise A3Error, with the command that converts it, where all weights are pickled."""
    if any(folder.glob("*.safetensors")) or not any(folder.glob(PICKLED)):
        return
    command = shlex.join(["a3", "convert", str(folder), "-o", f"{folder}-safetensors"])
    raise A3Error(
        f"{folder}: no .safetensors file; its weights are pickled (.bin), and reading a pickle can "
        f"run any code, so a3 does not. Convert them safely: {command}"
    )


class Checkpoint:
    """Tensors of one folder by name; a tensor is read from disk only when it is asked for.

    Checkpoints saved from a bare trunk lack its name; with `prefix` they get it ("transformer").
    Raises A3Error where the folder has no safetensors, or a file is missing or damaged.
    """

    def __init__(self, folder: Path, prefix: str | None = None) -> None:
        self.folder = folder
        self._files = {name: self.open(folder / name) for name in self._names()}
        stored = {key: file for file, handle in self._files.items() for key in handle.keys()}  # noqa: SIM118
        bare = prefix is not None and not any(key.startswith(f"{prefix}.") for key in stored)
        # Name to (file, key in the file).
        self._where = {
            f"{prefix}.{key}" if bare and not key.startswith("lm_head.") else key: (file, key)
            for key, file in stored.items()
        }

    def _names(self) -> list[str]:
        if (self.folder / "model.safetensors").exists():
            return ["model.safetensors"]
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(read_json(index)["weight_map"].values()))
            if away := [name for name in names if Path(name).name != name]:
                raise A3Error(
                    f"{index}: names {away[0]}; expected files of this folder, by their names "
                    "alone. Do not use this model."
                )
            return names
        refuse_pickled(self.folder)
        raise A3Error(
            f"{self.folder}: no model.safetensors and no index of shards; a3 reads no others. "
            "Name a Hugging Face folder that has them."
        )

    @staticmethod
    def open(path: Path) -> safe_open:
        """One safetensors file; raises A3Error where it is truncated or damaged."""
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise A3Error(
                f"{path}: truncated or damaged ({error}). Fetch or build it again."
            ) from error

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._where)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in."""
        self.shape(name)
        file, key = self._where[name]
        return self._files[file].get_tensor(key)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it; raises A3Error where there is none."""
        if name not in self._where:
            raise A3Error(f"{self.folder}: no tensor {name!r} in its safetensors.")
        file, key = self._where[name]
        return tuple(self._files[file].get_slice(key).get_shape())

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise A3Error unless tensor `name` exists and has this shape."""
        if self.shape(name) != shape:
            raise A3Error(
                f"{self.folder}: tensor {name!r} is {self.shape(name)}, config.json says {shape}."
            )

    def dtype(self, name: str) -> str:
        """Name of the tensor's dtype (float32, bfloat16 …); raises A3Error for quantised ones."""
        found = self._stored_dtype(name)
        if found not in DTYPES:
            raise A3Error(
                f"{self.folder}: tensor {name!r} is {found}; a3 compresses "
                f"{', '.join(DTYPES.values())} weights. Dequantise the model first."
            )
        return DTYPES[found]

    def parameters(self) -> int:
        """Number of stored floating-point values (a tied LM head is stored, and counted, once)."""
        return sum(
            math.prod(self.shape(name))
            for name in self.names()
            if self._stored_dtype(name) in DTYPES
        )

    def _stored_dtype(self, name: str) -> str:
        file, key = self._where[name]
        return self._files[file].get_slice(key).get_dtype()

    def sha256(self) -> str:
        """Content hash of the weights: of the one file, or of the shards' hashes in order."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        hashes = [sha256(self.folder / name) for name in self._files]
        return (
            hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        )
