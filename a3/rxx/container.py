"""The Rxx container: accumulate, merge, save, load. It is independent of models.

Each kind is one statistic of one site in every layer, stored in one file. Files hold plain float64
sums Σ xᵀx, so two files merge by addition; dividing by `tokens` gives R.
"""

import hashlib
import json
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from a3.core.errors import A3Error
from a3.core.files import SEAL, seal, unseal, whole_file
from a3.core.shards import require_all
from a3.numerics.finite import require_finite
from a3.rxx.kinds import KINDS

# What `require_finite` expects of statistics.
FINITE_SUMS = (
    "finite sums. The model overflowed on the calibration text (try --dtype float32), or the file "
    "is damaged: collect again."
)


def outer_sum(x: Tensor, form: str, heads: int) -> Tensor:
    """The kept sum over tokens: x (tokens, width) float64; `heads` is for blocks."""
    if form == "blocks":
        per_head = x.unflatten(1, (heads, -1)).movedim(1, 0)
        return per_head.mT @ per_head
    if form == "full":
        return x.T @ x
    if form == "peak":
        return x.abs().mean(0)
    return {"diagonal": x.square, "abs": x.abs, "mean": lambda: x}[form]().sum(0)


def join(one: Tensor, other: Tensor, form: str) -> Tensor:
    """Merge `other` into `one`: their sum, or the larger of two peaks."""
    return torch.maximum(one, other, out=one) if form == "peak" else one.add_(other)


class Accumulator:
    """Sums of one kind over all layers; float64 throughout, one product per block of tokens."""

    def __init__(self, kind: str, heads: int, spool: Path | None = None) -> None:
        self.kind = kind
        self.heads = heads
        self.spool = spool
        self.tensors: dict[str, Tensor] = {}

    def add(self, layer: int, x: Tensor) -> None:
        """Add a block's tokens: x (tokens, width), float64."""
        self._add(f"layers.{layer}", outer_sum(x, KINDS[self.kind].form, self.heads))

    def add_sum(self, layer: int, value: Tensor) -> None:
        """Add a block's sum that was computed elsewhere, float64."""
        self._add(f"layers.{layer}", value)

    def add_experts(self, layer: int, sums: Tensor, counts: Tensor) -> None:
        """Add a block's sums over the tokens of each expert (E, …), and their counts (E,)."""
        self._add(f"layers.{layer}", sums)
        self._add(f"layers.{layer}.counts", counts)

    def _add(self, key: str, value: Tensor) -> None:
        if key not in self.tensors:
            self.tensors[key] = value
            return
        known = self.tensors[key]
        join(known, value.to(known.device), KINDS[self.kind].form)

    def finish(self, layer: int) -> None:
        """The sums of a layer are complete: with a spool, they go to a file of their own there."""
        if self.spool is not None:
            own = {f"layers.{layer}", f"layers.{layer}.counts"} & self.tensors.keys()
            with whole_file(self.spool / f"{self.kind}.{layer}.safetensors") as temporary:
                save_file({key: self.tensors.pop(key).cpu() for key in own}, temporary)

    def save(self, path: Path, record: dict[str, Any]) -> None:
        """Write the file atomically; `record` (tokens, hashes, settings) becomes the metadata.

        Raises A3Error, which names the layer, if a sum is not finite.
        """
        if self.spool is not None:
            for file in sorted(self.spool.glob(f"{self.kind}.*.safetensors")):
                self.tensors |= load_file(file)
        save(path, self.tensors, {"kind": self.kind, **record})


def save(path: Path, sums: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write sums and their sealed record atomically; raises A3Error if a sum is not finite.

    The record has the hash of each sum, so that any damage of the file is noticed.
    """
    for key, value in sums.items():
        require_finite(value, f"{path}: tensor {key!r}", FINITE_SUMS)
    tensors = {key: value.cpu().contiguous() for key, value in sums.items()}
    hashes = {key: sum_hash(value) for key, value in tensors.items()}
    # One metadata key only: safetensors writes several in random order.
    metadata = {"a3": json.dumps(seal(record | {"sums": hashes}), sort_keys=True)}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def sum_hash(value: Tensor) -> str:
    """Hex SHA-256 of a float64 tensor's shape and bytes."""
    digest = hashlib.sha256(repr(tuple(value.shape)).encode())
    digest.update(value.contiguous().numpy())
    return digest.hexdigest()


def merge(shards: list["Rxx"], out: Path) -> None:
    """Add the sums of all shards of one collection, in order, so that the bytes are deterministic.

    Raises A3Error if a shard is missing, occurs twice, or was collected with other settings.
    """
    records = [shard.settings for shard in shards]
    for shard, record in zip(shards, records, strict=True):
        if "shard" not in record:
            raise A3Error(
                f"{shard.path}: the statistics of a whole calibration, expected those of a shard. "
                "Name the files that a3 collect --shard made."
            )
    found = [record.pop("shard") for record in records]
    require_all(found, shards[0].path, "Collect what is missing with a3 collect --shard.")
    tokens = sum(record.pop("tokens") for record in records)
    for shard, record in zip(shards, records, strict=True):
        for key in records[0].keys() | record.keys():
            if record.get(key) != records[0].get(key):
                raise A3Error(
                    f"{shard.path}: {key} is {record.get(key)!r}, in {shards[0].path} "
                    f"{records[0].get(key)!r}. Collect the older one again."
                )
        if shard.shapes() != shards[0].shapes():
            raise A3Error(
                f"{shard.path}: its sums have other names or shapes than those of "
                f"{shards[0].path}. Collect the older one again."
            )
    add = partial(join, form=KINDS[records[0]["kind"]].form)
    sums = {key: reduce(add, (one.sums(key) for one in shards)) for key in shards[0].names()}
    save(out, sums, records[0] | {"tokens": tokens, "shards": len(shards)})


class Rxx:
    """One statistics file: `R` of each layer, divided by the token count, float64.

    Raises A3Error for a damaged file, another kind than asked for, another model's statistics,
    and NaN or Inf. Each sum is checked against its hash when it is read.
    """

    def __init__(self, path: Path, kind: str, **model: str) -> None:
        """`model` has the values that the record must match: weights_sha256, config_sha256."""
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            record = json.loads(self._file.metadata()["a3"])
        except FileNotFoundError:
            raise A3Error(f"{path}: no such file. Collect {kind!r} first (a3 collect).") from None
        except (
            SafetensorError,
            OSError,
            TypeError,
            KeyError,
            ValueError,
            RecursionError,
        ) as error:
            raise A3Error(
                f"{path}: truncated, damaged or not an Rxx file ({error!r}). Collect again."
            ) from error
        self.record = unseal(record, path)
        self._check_record({"kind": kind} | model)

    def _check_record(self, expected: dict[str, str]) -> None:
        for key, value in expected.items():
            if self.record.get(key) != value:
                raise A3Error(
                    f"{self.path}: {key} is {self.record.get(key)!r}, expected {value!r}. These "
                    "statistics were made from another model or are of another kind: collect "
                    "again for this model."
                )
        tokens = self.record.get("tokens")
        if not isinstance(tokens, int) or tokens < 1:
            raise A3Error(f"{self.path}: tokens is {tokens!r}, expected 1 or more. Collect again.")
        named = sorted(self.record.get("sums", {}))
        if self.names() != named:
            raise A3Error(
                f"{self.path}: it holds the sums {self.names()}, but its record names {named}: "
                "damaged. Collect again."
            )

    @property
    def tokens(self) -> int:
        """Number of calibration tokens summed."""
        return self.record["tokens"]

    @property
    def settings(self) -> dict[str, Any]:
        """What the statistics were collected from and how: the record without hashes of sums."""
        return {key: value for key, value in self.record.items() if key not in ("sums", SEAL)}

    @property
    def summary(self) -> dict[str, Any]:
        """The settings and the record's seal, for the provenance of what reads the statistics."""
        return self.settings | {SEAL: self.record[SEAL]}

    def R(self, layer: int, shape: tuple[int, ...]) -> Tensor:  # noqa: N802
        """Autocorrelation E[xᵀx] of one layer (its blocks or diagonal), of the given shape."""
        value = self._read(f"layers.{layer}", shape)
        return value if KINDS[self.record["kind"]].form == "peak" else value / self.tokens

    def counts(self, layer: int, experts: int) -> Tensor:
        """How many tokens reached each expert, (E,)."""
        return self._read(f"layers.{layer}.counts", (experts,))

    def names(self) -> list[str]:
        """Names of all sums."""
        return sorted(self._file.keys())

    def shapes(self) -> dict[str, list[int]]:
        """Shape of each sum, without reading it."""
        return {key: self._file.get_slice(key).get_shape() for key in self.names()}

    def sums(self, key: str) -> Tensor:
        """One sum as it was written; raises A3Error if it is missing or damaged."""
        if key not in self.record["sums"]:
            raise A3Error(f"{self.path}: no tensor {key!r}. Collect again.")
        value = self._file.get_tensor(key)
        if value.dtype != torch.float64 or sum_hash(value) != self.record["sums"][key]:
            raise A3Error(
                f"{self.path}: tensor {key!r} changed since it was written: damaged. Collect again."
            )
        require_finite(value, f"{self.path}: tensor {key!r}", FINITE_SUMS)
        return value

    def _read(self, key: str, shape: tuple[int, ...]) -> Tensor:
        value = self.sums(key)
        if tuple(value.shape) != shape:
            raise A3Error(
                f"{self.path}: tensor {key!r} is {tuple(value.shape)}, expected {shape}. Collect "
                "again."
            )
        return value
