"""Lazy reading of a Hugging Face folder's safetensors, whole or sharded."""

import hashlib
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from a3.core.errors import A3Error
from a3.core.files import RECORDS, read_json, read_record, sha256
from a3.models.inputs import files_of
from a3.models.readable import DTYPES, INDEX, require_readable, shards
from a3.models.stored import in_memory

# The model card.
CARD = "README.md"

# Files that transformers reads from a folder besides config and weights, if they exist.
READ = (
    *("generation_config.json", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.*", "vocab.*", "merges.txt", "spiece.model"),
)

# What `require_finite` expects of a checkpoint's tensors.
FINITE_WEIGHTS = "finite weights. The checkpoint is damaged: fetch it again."

CHANGED = f"Build the folder again; if it is meant, delete {' or '.join(RECORDS)} in it."

# Prefixes that wrappers add to tensor names, and how to save without them.
PREFIXES = {
    "base_model.model.": "peft: save what merge_and_unload() returns",
    "module.": "DataParallel, DeepSpeed: save model.module",
    "_orig_mod.": "torch.compile: save model._orig_mod",
    "language_model.": "of a model of several modalities: save its language model alone",
}


class Checkpoint:
    """Tensors of one folder by name; a tensor is read from disk only when it is requested.

    Names and values are those in memory, where files have others (a3.models.stored). Tensor names
    of checkpoints that were saved from a bare trunk lack the trunk's name; `prefix` ("transformer")
    adds it. If a stage wrote the folder, its small files are checked against the record at once,
    and a file of weights when its first tensor is read. Raises A3Error like `require_readable`, if
    the folder has no safetensors, and if a file is missing, damaged or changed.
    """

    def __init__(self, folder: Path, prefix: str | None = None) -> None:
        self.folder = folder
        require_readable(folder)
        self._recorded = check_small(folder)
        names = self._names()
        if self._recorded and (added := sorted(set(names) - self._recorded.keys())):
            raise A3Error(f"{folder}: its record does not name {', '.join(added)}. {CHANGED}")
        self._files = {name: self.open(folder / name) for name in names}
        # By key in the files.
        self._file = {key: file for file, handle in self._files.items() for key in handle.keys()}  # noqa: SIM118
        memory = in_memory(folder, tuple(self._file))
        bare = prefix is not None and not any(
            name.startswith(f"{prefix}.") for name in memory.names.values()
        )

        def whole(name: str) -> str:
            return f"{prefix}.{name}" if bare and not name.startswith("lm_head.") else name

        # By name: the keys in the files, more than one where memory has one tensor for several.
        self._keys: dict[str, list[str]] = {}
        for key, name in memory.names.items():
            self._keys.setdefault(whole(name), []).append(key)
        self._joined = {whole(name): joined for name, joined in memory.joined.items()}
        for name in self._keys.keys() - self._joined:
            self.require_one(name)

    def require_one(self, name: str) -> None:
        """Raise A3Error if several stored tensors have the same name in memory."""
        if len(self._keys[name]) > 1:
            raise A3Error(
                f"{self.folder}: {' and '.join(self._keys[name])} are both {name!r} in memory; "
                "expected one of them. Fetch or build it again."
            )

    def _names(self) -> list[str]:
        if (self.folder / "model.safetensors").exists():
            return ["model.safetensors"]
        index = self.folder / INDEX
        if index.exists():
            return shards(index)
        raise A3Error(
            f"{self.folder}: no model.safetensors and no index of shards; a3 reads no other "
            "weights. Name a Hugging Face folder that has them."
        )

    @staticmethod
    def open(path: Path) -> safe_open:
        """One safetensors file; raises A3Error if it is truncated or damaged."""
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise A3Error(
                f"{path}: truncated or damaged ({error}). Fetch or build it again."
            ) from error

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._keys)

    def files(self) -> dict[str, dict[str, str]]:
        """For each file its tensors: their keys in the file, and their names."""
        found: dict[str, dict[str, str]] = {file: {} for file in self._files}
        for name, keys in self._keys.items():
            for key in keys:
                found[self._file[key]][key] = name
        return found

    def names_in(self, file: str) -> list[str]:
        """Tensor names of one file."""
        return [name for name in self.names() if self._file[self._keys[name][0]] == file]

    def tensor(self, name: str) -> Tensor:
        """One tensor, in its stored dtype."""
        self.require(name)
        stored = {key: self._stored(key) for key in self._keys[name]}
        if name in self._joined:
            return self._joined[name].join(name, stored)
        (value,) = stored.values()
        return value

    def _stored(self, key: str) -> Tensor:
        """One tensor as it is in its file."""
        self.verify(self._file[key])
        return self._files[self._file[key]].get_tensor(key)

    def verify(self, name: str) -> None:
        """Raise A3Error if a file differs from the folder's record; each file is checked once."""
        if name in self._recorded:
            check_file(self.folder / name, self._recorded[name], CHANGED)
            del self._recorded[name]

    def verify_all(self) -> None:
        """Check every recorded file against its hash, before other code reads the folder."""
        for name in list(self._recorded):
            self.verify(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it; raises A3Error if there is none."""
        self.require(name)
        shapes = {
            key: tuple(self._files[self._file[key]].get_slice(key).get_shape())
            for key in self._keys[name]
        }
        if name not in self._joined:
            return shapes[self._keys[name][0]]
        empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        return tuple(self._joined[name].join(name, empty).shape)

    def require(self, name: str) -> None:
        """Raise A3Error if there is no tensor of this name."""
        if name not in self._keys:
            raise A3Error(
                f"{self.folder}: no tensor {name!r} in its safetensors{self.instead(name)}"
            )

    def instead(self, name: str) -> str:
        """The end of an error message about a missing tensor: what exists, and what to do."""
        stored = [key for keys in self.files().values() for key in keys]
        words = name.split(".")
        ends = [".".join(words[skipped:]) for skipped in range(len(words) - 1)]
        for end in ends:
            found = [key.removesuffix(end) for key in stored if f".{key}".endswith(f".{end}")]
            there, meant = min(found, key=len, default=""), name.removesuffix(end)
            # A similar name in another layer is not another name of this tensor.
            if found and not re.search(r"\d", there + meant):
                how = next((how for sign, how in PREFIXES.items() if sign in there), "rename them")
                return (
                    f", but {there + end!r}: its names begin with {there!r} in place of {meant!r} "
                    f"({how})."
                )
        listed = f"{', '.join(sorted(stored)[:3])}{' …' if len(stored) > 3 else ''}"
        return (
            f". There are {len(stored)} others: {listed}. Fetch or build it again: the checkpoint "
            "is not whole, or its config.json is another's."
        )

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
                f"{self.folder}: tensor {name!r} is {found}; expected one of "
                f"{', '.join(DTYPES.values())}. Fetch or build the model again."
            )
        return DTYPES[found]

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, even if their stored dtypes differ."""
        if self.shape(name) != self.shape(other):
            return False
        one, two = self.tensor(name), self.tensor(other)
        wide = torch.promote_types(one.dtype, two.dtype)
        return torch.equal(one.to(wide), two.to(wide))

    def _stored_dtype(self, name: str) -> str:
        key = self._keys[name][0]
        return self._files[self._file[key]].get_slice(key).get_dtype()

    def sha256(self) -> str:
        """Content hash of the weights: that of a single file, or of the shards' hashes in order."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        return combined([sha256(self.folder / name) for name in self._files])


def combined(hashes: list[str]) -> str:
    """Content hash of weights: the hash of a single file, or of all files' hashes in order."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def hash_files(folder: Path, known: dict[str, str] | None = None) -> dict[str, str]:
    """Hash of each file of a folder except records and timings, for the folder's record.

    Files whose hash is `known` are not read.
    """
    known = known or {}
    paths = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    return {
        name: known[name] if name in known else sha256(path)
        for name, path in paths.items()
        if name not in (*RECORDS, "timing.json") and not path.name.startswith(".")
    }


def recorded_files(folder: Path) -> dict[str, str]:
    """Hash of each file from the folder's record; empty if there is no record."""
    for name in RECORDS:
        if (folder / name).exists():
            record = read_record(folder / name)
            if not isinstance(record.get("files"), dict):
                raise A3Error(f"{folder / name}: no files in it. Delete it and build it again.")
            return record["files"]
    return {}


def check_small(folder: Path) -> dict[str, str]:
    """Check all files except weights against the folder's record; return its hashes.

    Raises A3Error if a file has changed.
    """
    recorded = recorded_files(folder)
    for name, expected in recorded.items():
        if not name.endswith(".safetensors"):
            check_file(folder / name, expected, CHANGED)
    refuse_added(folder, recorded)
    return recorded


def refuse_added(folder: Path, recorded: dict[str, str]) -> None:
    """Raise A3Error if a file that transformers reads was added to a recorded folder later."""
    found = {path.name for pattern in READ for path in folder.glob(pattern)} if recorded else set()
    if added := sorted(found - recorded.keys()):
        raise A3Error(f"{folder}: its record does not name {', '.join(added)}. {CHANGED}")


def check_file(path: Path, expected: str, what_to_do: str) -> None:
    """Raise A3Error if a file is missing or its hash differs."""
    if not path.is_file():
        raise A3Error(f"{path}: no such file, but its record is there. {what_to_do}")
    if (found := sha256(path)) != expected:
        raise A3Error(
            f"{path}: changed since it was written: its sha256 is {found}, its record says "
            f"{expected}. {what_to_do}"
        )


def model_source(folder: Path) -> dict[str, Any] | None:
    """A model's origin (source, revision), which is copied along with it; None if unknown."""
    path = folder / "source.json"
    return read_json(path) if path.exists() else None


def front_matter(card: Path) -> dict[str, Any]:
    """The metadata of a model card; none if there is no card, or what it has is damaged."""
    if not card.is_file():
        return {}
    found = re.match(r"---\r?\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
    try:
        said = yaml.safe_load(found[1]) if found else None
    # An impossible date raises ValueError.
    except (yaml.YAMLError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}
