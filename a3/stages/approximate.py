"""Stage approx: weights and Rxx to a checkpoint whose tensors really are smaller."""

import json
import shutil
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from a3 import LazyConfig
from a3.errors import A3Error
from a3.files import read_json, whole_folder, write_json
from a3.models.arch import Arch, load_arch, sizes
from a3.models.checkpoint import Checkpoint
from a3.provenance import provenance
from a3.solutions import mlp, ov, qk
from a3.solutions.modes import DENSE, PARTS, find_mode
from a3.stages.plan import Plan
from a3.statistics import KINDS, Rxx

SOLUTIONS = {"qk": qk, "ov": ov, "mlp": mlp}
# What a solution of each part replaces.
REPLACED = {
    "qk": ("q", "k", "q_gain", "k_gain"),
    "ov": ("v", "o"),
    "mlp": ("up", "gate", "down"),
}


def approximate(model_folder: Path, rxx_folder: Path, plan: Plan, out: Path) -> None:
    """Solve every layer and write the compressed Hugging Face folder `out`, whole or not at all.

    Reads `<kind>.safetensors` from `rxx_folder` for the kinds that the modes need. Beside weights,
    config and tokenizer it writes approx.json (ranks, errors, sizes, provenance) and timing.json.
    Raises A3Error where a mode does not fit, the statistics are another model's or damaged, or
    weights are not finite.
    """
    arch = load_arch(model_folder)
    ranks = plan.ranks(arch)
    kinds = plan.kinds()
    statistics = {
        kind: Rxx(rxx_folder / f"{kind}.safetensors", kind, arch.weights_sha256) for kind in kinds
    }
    dense = Checkpoint(model_folder, arch.adapter.prefix)
    modes = {part: choice.mode for part, choice in plan.choices.items()}
    solver = LayerSolver(arch, dense, statistics, modes, ranks)
    tensors: dict[str, Tensor] = {}
    layers, seconds = [], []
    for layer in tqdm(range(arch.layers), unit="layer", desc="approx"):
        solved, report, took = solver.solve(layer)
        tensors |= solved
        layers.append(report)
        seconds.append(took)
    copy_rest(dense, arch, tensors)
    with whole_folder(out) as folder:
        triples = [layer_ranks(arch, ranks, layer) for layer in layers]
        write_checkpoint(model_folder, folder, arch, triples, tensors)
        checkpoint = Checkpoint(folder)
        record = {
            "base": arch.to_json(),
            "modes": {part: str(plan.choices.get(part, DENSE)) for part in PARTS},
            "ranks": ranks,
            "layers": layers,
            "size": {
                "dense": arch.size,
                "compressed": sizes(arch.to_json(), triples, checkpoint.parameters(), arch.dtype),
            },
            "weights_sha256": checkpoint.sha256(),
            "provenance": provenance(
                __name__, statistics={kind: statistics[kind].record for kind in kinds}
            ),
        }
        write_json(folder / "approx.json", record)
        total = sum(sum(took.values()) for took in seconds)
        write_json(folder / "timing.json", {"seconds": total, "layers": seconds})


class LayerSolver:
    """Solves one layer at a time; holds no weights between layers."""

    def __init__(
        self,
        arch: Arch,
        checkpoint: Checkpoint,
        statistics: dict[str, Rxx],
        modes: dict[str, str],
        ranks: dict[str, int],
    ) -> None:
        self.arch = arch
        self.checkpoint = checkpoint
        self.statistics = statistics
        self.modes = modes
        self.ranks = ranks
        self.fields = arch.to_json()

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
        rxx = [self.rxx(kind, layer) for kind in find_mode(part, name).kinds]
        solution = solver_of(part, name)(weights, *rxx, self.ranks[part])
        tensors = self.pack(layer, solution, REPLACED[part])
        said = {
            "mode": name,
            "rank": self.ranks[part],
            "relative_error": solution.relative_error,
        }
        if part == "qk" and solution.pairs is not None:
            said["rope_pairs"] = solution.pairs.tolist()
            tensors[pairs_name(self.arch, layer)] = solution.pairs.contiguous()
        return tensors, said

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

    def layer_mode(self, part: str, layer: int) -> str:
        """The mode for one layer: `qk` for the scores of a layer without RoPE among those with."""
        nope = part == "qk" and layer in self.arch.nope_layers
        return "qk" if nope else self.modes[part]

    def weights(self, layer: int, of_mlp: bool, expert: int | None = None) -> Any:
        """Dense weights of attention or MLP, float64; A3Error where they are not finite."""
        if of_mlp:
            weights = self.arch.adapter.mlp(self.checkpoint, layer, self.fields, expert)
        else:
            weights = self.arch.adapter.attention(self.checkpoint, layer, self.fields)
        for name, W in vars(weights).items():
            if isinstance(W, Tensor) and not torch.isfinite(W).all():
                raise A3Error(
                    f"{self.checkpoint.folder}: layer {layer}, {name} holds NaN or Inf; expected "
                    "finite weights. The checkpoint is damaged: fetch it again."
                )
        return weights

    def rxx(self, kind: str, layer: int) -> Tensor:
        """One statistic of a layer."""
        return self.statistics[kind].R(layer, self.arch.statistic_shape(KINDS[kind]))

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


def layer_ranks(
    arch: Arch, ranks: dict[str, int], report: dict[str, Any]
) -> tuple[int, int, int | list[int]]:
    """(QK, OV, MLP) sizes of a layer, the dense size where a part is not compressed.

    The MLP's are a list where there are experts, some of which may have been copied.
    """
    dense = {"qk": arch.head_dim, "ov": arch.head_dim, "mlp": arch.intermediate_size}
    qk, ov, mlp = (ranks.get(part, dense[part]) for part in PARTS)
    if arch.experts:
        copied = [arch.intermediate_size] * arch.experts
        return qk, ov, report.get("mlp", {}).get("expert_ranks", copied)
    return qk, ov, mlp


def copy_rest(checkpoint: Checkpoint, arch: Arch, tensors: dict[str, Tensor]) -> None:
    """Add what no solution replaced: embeddings, norms, parts that stay, the biases of o and down.

    Attention gets the compressed model's names; repacked q, k, v, o and all experts are in
    `tensors` already.
    """
    adapter = arch.adapter
    renamed = {}
    for layer in range(arch.layers):
        for part in "qkvo":
            for field in ("weight", "bias"):
                # The bias of o is in no solution, and is stored alike everywhere.
                drop = adapter.repacked and (part, field) != ("o", "bias")
                name = adapter.packed_name(layer, part, field)
                renamed[adapter.name(layer, part, field)] = None if drop else name
        for part in adapter.experts:
            for expert in range(arch.experts):
                renamed[adapter.name(layer, part, "weight", expert)] = None
    for name in checkpoint.names():
        new = renamed.get(name, adapter.packed_rest(name))
        if new is not None and new not in tensors:
            tensors[new] = checkpoint.tensor(name)


def write_checkpoint(
    dense: Path,
    folder: Path,
    arch: Arch,
    ranks: list[tuple[int, int, int | list[int]]],
    tensors: dict[str, Tensor],
) -> None:
    """Weights, config, and all that travels: tokenizer, chat template, generation config."""
    qk_ranks, ov_ranks, mlp_ranks = map(list, zip(*ranks, strict=True))
    every_pair = torch.arange(arch.rope_dims // 2).expand(arch.kv_heads, -1).contiguous()
    for layer in range(arch.layers):
        if arch.has_rope(layer):
            tensors.setdefault(pairs_name(arch, layer), every_pair.clone())
    save_file(dict(sorted(tensors.items())), folder / "model.safetensors", {"format": "pt"})
    config = read_json(dense / "config.json")
    pair_names = [pairs_name(arch, layer) for layer in range(arch.layers)]
    config["model_type"] = LazyConfig.model_type
    config["architectures"] = [f"A3{name}" for name in config.get("architectures") or []]
    config["a3"] = {
        "family": arch.family,
        "heads": arch.heads,
        "kv_heads": arch.kv_heads,
        "scaling": arch.scaling,
        "qkv_bias": arch.qkv_bias,
        "o_bias": arch.o_bias,
        "qk_norm": arch.qk_norm,
        "rope": arch.rope_layout is not None,
        "nope_layers": arch.nope_layers,
        "rope_pairs": [tensors[name].shape[1] if name in tensors else 0 for name in pair_names],
        "qk_ranks": qk_ranks,
        "ov_ranks": ov_ranks,
        "mlp_ranks": mlp_ranks,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in sorted(dense.iterdir()):
        if path.name not in ("config.json", "arch.json") and travels(path):
            shutil.copyfile(path, folder / path.name)


def pairs_name(arch: Arch, layer: int) -> str:
    """Tensor of the kept RoPE pairs of one layer."""
    return f"{arch.adapter.attention_module(layer)}.rope_pairs"


def travels(path: Path) -> bool:
    """Whether a file of the dense folder goes with the compressed one: anything but weights."""
    weights = path.name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".gguf"))
    return path.is_file() and not weights and not path.name.startswith(".")
