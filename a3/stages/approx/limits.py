"""What components have at each rank, and the limits that a target sets to them."""

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from a3.core.dtypes import GGUF_BLOCKS, WIDTHS
from a3.core.errors import A3Error
from a3.models.checkpoint import Checkpoint
from a3.models.load import tensors_of_model
from a3.models.packing import names_to_keep
from a3.models.shape import Arch
from a3.models.sizes import Ranks, sizes
from a3.solutions.plan import Plan
from a3.solutions.target import Target, scaled
from a3.stages.approx.budget import Amounts

# Quantities: parameters, numbers in the KV cache per token, FLOPs per token and bytes of a file.
PARAMETERS, CACHED, FLOPS, BYTES = "parameters", "cached_numbers", "flops", "bytes"

# Of a folder's weights, bytes beside parameters: names, shapes and kept RoPE pairs of a layer.
BESIDE = 4096

# The name and shape of an expert's tensors.
BESIDE_EXPERT = 512


def costs_of(
    arch: Arch, component: str, ranks: Tensor, type_: str | None = None
) -> dict[str, Tensor]:
    """What one unit of a component has at each of some ranks, by quantity: the same everywhere.

    Bytes are those of a GGUF file of `type_`, or of a folder in the model's dtype.
    """
    ranks = ranks.double()
    of_one = of_one_rank(arch, component)
    costs = {key: of_one[key] * ranks for key in of_one}
    if type_ is None:
        costs[BYTES] = WIDTHS[arch.dtype] * costs[PARAMETERS]
    else:
        costs[BYTES] = torch.tensor(
            [gguf_bytes(arch, component, int(rank), type_) for rank in ranks], dtype=torch.float64
        )
    return costs


def of_one_rank(arch: Arch, component: str) -> Amounts:
    """Parameters, cached numbers and FLOPs per token for one rank of a component in one layer, or
    of one expert.
    """
    dense, less = arch.size, size_without(arch, component)
    full, width = arch.full_rank(component), WIDTHS[arch.dtype]
    return {
        PARAMETERS: parameters_of_one_rank(arch, component),
        CACHED: (dense["kv_bytes_per_token"] - less["kv_bytes_per_token"]) / width / full,
        FLOPS: (dense["flops_per_token"] - less["flops_per_token"]) / full,
    }


def parameters_of_one_rank(arch: Arch, component: str) -> int:
    """Parameters for one rank of a component in one layer, or of one expert."""
    if component == "mlp":
        inputs = 2 if arch.mlp == "3-layer" else 1
        return (inputs + 1) * arch.hidden_size + inputs * arch.mlp_bias
    heads = arch.heads + arch.kv_heads
    # Each rank also has a norm gain per head, and an element of the biases of q, k and v.
    own = heads * bool(arch.qk_norm) if component == "qk" else 0
    biased = heads if component == "qk" else arch.kv_heads
    return heads * arch.hidden_size + own + biased * arch.qkv_bias


def size_without(arch: Arch, component: str) -> dict[str, int]:
    """Sizes of the dense model without a component of one layer, or one expert of it."""
    n = arch.intermediate_size
    full: Ranks = (arch.head_dim, arch.head_dim, [n] * arch.experts if arch.experts else n)
    ranks = [full] * arch.layers
    layer = next(layer for layer in range(arch.layers) if arch.solves(component, layer))
    none = [0, *[n] * (arch.experts - 1)] if arch.experts else 0
    qk, ov, mlp = full
    ranks[layer] = {"qk": (0, ov, mlp), "ov": (qk, 0, mlp), "mlp": (qk, ov, none)}[component]
    return sizes(arch.to_json(), ranks, arch.size["parameters"], arch.dtype)


def gguf_bytes(arch: Arch, component: str, rank: int, type_: str) -> int:
    """Bytes of a component's tensors of one layer in a GGUF file of a type, at a rank.

    Matrices whose rows are no multiple of the type's block are stored as float16
    (a3.stages.export.gguf).
    """
    d, queries, keys = arch.hidden_size, arch.heads * rank, arch.kv_heads * rank
    biases = 0
    if component == "qk":
        shapes = [(queries, d), (keys, d)]
        biases = (queries + keys) * arch.qkv_bias
    elif component == "ov":
        shapes = [(keys, d), (d, queries)]
        biases = keys * arch.qkv_bias
    else:
        shapes = [(rank, d)] * (2 if arch.mlp == "3-layer" else 1) + [(d, rank)]
    return 4 * biases + sum(stored_bytes(rows, columns, type_) for rows, columns in shapes)


def stored_bytes(rows: int, columns: int, type_: str) -> int:
    """Bytes of a matrix in a GGUF file."""
    block, width = GGUF_BLOCKS[type_ if columns % GGUF_BLOCKS[type_][0] == 0 else "f16"]
    return rows * columns // block * width


def dense_amounts(arch: Arch, file_bytes: int | None) -> Amounts:
    """What the dense model has of each quantity in the layout of a compressed one.

    `file_bytes` are those of the dense model's file (`folder_bytes`, or of a GGUF file); None where
    they are not asked for.
    """
    parameters = arch.size["parameters"]
    if arch.qk_norm == "head":
        # A compressed model has the gains of each head, the dense one those of all heads.
        more = (arch.heads + arch.kv_heads - 2) * arch.head_dim
        parameters += more * sum(arch.solves("qk", layer) for layer in range(arch.layers))
    file = WIDTHS[arch.dtype] * parameters if file_bytes is None else file_bytes
    pairs = arch.kv_heads * arch.head_dim // 2 * 8  # as int64
    return {
        PARAMETERS: parameters,
        CACHED: arch.size["kv_bytes_per_token"] // WIDTHS[arch.dtype],
        FLOPS: arch.size["flops_per_token"],
        BYTES: file + arch.layers * (BESIDE + pairs + BESIDE_EXPERT * arch.experts),
    }


def folder_bytes(model_folder: Path, arch: Arch, dtype: str | None = None) -> int:
    """Bytes of the tensors that a compressed folder gets of the dense model at full size.

    All are in `dtype` if there is one. Otherwise those outside the layers keep their dtypes. A
    stored copy of a tied head stays.
    """
    dense, known = Checkpoint(model_folder, arch.adapter.prefix), tensors_of_model(model_folder)

    def stored(layer: int | None, least: int) -> int:
        return sum(
            prod(dense.shape(name)) * WIDTHS.get(dtype or "", max(least, own(name)))
            for name in names_to_keep(dense, arch, known, layer)
        )

    def own(name: str) -> int:
        return WIDTHS.get(dense.dtype(name), 0)

    width = WIDTHS[arch.dtype]
    return stored(None, 1) + sum(stored(layer, width) for layer in range(arch.layers))


def asked(target: Target, dense: Amounts) -> Amounts:
    """What a target allows the whole model of each quantity that it limits, in its order."""
    found: Amounts = {}
    if target.params is not None:
        found[PARAMETERS] = target.params
    if target.fit is not None:
        found[BYTES] = target.fit
    for key, share in ((CACHED, target.kv_cache), (FLOPS, target.flops)):
        if share is not None:
            found[key] = float(share * int(dense[key]))
    return found


def require_within_reach(arch: Arch, plan: Plan, target: Target, file_bytes: int | None) -> None:
    """Raise A3Error, before anything long, if even the smallest ranks keep more than is allowed."""
    dense = dense_amounts(arch, file_bytes)
    least = dict(dense)
    for component in plan.shared:
        ranks = torch.tensor(plan.allowed(arch, component))
        layers = sum(arch.solves(component, layer) for layer in range(arch.layers))
        for key, cost in costs_of(arch, component, ranks, target.gguf).items():
            least[key] -= layers * units(arch, component) * (cost[0] - cost.min()).item()
    wrong = [
        f"{words(key, limit, dense)} asked, {words(key, least[key], dense)} is the least"
        for key, limit in asked(target, dense).items()
        if limit < least[key]
    ]
    if wrong:
        raise A3Error(
            f"{target}: cannot be met with {plan.said()}, which keeps an eighth of each size at "
            f"least: {'; '.join(wrong)}. Ask for more, or take a smaller model."
        )
    above = {key: limit for key, limit in asked(target, dense).items() if limit >= dense[key]}
    if len(above) == len(asked(target, dense)) and above and target.max_loss is None:
        key = next(iter(above))
        in_ = f" in {target.stored}" if target.stored else ""
        raise A3Error(
            f"{target}: the dense model{in_} keeps to it ({words(key, dense[key], dense)}): there "
            "is nothing to compress. Ask for less."
        )


def units(arch: Arch, component: str) -> int:
    """Units of a component in one layer: experts, or 1."""
    return arch.experts if component == "mlp" and arch.experts else 1


def words(key: str, amount: float, dense: Amounts) -> str:
    """An amount in words: 120M parameters, 0.41 of the KV cache …"""
    if key == PARAMETERS:
        return f"params {scaled(round(amount), ('M', 10**6), ('B', 10**9))}"
    if key == BYTES:
        return f"fit {amount / 1e6:.3f}MB"
    return f"{'kv-cache' if key == CACHED else 'flops'} {amount / dense[key]:.3f}"
