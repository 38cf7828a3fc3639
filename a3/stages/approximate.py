"""Stage approx: weights and Rxx to a checkpoint whose tensors really are smaller.

Solutions of different layers know nothing of each other but what the statistics of all say, so that
one checkpoint can be made in several parts, each a run of layers, by as many jobs;
a3.stages.assemble makes a folder of them.
"""

import time
from collections.abc import Callable, Mapping
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from a3.dtypes import WIDTHS
from a3.errors import A3Error
from a3.files import sha256, whole_folder
from a3.models.arch import Arch, load_arch
from a3.models.checkpoint import Checkpoint, model_source
from a3.models.load import load_tokenizer, tensors_of_model
from a3.models.tokenizer import has_tokenizer
from a3.parts import LARGEST_PART, share
from a3.provenance import provenance
from a3.solutions import mlp, ov, qk
from a3.solutions.factors import Matrix, factorise, shares
from a3.solutions.modes import DENSE, PARTS, find_mode
from a3.stages.allocation import read_allocation
from a3.stages.assemble import (
    assemble,
    in_products,
    outside,
    pairs_name,
    read_parts,
    staying,
    write_part,
)
from a3.stages.plan import Plan, factor_ranks
from a3.statistics import KINDS, Rxx
from a3.targets import APPROXIMATED

SOLUTIONS = {"qk": qk, "ov": ov, "mlp": mlp}
# Modes that share out a ratio among the layers.
ALLOCATED = ("svd-llm-v2",)
# What a solution of each part replaces.
REPLACED = {
    "qk": ("q", "k", "q_gain", "k_gain"),
    "ov": ("v", "o"),
    "mlp": ("up", "gate", "down"),
}


def approximate(
    model_folder: Path, rxx_folder: Path, plan: Plan, out: Path, allocation: Path | None = None
) -> None:
    """Solve every layer and write the compressed Hugging Face folder `out`, whole or not at all.

    Reads `<kind>.safetensors` from `rxx_folder` for the kinds that the modes need, and the ranks of
    parts that share out a ratio from `allocation` (a3.stages.allocate). Beside weights,
    config and tokenizer it writes approx.json (ranks, errors, sizes, provenance) and timing.json.
    Weights of more than 1 GiB are written in several files. Raises A3Error where a mode does not
    fit, the statistics are another model's or damaged, or weights are not finite.
    """
    write_checkpoint(solver_for(model_folder, rxx_folder, plan, allocation), plan, out)


def repack(model_folder: Path, out: Path) -> None:
    """The dense model as a compressed one of full ranks: the same function, in the folder `out`."""
    arch = load_arch(model_folder)
    checkpoint = Checkpoint(model_folder, arch.adapter.prefix)
    write_checkpoint(LayerSolver(arch, checkpoint, {}, {}, {}), Plan({}), out)


def write_checkpoint(solver: "LayerSolver", plan: Plan, out: Path) -> None:
    """Solve every layer and write the folder `out`, whole or not at all."""
    arch, dense = solver.arch, solver.checkpoint.folder
    if has_tokenizer(dense):
        load_tokenizer(dense)  # or the folder cannot be assembled: said before the long part
    size = arch.size["parameters"] * WIDTHS[arch.dtype]
    count = min(arch.layers, -(-size // LARGEST_PART))
    numbers = [f"{i}of{count}" for i in range(count)]
    with whole_folder(out, APPROXIMATED.seal, [solver.checkpoint.folder]) as folder:
        parts = [folder / f".{number}.safetensors" for number in numbers]
        for number, path in zip(numbers, parts, strict=True):
            solve_run(solver, plan, number, path)
        said = read_parts(parts)
        for path in parts:
            path.with_suffix(".json").unlink()
        assemble(dense, arch, said, parts, folder)


def approximate_part(
    model_folder: Path,
    rxx_folder: Path,
    plan: Plan,
    number: str,
    out: Path,
    allocation: Path | None = None,
) -> None:
    """Solve a run of layers, "0of4" to "3of4", and write them to the file `out`.

    It has all tensors of its layers, also those that stay, and of "0of1" those that are in no
    layer; what is said of them lies beside it in JSON. Raises A3Error as `approximate` does.
    """
    solve_run(solver_for(model_folder, rxx_folder, plan, allocation), plan, number, out)


def solver_for(
    model_folder: Path, rxx_folder: Path, plan: Plan, allocation: Path | None
) -> "LayerSolver":
    """The solver of a model's layers by a plan; raises A3Error as `approximate` does."""
    arch = load_arch(model_folder)
    ranks: dict[str, int | list[int]] = dict(plan.ranks(arch))
    if plan.shared:
        ranks |= read_allocation(allocation, arch, plan)
    config = sha256(model_folder / "config.json")
    model = {"weights_sha256": arch.weights_sha256, "config_sha256": config}
    statistics = {
        kind: Rxx(rxx_folder / f"{kind}.safetensors", kind, **model) for kind in plan.kinds()
    }
    dense = Checkpoint(model_folder, arch.adapter.prefix)
    modes = {part: choice.mode for part, choice in plan.choices.items()}
    solver = LayerSolver(arch, dense, statistics, modes, ranks, plan.multiple)
    for part in modes:
        if modes[part] in ALLOCATED:
            solver.allocate(part)
    return solver


def solve_run(solver: "LayerSolver", plan: Plan, number: str, out: Path) -> None:
    """Solve the layers of one part and write it."""
    arch, dense = solver.arch, solver.checkpoint
    layers = share(arch.layers, number, "layers")
    known = tensors_of_model(dense.folder)
    tensors = outside(dense, arch, known) if len(layers) == arch.layers else {}
    reports, seconds = [], []
    for layer in tqdm(layers, unit="layer", desc="approx"):
        solved, report, took = solver.solve(layer)
        whole = solved | staying(dense, arch, known, layer, solved)
        tensors |= in_products(whole, arch, layer, report)
        reports.append(report)
        seconds.append(took)
    said = {
        "modes": {part: str(plan.choices.get(part, DENSE)) for part in PARTS},
        "ranks": solver.ranks,
        "provenance": provenance(
            __name__,
            weights_sha256=arch.weights_sha256,
            config_sha256=sha256(dense.folder / "config.json"),
            model=model_source(dense.folder),
            statistics={kind: rxx.summary for kind, rxx in solver.statistics.items()},
        ),
    }
    write_part(out, tensors, number=number, said=said, layers=reports, seconds=seconds)


class LayerSolver:
    """Solves one layer at a time; holds no weights between layers."""

    def __init__(
        self,
        arch: Arch,
        checkpoint: Checkpoint,
        statistics: dict[str, Rxx],
        modes: dict[str, str],
        ranks: Mapping[str, int | list[int]],
        multiple: int = 1,
    ) -> None:
        """`ranks` has one number a part, or one a layer; those of factors are of a `multiple`."""
        self.arch = arch
        self.checkpoint = checkpoint
        self.statistics = statistics
        self.modes = modes
        self.ranks = ranks
        self.multiple = multiple
        self.fields = arch.to_json()
        # The share that each matrix keeps, by its name in every layer, where it is not the same.
        self.kept: dict[str, list[float]] = {}

    def solve(self, layer: int) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, float]]:
        """Compressed tensors of one layer, its part of approx.json, and seconds for each part."""
        tensors: dict[str, Tensor] = {}
        report: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        read = cache(partial(self.weights, layer))  # QK and OV share one reading
        for part in PARTS:
            start = time.perf_counter()
            if part == "mlp" and self.arch.experts:
                solved, said = self.solve_experts(layer)
            elif part in self.ranks:
                solved, said = self.solve_part(part, layer, read(part == "mlp"))
            elif part != "mlp" and self.arch.adapter.repacked:
                # The compressed model has its own layout of attention, also where it is kept.
                solved, said = self.pack(layer, read(False), REPLACED[part]), {}
            else:
                continue
            tensors |= solved
            if said:
                report[part] = said
                seconds[part] = time.perf_counter() - start
        return tensors, report, seconds

    def solve_part(
        self, part: str, layer: int, weights: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Compressed tensors of one part of a layer, and what approx.json says of it."""
        name = self.layer_mode(part, layer)
        if find_mode(part, name).factors is not None:
            return self.solve_factors(part, layer, weights)
        rank = self.rank(part, layer)
        solution = solver_of(part, name)(weights, *self.read(part, name, layer), rank)
        tensors = self.pack(layer, solution, REPLACED[part])
        said = {
            "mode": name,
            "rank": rank,
            "relative_error": solution.relative_error,
        }
        if part == "qk" and solution.pairs is not None:
            said["rope_pairs"] = solution.pairs.tolist()
            tensors[pairs_name(self.arch, layer)] = solution.pairs.contiguous()
        if part == "mlp" and solution.bias is not None:
            tensors |= self.with_bias(layer, solution.bias)
            said["bias"] = True
        return tensors, said

    def solve_factors(
        self, part: str, layer: int, weights: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `solve_part`, each matrix on its own: a product of two, or, where all of it is kept,
        as it was. The report has the rank of each product.
        """
        arch, adapter, mode = self.arch, self.arch.adapter, find_mode(part, self.modes[part])
        matrices = self.matrices(part, layer, weights)
        ranks = factor_ranks(arch, part, mode, self.ranks[part], self.multiple)
        for name in self.kept.keys() & matrices.keys():
            ranks[name] = matrices[name].rank_for(self.kept[name][layer], self.multiple)
        solution = factorise(matrices, ranks)
        stay = [name for name in REPLACED[part] if adapter.repacked and part != "mlp"]
        tensors = self.pack(layer, weights, tuple(stay))
        dtype = getattr(torch, arch.dtype)
        for name, (A, B) in solution.factors.items():
            where = adapter.packed_name(layer, name).removesuffix(".weight")
            tensors[f"{where}.encoder.weight"] = A.T.to(dtype).contiguous()
            tensors[f"{where}.weight"] = B.T.to(dtype).contiguous()
        return tensors, {
            "mode": self.modes[part],
            "rank": self.ranks[part],
            "factors": {name: rank for name, rank in ranks.items() if rank is not None},
            "relative_error": solution.relative_error,
        }

    def matrices(self, part: str, layer: int, weights: Any) -> dict[str, Matrix]:
        """The matrices of a part without their biases, and their metrics; float64.

        Matrices of the MLP that lie in one are factored as one, by the name of the first.
        """
        d = self.arch.hidden_size
        if part == "mlp":
            found = {
                together[0]: torch.cat([getattr(weights, p)[:d] for p in together], 1).double()
                for together in self.arch.adapter.first_of_mlp
            } | {"down": weights.down.double()}
        elif part == "ov":
            found = {"v": weights.v[:, :d].movedim(0, 1).flatten(1), "o": weights.o.flatten(0, 1)}
        else:
            found = {p: getattr(weights, p)[:, :d].movedim(0, 1).flatten(1) for p in "qk"}
        kinds = find_mode(part, self.modes[part]).factors
        return {
            name: Matrix(W, *self.metric(kinds[name], name, layer))
            for name, W in found.items()
            if name in kinds
        }

    def metric(self, kind: str | None, name: str, layer: int) -> tuple[Tensor | None, bool]:
        """The metric of one matrix, and whether it is that of its output."""
        if kind is None:
            return None, False
        R = self.rxx(kind, layer)
        if R.dim() == 2 and KINDS[kind].form == "fisher":
            firsts = [together[0] for together in self.arch.adapter.first_of_mlp]
            R = R[firsts.index(name) if name in firsts else "qkv".index(name)]
        return R, kind == "down_output"

    def allocate(self, part: str) -> None:
        """Share out what a part keeps among the layers, matrices of one name among each other."""
        kept = self.ranks[part] / self.arch.full_rank(part)
        if kept == 1:
            return
        losses: dict[str, list[float]] = {}
        kinds = find_mode(part, self.modes[part]).factors
        for layer in tqdm(range(self.arch.layers), unit="layer", desc=f"ratios of {part}"):
            found = self.matrices(part, layer, self.weights(layer, part == "mlp"))
            for name, matrix in found.items():
                least = matrix.factor(0)[2]
                rank = min(matrix.rank_for(kept, self.multiple), len(least) - 1)
                tokens = self.statistics[kinds[name]].tokens
                losses.setdefault(name, []).append((least[rank].item() * tokens) ** 0.5)
        self.kept |= {name: shares(found, kept) for name, found in losses.items()}

    def with_bias(self, layer: int, bias: Tensor) -> dict[str, Tensor]:
        """The output bias of a layer's MLP with something added; it may have had none."""
        name = self.arch.adapter.name(layer, "down", "bias")
        if self.arch.adapter.has_bias("down", self.fields):
            bias = bias + self.checkpoint.tensor(name).double()
        return {name: bias.to(getattr(torch, self.arch.dtype))}

    def solve_experts(self, layer: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `solve_part`, of experts: each on its own, copied where few tokens reached it.

        The report has each expert's tokens and rank.
        """
        arch, name = self.arch, self.modes.get("mlp")
        ranks = [arch.intermediate_size] * arch.experts
        tensors: dict[str, Tensor] = {}
        counts, errors = None, []
        if name is not None:
            (kind,) = find_mode("mlp", name).kinds
            R, counts = self.rxx(kind, layer), self.statistics[kind].counts(layer, arch.experts)
        for expert in range(arch.experts):
            solution = self.weights(layer, True, expert)
            if counts is not None and counts[expert] >= mlp.FEWEST_TOKENS:
                ranks[expert] = self.ranks["mlp"]
                solution = solver_of("mlp", name)(solution, R[expert], ranks[expert])
                errors.append(solution.relative_error)
            tensors |= self.pack(layer, solution, REPLACED["mlp"], expert)
        if counts is None:
            return tensors, {}
        if few := arch.experts - len(errors):
            tqdm.write(
                f"layer {layer}: {few} of {arch.experts} experts copied, since fewer than "
                f"{mlp.FEWEST_TOKENS} calibration tokens reached each"
            )
        return tensors, {
            "mode": name,
            "rank": self.ranks["mlp"],
            "relative_error": sum(errors) / len(errors) if errors else 0.0,
            "expert_tokens": counts.int().tolist(),
            "expert_ranks": ranks,
        }

    def rank(self, part: str, layer: int) -> int:
        """The rank of a part in one layer."""
        rank = self.ranks[part]
        return rank[layer] if isinstance(rank, list) else rank

    def layer_mode(self, part: str, layer: int) -> str:
        """The mode for one layer: `qk` for the scores of a layer without RoPE among those with.

        Where matrices are factored one by one, rotations make no difference.
        """
        nope = part == "qk" and layer in self.arch.nope_layers
        factored = find_mode(part, self.modes[part]).factors is not None
        return "qk" if nope and not factored else self.modes[part]

    def weights(self, layer: int, of_mlp: bool, expert: int | None = None) -> Any:
        """Dense weights of attention or MLP, float64; A3Error where they are not finite."""
        if of_mlp:
            weights = self.arch.adapter.mlp(self.checkpoint, layer, self.fields, expert)
        else:
            weights = self.arch.adapter.attention(self.checkpoint, layer, self.fields)
        for name, W in vars(weights).items():
            if isinstance(W, Tensor) and not torch.stack(W.aminmax()).isfinite().all():
                raise A3Error(
                    f"{self.checkpoint.folder}: layer {layer}, {name} holds NaN or Inf; expected "
                    "finite weights. The checkpoint is damaged: fetch it again."
                )
        return weights

    def read(self, part: str, name: str, layer: int) -> list[Tensor | float]:
        """What the solution of a mode takes between weights and rank."""
        mode = find_mode(part, name)
        read: list[Tensor | float] = [self.rxx(kind, layer) for kind in mode.kinds]
        if mode.prior:
            read.append(mode.prior / self.statistics[mode.kinds[0]].tokens)
        if name == "uniform-global":
            read.append(self.order)
        return read

    def rxx(self, kind: str, layer: int) -> Tensor:
        """One statistic of a layer."""
        return self.statistics[kind].R(layer, self.arch.statistic_shape(KINDS[kind]))

    @cached_property
    def order(self) -> Tensor:
        """The order in which RoPE pairs go, where they go from all layers alike."""
        layers = [layer for layer in range(self.arch.layers) if self.arch.has_rope(layer)]
        C = torch.cat([self.rxx("pair_gradient", layer) for layer in layers])
        return qk.global_order(C, self.arch.qk_norm is not None)

    def pack(
        self, layer: int, solution: Any, names: tuple[str, ...], expert: int | None = None
    ) -> dict[str, Tensor]:
        """Checkpoint tensors of a solution, in the model's dtype (o and down biases are copied)."""
        solved = {name: getattr(solution, name) for name in names}
        solved = {name: W for name, W in solved.items() if W is not None}
        dtype = getattr(torch, self.arch.dtype)
        packed = self.arch.adapter.pack(layer, solved, self.fields, expert)
        return {name: W.to(dtype).contiguous() for name, W in packed.items()}


def solver_of(part: str, name: str) -> Callable:
    """The function of a mode."""
    return getattr(SOLUTIONS[part], name.replace("-", "_"))
