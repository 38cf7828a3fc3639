"""The Rxx container: accumulate, merge, save, load. It is independent of models.

Each kind is one statistic of one site in every layer, stored in one file. Files hold plain sums
over tokens, so two files merge by addition; dividing by `tokens` gives R. Sums are in float64,
except that of a full Σ xᵀx the triangle is packed (a3.rxx.packed).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from a3.core.errors import A3Error
from a3.core.files import SEAL, hidden_folder
from a3.core.shards import require_all
from a3.numerics.finite import require_finite
from a3.rxx.files import open_sealed, sum_hash, types_of
from a3.rxx.kinds import KINDS, TRIANGULAR_FORMS
from a3.rxx.packed import pack, square, unpack
from a3.rxx.spool import Spool
from a3.rxx.sums import Triangle

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
    if form == "peak":
        return x.abs().mean(0)
    return {"diagonal": x.square, "abs": x.abs, "mean": lambda: x}[form]().sum(0)


def expert_sum(x: Tensor, weight: Tensor, form: str) -> Tensor:
    """The kept sum over an expert's tokens: x (tokens, width), weighted, and weights (tokens,).

    The mean of x is taken by the weights: of x (= weight · h), Σ weight² h is kept. Of the form
    output x is of all tokens, and has no weights.
    """
    if form == "norm":
        return torch.linalg.vector_norm(x, dim=1).sum()
    if form == "output":
        return x.sum(0)
    return outer_sum(x * weight[:, None] if form == "mean" else x, form, 1)


def packed_keys(place: str, diagonal: Tensor) -> list[str]:
    """Names of the packed triangles of a layer: of one (diagonal (n,)), or of experts (E, n)."""
    return [place] if diagonal.dim() == 1 else [f"{place}.{i}" for i in range(len(diagonal))]


def join(one: Tensor, other: Tensor, form: str) -> Tensor:
    """Merge `other` into `one`: their sum, or the larger of two peaks."""
    return torch.maximum(one, other, out=one) if form == "peak" else one.add_(other)


class Accumulator:
    """Sums of one kind over all layers, added in float64.

    Σ xᵀx is of float32 products (a3.rxx.sums), and everything else of float64 throughout. When a
    layer's sums are complete, `finish` packs them, writes them to disk and frees their memory, so
    that only the sums of unfinished layers are in memory. The disk is the folder `spool`, where a
    later Accumulator finds the finished layers, or else a temporary folder.
    """

    def __init__(self, kind: str, heads: int, spool: Path | None = None) -> None:
        self.kind = kind
        self.form = KINDS[kind].form
        self.heads = heads
        self.tensors: dict[int, dict[str, Tensor]] = {}
        # One a layer, or one an expert.
        self.triangles: dict[int, list[Triangle]] = {}
        self.spool = Spool(kind, spool)

    @property
    def finished(self) -> list[int]:
        """The layers whose sums are complete."""
        return self.spool.layers()

    def add(self, layer: int, x: Tensor, number: int = 0) -> None:
        """Add a block's tokens: x (tokens, width), in the model's own dtype.

        A layer can have several sums Σ xᵀx, of which the first is that of `number` 0.
        """
        x = x.detach()
        if self.form in TRIANGULAR_FORMS:
            self._triangle(layer, number, x.shape[1], x.device).add(x)
        else:
            self.add_sum(layer, outer_sum(x.double(), self.form, self.heads))

    def add_sum(self, layer: int, value: Tensor) -> None:
        """Add a block's sum that was computed elsewhere, float64."""
        self._add(layer, f"layers.{layer}", value)

    def add_experts(self, layer: int, reached: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add a block's tokens of each expert, in turn: x (tokens, width), and their routing
        weights (tokens,), by which x has been multiplied already (not of `expert_sum`'s output).
        """
        sums, counts, squares = [], [], []
        for number, (x, weight) in enumerate(reached):
            if self.form in TRIANGULAR_FORMS:
                self._triangle(layer, number, x.shape[1], x.device).add(x)
            else:
                sums.append(expert_sum(x.double(), weight.double(), self.form))
            counts.append(weight.new_tensor(len(weight), dtype=torch.float64))
            squares.append(weight.double().square().sum())
        if sums:
            self._add(layer, f"layers.{layer}", torch.stack(sums))
        self._add(layer, f"layers.{layer}.counts", torch.stack(counts))
        self._add(layer, f"layers.{layer}.weights", torch.stack(squares))

    def add_stored(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Add what a file holds of a layer; of packed triangles exactly what they unpack to."""
        place = f"layers.{layer}"
        tensors = dict(tensors)
        diagonals = tensors.pop(f"{place}.diagonal", torch.empty(0, 0))
        keys = packed_keys(place, diagonals) if self.form in TRIANGULAR_FORMS else []
        for number, key in enumerate(keys):
            diagonal = diagonals.reshape(len(keys), -1)[number]
            triangle = self._triangle(layer, number, len(diagonal), diagonal.device)
            rows = unpack(diagonal, tensors.pop(key))
            for (_, _, known), (_, _, more) in zip(triangle, rows, strict=True):
                known += more
        for key, value in tensors.items():
            self._add(layer, key, value)

    def _triangle(self, layer: int, number: int, n: int, device: torch.device) -> Triangle:
        """The triangle of a layer, or of its expert of this number, which may be the next one."""
        known = self.triangles.setdefault(layer, [])
        if number == len(known):
            known.append(Triangle(n, device))
        return known[number]

    def _add(self, layer: int, key: str, value: Tensor) -> None:
        known = self.tensors.setdefault(layer, {})
        if key in known:
            join(known[key], value.to(known[key].device), self.form)
        else:
            known[key] = value

    def finish(self, layer: int) -> None:
        """Pack and write the sums of a layer, which are complete, and free their memory.

        Raises A3Error, which names the layer, if a sum is not finite.
        """
        tensors = {key: value.cpu() for key, value in self.tensors.pop(layer, {}).items()}
        if self.form in TRIANGULAR_FORMS:
            place, packed = f"layers.{layer}", [pack(one) for one in self.triangles.pop(layer)]
            # Experts' counts are among the tensors.
            several = bool(tensors) or len(packed) > 1
            diagonal = torch.stack([one for one, _ in packed]) if several else packed[0][0]
            keys = packed_keys(place, diagonal)
            tensors |= {f"{place}.diagonal": diagonal}
            tensors |= {key: one for key, (_, one) in zip(keys, packed, strict=True)}
        for key, value in tensors.items():
            require_finite_sums(value, f"statistic {self.kind!r}: tensor {key!r}")
        self.spool.put(layer, tensors)

    def save(self, path: Path, record: dict[str, Any]) -> None:
        """Write the file atomically; `record` (tokens, hashes, settings) becomes the metadata.

        Layers that are not finished are finished first. The record has the hash of each stored
        tensor, so that any damage of the file is noticed. Raises A3Error, which names the layer, if
        a sum is not finite.
        """
        for layer in sorted({*self.tensors, *self.triangles}):
            self.finish(layer)
        self.spool.save(path, {"kind": self.kind, **record})
        self.spool.close()


def require_finite_sums(value: Tensor, what: str) -> None:
    """Raise A3Error if sums hold NaN or Inf; `what` names the tensor and its file.

    Packed correlations cannot: no |S_ij| exceeds both S_ii and S_jj, so their diagonal tells.
    """
    if value.is_floating_point():
        require_finite(value, what, FINITE_SUMS)


def merge(shards: list["Rxx"], out: Path) -> None:
    """Add the sums of all shards of one collection, in order, so that the bytes are deterministic.

    One layer is in memory at a time. Packed triangles add up to the unsharded sum within the errors
    of packing (a3.rxx.packed): that of each shard, and once more that of their sum. Raises A3Error
    if a shard is missing, occurs twice, or was collected with other settings.
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
    with hidden_folder(out, {}) as folder:
        total = Accumulator(records[0]["kind"], 1, folder)
        for layer in shards[0].layers():
            for shard in shards:
                total.add_stored(layer, shard.stored(layer))
            total.finish(layer)
        total.save(out, records[0] | {"tokens": tokens, "shards": len(shards)})


class Rxx:
    """One statistics file: `R` of each layer, divided by the token count, float64.

    Raises A3Error for a damaged file, another kind than asked for, another model's statistics,
    and NaN or Inf. Each sum is checked against its hash when it is read.
    """

    def __init__(self, path: Path, kind: str, **model: str) -> None:
        """`model` has the values that the record must match: weights_sha256, config_sha256."""
        self.path = path
        absent = f"Collect {kind!r} first (a3 collect)."
        self._file, self.record = open_sealed(path, absent)
        self._types = types_of(self._file)
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
        if (kind := self.record["kind"]) not in KINDS:
            raise A3Error(
                f"{self.path}: statistic {kind!r} is not known. Kinds: {', '.join(KINDS)}."
            )
        packed = KINDS[kind].form in TRIANGULAR_FORMS
        for key, (dtype, _) in self._types.items():
            wanted = "U8" if packed and key.rpartition(".")[2].isdigit() else "F64"
            if dtype != wanted:
                raise A3Error(
                    f"{self.path}: tensor {key!r} is {dtype}, expected {wanted}. Another version "
                    "of a3 wrote it, or it is damaged: collect again."
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

    def R(  # noqa: N802
        self, layer: int, shape: tuple[int, ...], expert: int | None = None, *, normed: bool = False
    ) -> Tensor:
        """Autocorrelation E[xᵀx] of one layer (its blocks or diagonal), of the given shape.

        Of a mixture's statistics, whose shape is (E, …), only that of one `expert`, if it is given.
        The mean is over all tokens, those included that reached other experts. With `normed`, that
        of tokens as norms of outputs weigh them (a3.stages.collect.hooks).
        """
        key, form = f"layers.{layer}", KINDS[self.record["kind"]].form
        if form in TRIANGULAR_FORMS:
            n = shape[-1]
            if normed:
                self.require_normed(key)
            if expert is None and len(shape) == 2 and f"{key}.1" in self._types:
                shape, expert = (2, *shape), int(normed)
            diagonal = self._read(f"{key}.diagonal", shape[:-1])
            if expert is not None:
                key, diagonal = f"{key}.{expert}", diagonal[expert]
            return square(diagonal / self.tokens, self._read(key, (n * (n - 1) // 2, 3)))
        value = self._read(key, shape)
        value = value if expert is None else value[expert]
        return value if form == "peak" else value / self.tokens

    def require_normed(self, key: str) -> None:
        """Raise A3Error if a layer's tokens were not weighed as norms of outputs weigh them."""
        if f"{key}.1" not in self._types and not self.record.get("normed"):
            raise A3Error(
                f"{self.path}: tokens are not weighed by the norms of this model's outputs: an "
                "earlier version of a3 wrote it. Collect again: o_proj_input, down_input, "
                "attention_gradient and mlp_gradient."
            )

    def diagonal(self, layer: int, shape: tuple[int, ...]) -> Tensor:
        """The diagonals of `R`, of a kind that is full or diagonal: shape (…, n) or (…, n, n)."""
        if KINDS[self.record["kind"]].form in TRIANGULAR_FORMS:
            return self._read(f"layers.{layer}.diagonal", shape[:-1]) / self.tokens
        return self.R(layer, shape)

    def counts(self, layer: int, experts: int) -> Tensor:
        """How many tokens reached each expert, (E,)."""
        return self._read(f"layers.{layer}.counts", (experts,))

    def routed(self, layer: int, experts: int) -> Tensor:
        """Sums of squared routing weights over the tokens of each expert, (E,)."""
        return self._read(f"layers.{layer}.weights", (experts,))

    def names(self) -> list[str]:
        """Names of all stored tensors."""
        return list(self._types)

    def layers(self) -> list[int]:
        """Numbers of all layers."""
        return sorted({int(name.split(".")[1]) for name in self.names()})

    def shapes(self) -> dict[str, list[int]]:
        """Shape of each stored tensor, without reading it."""
        return {key: shape for key, (_, shape) in self._types.items()}

    def stored(self, layer: int) -> dict[str, Tensor]:
        """The stored tensors of one layer by name; raises A3Error if one is damaged."""
        return {key: self.sums(key) for key in self.names() if int(key.split(".")[1]) == layer}

    def sums(self, key: str) -> Tensor:
        """One tensor as it was written; raises A3Error if it is missing or damaged."""
        if key not in self.record["sums"]:
            raise A3Error(f"{self.path}: no tensor {key!r}. Collect again.")
        value = self._file.get_tensor(key)
        if sum_hash(value) != self.record["sums"][key]:
            raise A3Error(
                f"{self.path}: tensor {key!r} changed since it was written: damaged. Collect again."
            )
        require_finite_sums(value, f"{self.path}: tensor {key!r}")
        return value

    def _read(self, key: str, shape: tuple[int, ...]) -> Tensor:
        value = self.sums(key)
        if tuple(value.shape) != shape:
            raise A3Error(
                f"{self.path}: tensor {key!r} is {tuple(value.shape)}, expected {shape}. Collect "
                "again."
            )
        return value
