"""Stage quantise: simulates low precision, with low-rank products that correct the errors.

It reads a dense or compressed folder and writes a compressed one. approx.json records what was done
to each matrix, and the number of bits for each weight of the dense model's matrices.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import a3.models.quantised  # noqa: F401
from a3.artifacts.targets import QUANTISED
from a3.core.dtypes import WIDTHS
from a3.core.errors import A3Error
from a3.core.files import RECORDS, hidden_folder, read_json, whole_folder, write_record
from a3.core.progress import Bar
from a3.core.provenance import provenance
from a3.models.arch import is_compressed, made_already
from a3.models.checkpoint import CARD, Checkpoint, combined, hash_files
from a3.models.compressed import (
    compressed_arch,
    compressed_record,
    dense_or_compressed,
    dtype_of,
)
from a3.models.folders import write_index
from a3.models.load import load_config
from a3.models.shape import Arch
from a3.models.sizes import projection_weights
from a3.models.travel import bring
from a3.numerics.formats import parse_format, quantise
from a3.rxx.container import Rxx
from a3.rxx.kinds import KINDS
from a3.solutions import lqer
from a3.solutions.recipes import (
    INPUTS,
    METHODS,
    check_method,
    complete_recipe,
    entry_for,
    formats_of,
    kinds_read,
)
from a3.stages.approx.approximate import repack
from a3.stages.approx.statistics import made_from, read_statistics

# Keys of the compressed model's record that also hold for the quantised model.
KEPT = ("base", "base_card", "dtype", "modes", "ranks", "layers", "healed")


def quantise_model(
    model_folder: Path,
    rxx_folder: Path,
    recipe: dict[str, Any],
    method: str,
    rank: int | None,
    out: Path,
) -> None:
    """Quantise the matrices in a recipe, correct each error by `method`, and write `out`.

    Reads `<kind>.safetensors` of the folder's own model from `rxx_folder`: for the method, and the
    full autocorrelation of each input for the reported errors. Raises A3Error for unknown formats
    and names, factored matrices, experts, statistics of another model, and a recipe that matches no
    matrix.
    """
    check_method(method, rank)
    recipe = complete_recipe(recipe)
    for spelled in formats_of(recipe):
        parse_format(spelled)
    compressed = is_compressed(model_folder)
    if compressed and "quantised" in load_config(model_folder).a3:
        raise made_already(model_folder)
    arch = dense_or_compressed(model_folder)
    if arch.experts:
        raise A3Error(f"{model_folder}: a mixture of experts, which a3 cannot quantise yet.")
    arch.require_every_layer("quantise")
    arch.require_a3_attention("quantise")
    statistics = read_statistics(rxx_folder, kinds_read(method), model_folder, arch)
    said = provenance(
        __name__,
        **made_from(model_folder, arch, statistics),
        recipe=recipe,
        method=method,
        rank=rank,
    )
    with hidden_folder(out, {"full": model_folder}) as work:
        source = model_folder
        if not compressed:
            source = work / "full"
            repack(model_folder, source)
        quantiser = Quantiser(source, statistics, recipe, method, rank)
        with whole_folder(out, QUANTISED.seal, [model_folder]) as folder:
            quantiser.write(folder, said)


class Quantiser:
    """Quantises the matrices of one compressed folder."""

    def __init__(
        self,
        folder: Path,
        statistics: dict[str, Rxx],
        recipe: dict[str, Any],
        method: str,
        rank: int | None,
    ) -> None:
        """Raises A3Error as `quantise_model` does for the recipe."""
        self.folder = folder
        self.arch = compressed_arch(folder)
        self.checkpoint = Checkpoint(folder)
        self.config = load_config(folder).a3
        # The record of the model before quantisation.
        self.source = compressed_record(folder)
        self.statistics = statistics
        self.recipe = recipe
        self.method = method
        self.rank = rank
        # Entry, projection and layer of each matrix by its module's name.
        self.found = self.find()
        # The report of each matrix, by its module's name.
        self.report: dict[str, dict[str, Any]] = {}

    def find(self) -> dict[str, tuple[dict[str, Any], str, int]]:
        """The matrices in the recipe, each once; fused ones under the first projection's name."""
        found: dict[str, tuple[dict[str, Any], str, int]] = {}
        for name, (projection, layer) in matrices(self.arch).items():
            if entry := entry_for(self.recipe, name):
                found[name] = entry, projection, layer
                if self.config["factors"][layer].get(projection) is not None:
                    raise A3Error(
                        f"{self.folder}: {name} is a factored matrix, and those are not "
                        "quantised. Take a model whose heads and MLP were made smaller."
                    )
                self.require_smaller(name, entry)
        if not found:
            raise A3Error(
                f"recipe: none of its expressions is a whole name such as "
                f"{next(iter(matrices(self.arch)))}. Correct match."
            )
        return found

    def require_smaller(self, name: str, entry: dict[str, Any]) -> None:
        """Raise A3Error if A and B of a matrix would hold as many numbers as it, or more."""
        rank = 0 if self.rank is None else entry.get("rank", self.rank)
        m, n = self.checkpoint.shape(f"{name}.weight")
        most = (m * n - 1) // (m + n)
        if rank > most:
            raise A3Error(
                f"{self.folder}: rank {rank} of the repair of {name}, which is {m} × {n}: A and B "
                f"would be as large as the matrix, or larger. Take a rank of at most {most}."
            )

    def write(self, folder: Path, said: dict[str, Any]) -> None:
        """Write the quantised folder; `said` is its provenance."""
        files = list(self.checkpoint.files())
        start = time.perf_counter()
        with Bar(total=len(self.found), unit="matrix", desc="quantise") as bar:
            for file in files:
                tensors = self.file(file, bar)
                save_file(dict(sorted(tensors.items())), folder / file, {"format": "pt"})
        seconds = time.perf_counter() - start
        if len(files) > 1:
            write_index(folder, files)
        self.write_config(folder)
        bring(self.folder, folder, "config.json", CARD, *RECORDS, "timing.json")
        hashes = hash_files(folder)
        write_record(folder / "timing.json", {"seconds": seconds, "layers": []})
        kept = {key: self.source[key] for key in KEPT if key in self.source}
        record = kept | {
            # None if the model was trained after compression.
            "approx": self.source.get("provenance"),
            "provenance": said,
            "matrices": self.report,
            "size": {"dense": self.source["size"]["dense"], "compressed": self.size()},
            "weights_sha256": combined([hashes[file] for file in files]),
            "files": hashes,
        }
        write_record(folder / "approx.json", record)

    def file(self, name: str, bar: Bar) -> dict[str, Tensor]:
        """The tensors of one file of weights, quantised where the recipe says so."""
        tensors = {key: self.checkpoint.tensor(key) for key in self.checkpoint.names_in(name)}
        for module in self.found.keys() & {key.removesuffix(".weight") for key in tensors}:
            tensors |= self.matrix(
                module, tensors.pop(f"{module}.weight"), tensors.pop(f"{module}.bias", None)
            )
            bar.update(1)
        return tensors

    def matrix(self, module: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Tensors of one quantised module: its weight (out, in), bias, A (in, k) and B (k, out)."""
        entry, projection, layer = self.found[module]
        in_rows = self.arch.adapter.transposed and projection not in "qkvo"
        W = (weight if in_rows else weight.T).double()
        R = self.metric(INPUTS[projection], layer, len(W))
        quantised = quantise(W.T, entry["W"]).T
        E = W - quantised
        tensors = {"weight": quantised.T}
        if bias is not None:
            tensors["bias"] = quantise(bias.double(), entry["bias"])
        rank = 0 if self.rank is None else entry.get("rank", self.rank)
        if rank:
            metric = self.metric_of_method(projection, layer, E)
            A, B = lqer.repair(E, metric, rank)
            tensors |= {"A": quantise(A.T, entry["A"]).T, "B": quantise(B.T, entry["B"]).T}
        left = E - tensors["A"] @ tensors["B"] if rank else E
        self.report[module] = {
            "rank": rank,
            "bits": self.bits(entry, W, bias, rank),
            "weights": W.numel(),
            "quantisation_error": lqer.output_error(E, W, R),
            "relative_error": lqer.output_error(left, W, R),
        }
        return {f"{module}.{key}": stored(x, weight.dtype) for key, x in tensors.items()}

    def metric(self, kind: str, layer: int, width: int) -> Tensor:
        """A statistic of an input of this width."""
        full = KINDS[kind].form == "full"
        return self.statistics[kind].R(layer, (width, width) if full else (width,))

    def metric_of_method(self, projection: str, layer: int, E: Tensor) -> Tensor:
        """The metric in which E (m, n) is approximated."""
        form = METHODS[self.method]
        kind = f"{INPUTS[projection]}_peak" if form == "peak" else INPUTS[projection]
        statistic = None if form is None else self.metric(kind, layer, len(E))
        return getattr(lqer, self.method.replace("-", "_"))(E, statistic)

    def bits(self, entry: dict[str, Any], W: Tensor, bias: Tensor | None, rank: int) -> int:
        """Bits of a matrix W (m, n), its bias, A and B, each in its format."""
        plain = 8 * WIDTHS[dtype_of(self.source)]
        m, n = W.shape
        count = parse_format(entry["W"]).bits(n, m, plain)
        count += parse_format(entry["A"]).bits(rank, m, plain)
        if rank:
            count += parse_format(entry["B"]).bits(n, rank, plain)
        if bias is not None:
            count += parse_format(entry["bias"]).bits(1, n, plain)
        return count

    def size(self) -> dict[str, Any]:
        """As approx.json says it, with the products' parameters and FLOPs, and bits_per_weight."""
        added = sum(
            said["rank"] * sum(self.checkpoint.shape(f"{module}.weight"))
            for module, said in self.report.items()
        )
        size = self.source["size"]["compressed"]
        return size | {
            "parameters": size["parameters"] + added,
            "flops_per_token": size["flops_per_token"] + 2 * added,
            "bits_per_weight": self.bits_per_weight(),
        }

    def bits_per_weight(self) -> float:
        """Bits of the layers' matrices for each weight of these matrices in the dense model."""
        dense = projection_weights(self.source["base"])
        before, after = (self.source["size"][of]["parameters"] for of in ("dense", "compressed"))
        removed = before - after
        quantised = sum(said["weights"] for said in self.report.values())
        bits = sum(said["bits"] for said in self.report.values())
        rest = 8 * WIDTHS[dtype_of(self.source)] * (dense - removed - quantised)
        return (bits + rest) / dense

    def write_config(self, folder: Path) -> None:
        """Write the config, with the number formats that are simulated at run time."""
        config = read_json(self.folder / "config.json")
        # The code that travels with compressed models does not simulate low precision.
        config.pop("auto_map", None)
        modules = {
            name: {"rank": self.report[name]["rank"], "x": entry["x"]}
            for name, (entry, _, _) in self.found.items()
        }
        config["a3"] |= {"quantised": {"modules": modules, "products": self.recipe["products"]}}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def matrices(arch: Arch) -> dict[str, tuple[str, int]]:
    """(projection, layer) by the name of its module; of fused ones the first projection."""
    projections = [*"qkvo", *(together[0] for together in arch.adapter.first_of_mlp), "down"]
    return {
        f"{arch.adapter.prefix}.{arch.module(layer, projection)}": (projection, layer)
        for layer in range(arch.layers)
        for projection in projections
    }


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the folder's dtype, or in float32 where that would not hold it exactly."""
    small = x.to(dtype)
    return (small if torch.equal(small.to(x.dtype), x) else x.float()).contiguous()
