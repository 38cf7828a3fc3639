"""Parameters, KV cache and FLOPs of a model with given ranks."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, TypeAlias

from a3.core.dtypes import WIDTHS

# Context length at which FLOPs per token are counted (the attention products depend on it).
FLOPS_CONTEXT = 1024

# What a layer has besides its components, where there is nothing.
NONE = {"weights": 0, "cached": 0}

# The sizes of a layer: (QK head size, OV head size, MLP size or the sizes of experts).
Ranks: TypeAlias = tuple[int, int, int | list[int]]


def sizes(
    fields: dict[str, Any],
    ranks: list[Ranks],
    parameters: int,
    dtype: str,
    factors: list[dict[str, int]] | None = None,
    merged: Sequence[list[int] | None] | None = None,
) -> dict[str, int]:
    """Parameters, KV-cache bytes per token, FLOPs per token of a model with the given ranks.

    `ranks` has (QK head size, OV head size, MLP size) per layer; for experts the MLP size is a
    list, and tokens are assumed to reach all experts equally. `factors` has the rank of each
    factored matrix, per layer. If only the keys are factored, the cache holds their latent (Palu).
    `merged` says, per layer, into which expert each dense one was merged, or None: then the router
    chooses as before, and a token reaches at most as many experts as are left.
    A multiply-add counts as two FLOPs; attention products are counted against FLOPS_CONTEXT keys;
    router and LM head are included. `rest` of a probed model has, per layer, the matrices that are
    in no component, and the cache of attention that stays.
    """
    width = WIDTHS[dtype]
    d, H, G = fields["hidden_size"], fields["heads"], fields["kv_heads"]
    linear = attention = cache = 0
    structure, fixed = fields["structure"], fields["fixed"]
    for layer, (qk, ov, channels) in enumerate(ranks):
        own, rest = (
            (factors or [{}] * len(ranks))[layer],
            (fields["rest"] or [NONE] * len(ranks))[layer],
        )
        n = mean(channels) if isinstance(channels, list) else channels
        reached, rows = routing(fields, channels, bool(merged and merged[layer]))
        shapes = {"q": (d, H * qk), "k": (d, G * qk), "v": (d, G * ov), "o": (H * ov, d)}
        shapes |= {"up": (d, n), "down": (n, d)}
        if fields["mlp"] == "3-layer":
            # If up and gate are fused and factored, gate stands for both.
            shapes |= {"gate": (d, n)}
            if "gate" in own and "up" not in own:
                shapes |= {"gate": (d, 2 * n), "up": (d, 0)}
        solved = [c for c in fixed if layer not in fixed[c]]
        for name, (inputs, outputs) in shapes.items():
            if component_of(name) not in solved:
                continue
            size = own[name] * (inputs + outputs) if name in own else inputs * outputs
            linear += size * (reached or 1) if name in ("gate", "up", "down") else size
        linear += rest["weights"] + (d * rows if "mlp" in solved else 0)
        if "qk" not in solved and "ov" not in solved:
            attention += H * rest["cached"] // G * FLOPS_CONTEXT
            cache += rest["cached"] * width
            continue
        # The family's own code computes with heads of the dense size.
        wide = structure is not None and structure["own"]
        attention += H * (2 * fields["head_dim"] if wide else qk + ov) * FLOPS_CONTEXT
        keys = own["k"] if "k" in own and "q" not in own else G * qk
        cache += (keys + G * ov) * width
    return {
        "parameters": parameters,
        "kv_bytes_per_token": cache,
        "flops_per_token": round(2 * (linear + attention + d * fields["vocab_size"])),
    }


def routing(fields: dict[str, Any], channels: int | list[int], merged: bool) -> tuple[int, int]:
    """How many experts a token reaches in a layer at most, and the rows of its router; 0, 0 where
    there are none. `channels` has the sizes of its experts, which were `merged` or dropped.
    """
    full, taken = fields["experts"], fields["experts_per_token"]
    if not isinstance(channels, list):
        return taken, full
    return min(taken, len(channels)), full if merged else len(channels)


def component_of(projection: str) -> str:
    """The component that a projection belongs to."""
    return "qk" if projection in "qk" else "ov" if projection in "vo" else "mlp"


def projection_weights(arch: Mapping[str, Any]) -> int:
    """Weights in all matrices of layers and experts, without biases, norms and embeddings."""
    d, h, n = arch["hidden_size"], arch["head_dim"], arch["intermediate_size"]
    attention = 2 * d * h * (arch["heads"] + arch["kv_heads"])
    matrices = 3 if arch["mlp"] == "3-layer" else 2
    return arch["layers"] * (attention + matrices * d * n * (arch["experts"] or 1))


def kv_bytes(size: dict[str, int], stored: str, dtype: str) -> int:
    """KV-cache bytes per token of a model that runs in `dtype`, from its size as stored."""
    return size["kv_bytes_per_token"] * WIDTHS[dtype] // WIDTHS[stored]
