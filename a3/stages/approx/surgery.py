"""Stage surgery: W_q, W_k and W_v rebuilt from principal components, in the dense shapes.

The result is an ordinary checkpoint of the family; only the ranks are lower. It shows how
low-dimensional the weights are, and how many parameters stored factors would take.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from a3.artifacts.targets import OPERATED
from a3.core.errors import A3Error
from a3.core.files import RECORDS, whole_folder, write_record
from a3.core.progress import Bar
from a3.core.provenance import provenance
from a3.models.arch import load_arch
from a3.models.checkpoint import FINITE_WEIGHTS, Checkpoint, hash_files
from a3.models.shape import Arch
from a3.models.travel import bring
from a3.numerics.finite import require_finite
from a3.numerics.linalg import relative
from a3.rxx.kinds import KINDS
from a3.solutions.pca import PrincipalComponents, affordable, many_inputs, one_input
from a3.solutions.surgeries import METRIC, PROJECTIONS, VARIANCE, Size, find_surgery
from a3.stages.approx.statistics import made_from, read_statistics

INDEX = "model.safetensors.index.json"

# A matrix by its layer and name.
Matrix = tuple[int, str]


def surgery(model_folder: Path, rxx_folder: Path | None, mode: str, size: Size, out: Path) -> None:
    """Rebuild a model's Q, K and V and write a Hugging Face folder of its own family, atomically.

    Every set of components (of a matrix, a layer or the model) keeps as many as explain the same
    share of the variance: that of the size, or the largest share within the budget of parameters.
    Biases are unchanged. Beside the files of the dense folder it writes approx.json (components,
    errors, parameters if the factors were stored, provenance) and timing.json. Raises A3Error for a
    mode that is not known, statistics that are missing, damaged or another model's, weights that
    are not finite, and a size that leaves nothing.
    """
    start = time.perf_counter()
    table = Operation(model_folder, rxx_folder, mode)
    left = float(1 - size.share) if size.of == VARIANCE else table.left_by(size)
    rebuilt, sets = table.operate(left)
    with whole_folder(out, OPERATED.seal, [model_folder]) as folder:
        write_weights(table, rebuilt, folder)
        bring(model_folder, folder, *RECORDS)
        if (model_folder / INDEX).exists():
            shutil.copyfile(model_folder / INDEX, folder / INDEX)
        seconds = {"seconds": time.perf_counter() - start}
        write_record(folder / "timing.json", seconds)
        write_record(folder / "approx.json", table.record(size, left, sets, folder))


class Operation:
    """One model under one mode; reads a layer's matrices and metric when they are asked for."""

    def __init__(self, model_folder: Path, rxx_folder: Path | None, mode: str) -> None:
        self.arch: Arch = load_arch(model_folder)
        self.arch.require_every_layer("surgery")
        self.checkpoint = Checkpoint(model_folder, self.arch.adapter.prefix)
        self.mode = mode
        self.surgery = find_surgery(mode)
        self.fields = self.arch.to_json()
        if self.surgery.kinds and rxx_folder is None:
            raise A3Error(
                f"surgery mode {mode!r} reads {METRIC}, and no folder of statistics is named. "
                f"Collect {METRIC} (a3 collect), and name its folder with --rxx."
            )
        self.statistics = {}
        if rxx_folder is not None:
            kinds = self.surgery.kinds
            self.statistics = read_statistics(rxx_folder, kinds, model_folder, self.arch)
        self.made_from = made_from(model_folder, self.arch, self.statistics)

    @property
    def stacks(self) -> list[list[Matrix]]:
        """Groups of matrices that share components."""
        return self.surgery.stacks(self.arch.layers)

    @property
    def dense_parameters(self) -> int:
        """Numbers in Q, K and V of all layers, without biases."""
        d, adapter = self.arch.hidden_size, self.arch.adapter
        return self.arch.layers * d * sum(adapter.width(name, self.fields) for name in PROJECTIONS)

    def weight(self, layer: int, name: str) -> Tensor:
        """One matrix W (d, n), float64; raises A3Error if it is not finite."""
        tensor, rows = self.where(layer, name)
        W = tensor[rows].T.double()
        require_finite(W, f"{self.checkpoint.folder}: layer {layer}, {name}", FINITE_WEIGHTS)
        return W

    def where(self, layer: int, name: str) -> tuple[Tensor, Tensor]:
        """The tensor (out, d) that a matrix lies in, and its rows there (n,)."""
        adapter = self.arch.adapter
        tensor = self.checkpoint.tensor(adapter.name(layer, name))
        tensor = tensor.T if adapter.transposed else tensor
        return tensor, adapter.unfuse(torch.arange(len(tensor)), name, self.fields)

    def metric(self, layer: int) -> Tensor | None:
        """The metric of a layer's input (d, d), where the mode has one."""
        if not self.surgery.metric:
            return None
        return self.statistics[METRIC].R(layer, self.arch.statistic_shape(KINDS[METRIC]))

    def principal_components(self, stack: list[Matrix]) -> PrincipalComponents:
        """Those of the matrices of a stack, in its order."""
        layers = list(dict.fromkeys(layer for layer, _ in stack))
        if len(layers) == 1:
            return one_input([self.weight(*each) for each in stack], self.metric(layers[0]))
        of_layers = [[each for each in stack if each[0] == layer] for layer in layers]
        side_by_side = [
            torch.cat([self.weight(*each) for each in matrices], 1) for matrices in of_layers
        ]
        metrics = [self.metric(layer) for layer in layers] if self.surgery.metric else None
        return many_inputs(side_by_side, metrics)

    def left_by(self, size: Size) -> float:
        """The smallest unexplained share of the variance for a share of the parameters."""
        found = [forget(self.principal_components(s)) for s in Bar(self.stacks, desc="variance")]
        budget = float(size.share) * self.dense_parameters
        left = affordable(found, budget, self.surgery.mean)
        if left is None:
            raise A3Error(
                f"surgery size {size}: {budget:,.0f} parameters are not enough for one component "
                f"of {self.mode!r} in each matrix. Take a larger share."
            )
        return left

    def operate(self, left: float) -> tuple[dict[Matrix, Tensor], list[dict[str, Any]]]:
        """The rebuilt matrices W (d, n) in the model's dtype, and the report of each stack."""
        rebuilt: dict[Matrix, Tensor] = {}
        sets = []
        for stack in Bar(self.stacks, desc="surgery"):
            found = self.principal_components(stack)
            count = found.count(left)
            whole = torch.cat(found.rebuild(count), 1)
            whole = whole if self.surgery.mean else whole - found.mean
            errors = {}
            widths = [self.arch.adapter.width(name, self.fields) for _, name in stack]
            for each, new in zip(stack, whole.split(widths, 1), strict=True):
                rebuilt[each] = new.to(getattr(torch, self.arch.dtype))
                errors[each] = self.error(each, new)
            sets.append(
                {
                    "matrices": [list(each) for each in stack],
                    "principal_components": count,
                    "explained": 1 - found.left[count].item(),
                    "parameters": found.parameters(count, self.surgery.mean),
                    "relative_errors": list(errors.values()),
                }
            )
        return rebuilt, sets

    def error(self, matrix: Matrix, new: Tensor) -> float:
        """tr(ΔᵀRΔ) / tr(WᵀRW) of one rebuilt matrix, R = 1 without a metric."""
        W, R = self.weight(*matrix), self.metric(matrix[0])
        lost, whole = ((M * (M if R is None else R @ M)).sum() for M in (new - W, W))
        return relative(lost, whole).item()

    def record(
        self, size: Size, left: float, sets: list[dict[str, Any]], folder: Path
    ) -> dict[str, Any]:
        """The content of approx.json of a folder that all else is in."""
        layers: list[dict[str, Any]] = [{} for _ in range(self.arch.layers)]
        for each in sets:
            for (layer, name), error in zip(each["matrices"], each["relative_errors"], strict=True):
                keys = ("principal_components", "explained")
                said = {key: each[key] for key in keys}
                layers[layer][name] = said | {"relative_error": error}
        stored, dense = sum(each["parameters"] for each in sets), self.dense_parameters
        return {
            "mode": self.mode,
            "asked": str(size),
            "share": 1 - left,
            "base": self.fields,
            "layers": layers,
            "sets": sets,
            "size": {"dense": self.arch.size, "compressed": self.arch.size},
            "if_stored": {
                "qkv_dense": dense,
                "qkv": stored,
                "parameters": self.arch.size["parameters"] - dense + stored,
            },
            "weights_sha256": Checkpoint(folder).sha256(),
            "files": hash_files(folder),
            "provenance": provenance(__name__, **self.made_from),
        }


def forget(found: PrincipalComponents) -> PrincipalComponents:
    """A copy without the matrices, which is enough for counting."""
    return PrincipalComponents(found.energy, found.mean, found.parameters_each)


def write_weights(table: Operation, rebuilt: dict[Matrix, Tensor], folder: Path) -> None:
    """The dense folder's files of weights, one in memory at a time, with the rebuilt matrices."""
    adapter = table.arch.adapter
    for file, keys in table.checkpoint.files().items():
        tensors = {key: table.checkpoint.tensor(name) for key, name in keys.items()}
        key_of = {name: key for key, name in keys.items()}
        for (layer, name), W in rebuilt.items():
            key = key_of.get(adapter.name(layer, name))
            if key is not None:
                tensor = tensors[key].clone()
                (tensor.T if adapter.transposed else tensor)[table.where(layer, name)[1]] = W.T
                tensors[key] = tensor
        save_file(tensors, folder / file, {"format": "pt"})
