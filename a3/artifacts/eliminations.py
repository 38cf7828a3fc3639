"""Files of losses by rank: what `a3 losses` writes, and allocate and approx read."""

from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor

from a3.core.errors import A3Error
from a3.core.files import SEAL
from a3.models.shape import Arch
from a3.numerics.elimination import Elimination
from a3.rxx.container import Rxx
from a3.rxx.files import open_sealed, sum_hash, write_tensors

# A component of a layer, or of a mixture's MLP the expert of a number: "qk", "mlp.7".
Unit: TypeAlias = str

AGAIN = "Compute it again with a3 losses."


def units_of(arch: Arch, component: str) -> list[Unit]:
    """What is eliminated on its own of a component of a layer: all of it, or each expert."""
    if component == "mlp" and arch.experts:
        return [unit_of(component, expert) for expert in range(arch.experts)]
    return [component]


def unit_of(component: str, expert: int | None) -> Unit:
    """The unit of a component, or of an expert."""
    return component if expert is None else f"{component}.{expert}"


def expert_of(unit: Unit) -> int | None:
    """The number of a unit's expert, if it is one's."""
    number = unit.partition(".")[2]
    return int(number) if number else None


def write_eliminations(
    path: Path, found: dict[int, dict[Unit, Elimination]], record: dict[str, Any]
) -> None:
    """Write the eliminations of some layers, by unit, and their record, atomically."""
    tensors = {
        f"layers.{layer}.{unit}.{name}": value.cpu()
        for layer, units in found.items()
        for unit, one in units.items()
        for name, value in one._asdict().items()
    }
    hashes = {key: sum_hash(value) for key, value in tensors.items()}
    write_tensors(path, tensors, record | {"tensors": hashes})


class EliminationFile:
    """One file that `a3 losses` wrote. Each tensor is checked against its hash when it is read."""

    def __init__(self, path: Path) -> None:
        """Raises A3Error if the file is missing, damaged or something else."""
        self.path = path
        absent = "Make it with a3 losses."
        self._file, self.record = open_sealed(path, absent, "a file of losses", AGAIN)
        try:
            self.layers = range(*self.record["layers"])
            self.components: dict[str, str] = self.record["modes"]
        # Sealed, so whole, but of another kind.
        except (TypeError, KeyError) as error:
            raise A3Error(f"{path}: not a file of losses ({error!r}). {AGAIN}") from error

    def require_made_of(self, arch: Arch, statistics: dict[str, Rxx]) -> None:
        """Raise A3Error if it is of another model or of other statistics than these."""
        own = {kind: one[SEAL] for kind, one in self.record["provenance"]["statistics"].items()}
        found = {"weights_sha256": self.record["weights_sha256"]} | own
        expected = {"weights_sha256": arch.weights_sha256}
        expected |= {kind: rxx.record[SEAL] for kind, rxx in statistics.items()}
        for key in found.keys() & expected.keys():
            if found[key] != expected[key]:
                raise A3Error(
                    f"{self.path}: made of {key} {found[key]!r}, expected {expected[key]!r}: of "
                    f"another model or of other statistics. {AGAIN}"
                )

    def read(self, layer: int, unit: Unit) -> Elimination:
        """One unit of a layer; raises A3Error if it is missing or has changed."""
        key = f"layers.{layer}.{unit}"
        return Elimination(*(self.tensor(f"{key}.{name}") for name in Elimination._fields))

    def tensor(self, key: str) -> Tensor:
        """One tensor; raises A3Error if it is missing or has changed."""
        try:
            value = self._file.get_tensor(key)
        except SafetensorError as error:
            raise A3Error(f"{self.path}: no tensor {key!r} ({error}). {AGAIN}") from error
        if sum_hash(value) != self.record["tensors"].get(key):
            raise A3Error(f"{self.path}: tensor {key!r} changed since it was written. {AGAIN}")
        return value

    def tensors(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self.record["tensors"])


class Eliminations:
    """The eliminations of a model in one or several files, each with some of the layers."""

    def __init__(self, paths: list[Path], arch: Arch, statistics: dict[str, Rxx]) -> None:
        """Raises A3Error if a file is damaged, or of another model or other statistics."""
        self.files = [EliminationFile(path) for path in paths]
        for one in self.files:
            one.require_made_of(arch, statistics)

    def find(self, layer: int, unit: Unit) -> Elimination | None:
        """One unit of a layer; None if no file is of its component.

        Raises A3Error if there are files of the component and none has the layer.
        """
        component = unit.partition(".")[0]
        own = [one for one in self.files if component in one.components]
        if not own:
            return None
        for one in own:
            if layer in one.layers:
                return one.read(layer, unit)
        raise A3Error(
            f"{', '.join(str(one.path) for one in own)}: layer {layer} is in none of them. Name "
            "the files of all shards that a3 losses made."
        )

    def require(self, layer: int, unit: Unit) -> Elimination:
        """One unit of a layer; raises A3Error if it is in none of the files."""
        if (found := self.find(layer, unit)) is not None:
            return found
        raise A3Error(
            f"{', '.join(str(one.path) for one in self.files)}: no losses of {unit}. Name a "
            "file that has them, or none."
        )


def of_layers(layers: range) -> list[int]:
    """A range of layers as a record has it."""
    return [layers.start, layers.stop]


def to_device(found: Elimination, device: torch.device) -> Elimination:
    """The same on a device."""
    return Elimination(*(value.to(device) for value in found))
