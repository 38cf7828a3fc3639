"""Stage approx: weights and Rxx to a checkpoint whose tensors really are smaller."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from a3 import LazyConfig
from a3.errors import A3Error
from a3.files import read_json, whole_folder, write_json
from a3.linalg import augment
from a3.models.arch import Arch, load_arch, sizes
from a3.models.checkpoint import Checkpoint
from a3.provenance import provenance
from a3.solutions import mlp, ov, qk
from a3.solutions.modes import DENSE, PARTS, find_mode
from a3.stages.plan import Plan
from a3.statistics import Rxx

SOLUTIONS = {"qk": qk, "ov": ov, "mlp": mlp}
# The projections that a solution of each part replaces.
PROJECTIONS = {"qk": ("q", "k"), "ov": ("v", "o"), "mlp": ("up", "gate", "down")}


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
        write_checkpoint(model_folder, folder, arch, ranks, tensors)
        checkpoint = Checkpoint(folder)
        triples = [full_ranks(arch, ranks)] * arch.layers
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
        for part, names in PROJECTIONS.items():
            start = time.perf_counter()
            if part not in self.ranks:
                # The compressed model has its own layout of attention, also where it is kept.
                if self.arch.adapter.repacked and part != "mlp":
                    tensors |= self.pack(layer, self.weights(part, layer), names)
                continue
            name = self.layer_mode(part, layer)
            solve = getattr(SOLUTIONS[part], name.replace("-", "_"))
            R = self.rxx(find_mode(part, name).kind, layer)
            solution = solve(self.weights(part, layer), R, self.ranks[part])
            tensors |= self.pack(layer, solution, names)
            report[part] = {
                "mode": name,
                "rank": self.ranks[part],
                "relative_error": solution.relative_error,
            }
            if part == "qk" and solution.pairs is not None:
                report[part]["rope_pairs"] = solution.pairs.tolist()
                tensors[pairs_name(self.arch, layer)] = solution.pairs.contiguous()
            seconds[part] = time.perf_counter() - start
        return tensors, report, seconds

    def layer_mode(self, part: str, layer: int) -> str:
        """The mode for one layer: `qk` for the scores of a layer without RoPE among those with."""
        nope = part == "qk" and layer in self.arch.nope_layers
        return "qk" if nope else self.modes[part]

    def weights(self, part: str, layer: int) -> Any:
        """Dense weights of a part, float64; raises A3Error where they are not finite."""
        read = self.arch.adapter.mlp if part == "mlp" else self.arch.adapter.attention
        weights = read(self.checkpoint, layer, self.fields)
        for name, W in vars(weights).items():
            if isinstance(W, Tensor) and not torch.isfinite(W).all():
                raise A3Error(
                    f"{self.checkpoint.folder}: layer {layer}, {name} holds NaN or Inf; expected "
                    "finite weights. The checkpoint is damaged: fetch it again."
                )
        return weights

    def rxx(self, kind: str | None, layer: int) -> Tensor | None:
        """The statistic that a mode reads, augmented where q, k and v have biases."""
        if kind is None:
            return None
        arch, statistics = self.arch, self.statistics[kind]
        if kind == "down_diagonal":
            return statistics.R(layer, arch.intermediate_size)
        if kind == "o_proj_blocks":
            return statistics.R(layer, arch.heads, arch.head_dim, arch.head_dim)
        R = statistics.R(layer, arch.hidden_size, arch.hidden_size)
        return augment(R, statistics.mean(layer, arch.hidden_size)) if arch.qkv_bias else R

    def pack(self, layer: int, solution: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Checkpoint tensors of a solution, in the model's dtype (o and down biases are copied)."""
        solved = {name: getattr(solution, name) for name in names}
        solved = {name: W for name, W in solved.items() if W is not None}
        dtype = getattr(torch, self.arch.dtype)
        packed = self.arch.adapter.pack(layer, solved, self.fields)
        return {name: W.to(dtype).contiguous() for name, W in packed.items()}


def full_ranks(arch: Arch, ranks: dict[str, int]) -> tuple[int, int, int]:
    """(QK, OV, MLP) sizes of a layer, the dense size where a part is not compressed."""
    dense = {"qk": arch.head_dim, "ov": arch.head_dim, "mlp": arch.intermediate_size}
    qk, ov, mlp = (ranks.get(part, dense[part]) for part in PARTS)
    return qk, ov, mlp


def copy_rest(checkpoint: Checkpoint, arch: Arch, tensors: dict[str, Tensor]) -> None:
    """Add what no solution replaced: embeddings, norms, parts that stay, the biases of o and down.

    Attention gets the compressed model's names; repacked q, k, v, o are in `tensors` already.
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
    for name in checkpoint.names():
        new = renamed.get(name, name)
        if new is not None and new not in tensors:
            tensors[new] = checkpoint.tensor(name)


def write_checkpoint(
    dense: Path, folder: Path, arch: Arch, ranks: dict[str, int], tensors: dict[str, Tensor]
) -> None:
    """Weights, config, and all that travels: tokenizer, chat template, generation config."""
    qk, ov, mlp = full_ranks(arch, ranks)
    if "qk" not in ranks:
        every_pair = torch.arange(arch.rope_dims // 2).expand(arch.kv_heads, -1).contiguous()
        for layer in range(arch.layers):
            if arch.has_rope(layer):
                tensors[pairs_name(arch, layer)] = every_pair.clone()
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
        "rope": arch.rope_layout is not None,
        "nope_layers": arch.nope_layers,
        "rope_pairs": [tensors[name].shape[1] if name in tensors else 0 for name in pair_names],
        "qk_ranks": [qk] * arch.layers,
        "ov_ranks": [ov] * arch.layers,
        "mlp_ranks": [mlp] * arch.layers,
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
