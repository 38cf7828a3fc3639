"""What the modules of a model could be: proposals that a trial (a3.models.probe.trial) decides on.

Names only propose. Whether a matrix is what its name says is decided by numbers.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from a3.core.errors import A3Error
from a3.models.families.measure import Attention, columns_first, is_matrix

# The last parts of modules' names, by what they may be.
NAMES = {
    "q": ("q_proj", "query", "q_lin", "Wq", "wq", "project_q", "query_proj"),
    "k": ("k_proj", "key", "k_lin", "Wk", "wk", "project_k", "key_proj"),
    "v": ("v_proj", "value", "v_lin", "Wv", "wv", "project_v", "value_proj"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "qkv_linear"),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "Wo", "wo", "out_lin", "attention_out"),
}

NORMS = {
    "q": ("q_norm", "q_layernorm", "query_layernorm", "q_ln", "query_norm", "qk_norm"),
    "k": ("k_norm", "k_layernorm", "key_layernorm", "k_ln", "key_norm", "qk_norm"),
}

# What is no part of a decoder's own attention or MLP, by parts of names.
OTHERS = ("cross", "encoder_attn", "shared", "router", "indexer", "adapter")

# A structure in which nothing is compressed.
NOTHING: dict[str, Any] = {
    "attention_name": "",
    "projections": {},
    "experts": {},
    "experts_module": "",
    "stacked": False,
    "turned": False,
    "alternating": False,
    "transposed": False,
    "rope_layout": None,
    "rope_share": 0.0,
    "qk_norm": None,
    "gains": True,
    "gain_offset": 0.0,
    "norm_eps": None,
    "norm_heads_first": False,
    "norms_outputs": False,
    "norms": {},
    "own": False,
    "interleave": False,
    "nope_layers": [],
}


def layer_list(trunk: nn.Module, config: PreTrainedConfig) -> tuple[str, nn.ModuleList]:
    """The list of layers, by its name in the trunk; A3Error unless there is one."""
    count = config.num_hidden_layers
    found = [
        (name, module)
        for name, module in trunk.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outer = [(n, m) for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found)]
    if len(outer) != 1:
        raise A3Error(
            f"its layers are in {len(outer)} lists of {count} modules "
            f"({', '.join(name for name, _ in outer) or 'none'}); expected one"
        )
    return outer[0]


def shared_weights(layers: nn.ModuleList) -> str | None:
    """What layers share, in words: the first two, and a matrix that both have; None if nothing."""
    owner: dict[int, int] = {}
    for number, layer in enumerate(layers):
        for name, value in layer.named_parameters():
            other = owner.setdefault(id(value), number)
            if other != number and value.ndim > 1:
                return f"layers {other} and {number} share {name}"
    return None


def attention_in(layer: nn.Module) -> Attention | None:
    """The attention of a layer, if modules have the names of one."""
    for name, module in layer.named_modules():
        if any(other in name for other in OTHERS):
            continue
        children = {child: part for child, part in module.named_children() if is_matrix(part)}
        found = {p: next((n for n in NAMES[p] if n in children), None) for p in NAMES}
        if found["qkv"] is None and not (found["q"] and found["k"]):
            continue
        inside = f"{name}." if name else ""
        if found["qkv"] is not None:
            places = dict.fromkeys("qkv", f"{inside}{found['qkv']}")
        else:
            # Values may be the keys.
            places = {p: f"{inside}{found[p]}" for p in "qkv" if found[p]}
        o = f"{inside}{found['o']}" if found["o"] else outside(layer, name)
        if o is not None:
            places["o"] = o
        norms = {
            p: next(n for n in names if hasattr(module, n))
            for p, names in NORMS.items()
            if any(isinstance(getattr(module, n, None), nn.Module) for n in names)
        }
        return Attention(name, places, norms)
    return None


def outside(layer: nn.Module, name: str) -> str | None:
    """o where it is not in the attention module: beside it, under the same parent."""
    parent = name.rpartition(".")[0]
    for other, module in layer.get_submodule(parent).named_modules() if parent else ():
        if is_matrix(module) and other.rpartition(".")[2] in NAMES["o"]:
            return f"{parent}.{other}"
    return None


def experts_in(layer: nn.Module) -> str | None:
    """The experts of a layer, if a module holds all of them as transformers usually does."""
    for name, module in layer.named_modules():
        down = getattr(module, "down_proj", None)
        up = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
        if not isinstance(up, Tensor) or not isinstance(down, Tensor) or "shared" in name:
            continue
        if up.ndim == down.ndim == 3:
            return name
    return None


def mlp_in(
    layer: nn.Module, attention: Attention | None, width: int, inner_size: int | None
) -> dict[str, str]:
    """gate, up and down of a layer, by name in it; empty if it has no such three or two matrices.

    `width` is the hidden size; among several, `inner_size` decides. gate and up may be the same
    matrix.
    """
    inside = f"{attention.module}." if attention and attention.module else None
    taken = set(attention.projections.values()) if attention else set()
    shapes = {
        name: columns_first(module)
        for name, module in layer.named_modules()
        if is_matrix(module)
        and name not in taken
        and not (inside and name.startswith(inside))
        and not any(other in name for other in (*OTHERS, "experts"))
    }
    found = []
    for down, (inner, out) in shapes.items():
        ups = [n for n, shape in shapes.items() if shape == (width, inner) and n != down]
        both = [n for n, shape in shapes.items() if shape == (width, 2 * inner)]
        ups = [n for n in ups if n.split(".")[0] == down.split(".")[0]] or ups
        if out != width or inner == width or not (ups or both) or len(ups) > 2:
            continue
        if len(ups) == 2:
            gate = next((n for n in ups if "gate" in n or n.endswith(("w1", "w_0"))), ups[0])
            found.append({"gate": gate, "up": next(n for n in ups if n != gate), "down": down})
        else:
            first = {"up": ups[0]} if ups else {"gate": both[0], "up": both[0]}
            found.append(first | {"down": down})
    likely = [names for names in found if shapes[names["down"]][0] == inner_size]
    found = likely or found
    return found[0] if len(found) == 1 else {}


def majority(values: list[Any]) -> Any:
    """The most frequent of the values that are not None; None if there is none."""
    counts = Counter(repr(value) for value in values if value is not None)
    if not counts:
        return None
    most = counts.most_common(1)[0][0]
    return next(value for value in values if repr(value) == most)


def norm_kind(norm: nn.Module, heads: int, head_dim: int) -> dict[str, Any] | None:
    """How a norm of q or k works: over a head or the layer, its gains and eps; None if it is none.

    Decided by what it does with random vectors.
    """
    weight = getattr(norm, "weight", None)
    eps = next((getattr(norm, n) for n in ("variance_epsilon", "eps") if hasattr(norm, n)), 1e-6)
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    width = head_dim if weight is None else weight.numel()
    over = {head_dim: "head", heads * head_dim: "layer"}.get(width)
    if over is None or (weight is not None and weight.ndim != 1):
        return None
    torch.manual_seed(3)
    x = 1 + torch.randn(2, 3, width)
    with torch.no_grad():
        found = norm(x)
        plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        offsets: dict[float | None, Tensor] = {None: plain}
        if weight is not None:
            offsets = {0.0: plain * weight, 1.0: plain * (1 + weight)}
    for offset, expected in offsets.items():
        if torch.allclose(found, expected, rtol=1e-4, atol=1e-6):
            gains = offset is not None
            return {"qk_norm": over, "gains": gains, "gain_offset": offset or 0.0, "norm_eps": eps}
    return None


def merged(
    base: dict[str, Any], mlp: dict[str, Any] | None, attention: dict[str, Any] | None
) -> dict[str, Any]:
    """One structure of its parts."""
    found = dict(base)
    for part in (attention, mlp):
        for key, value in (part or {}).items():
            if isinstance(value, dict):
                found[key] = found[key] | value
            else:
                found[key] = value or found[key] if key == "transposed" else value
    return found
