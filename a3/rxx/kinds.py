"""The kinds of statistics: the observed activation, the accumulated sum, and its size.

This module does not import torch, because the workflow reads it at every start.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from a3.core.dtypes import WIDTHS


@dataclass(frozen=True)
class Kind:
    """Which activation x is observed, and which sum over tokens is accumulated.

    `site` is the output of q, k or v (before RoPE) or of down (before its bias), or the input of
    attention, o, the MLP or down. `form` is blocks (Σ xᵀx, one h × h block a head), full (Σ xᵀx),
    diagonal (Σ x²), abs (Σ |x|), mean (Σ x), or peak, which is not a sum: the maximum over blocks
    of text of the mean of |x|. Three forms observe gradients instead. fisher is Σ over blocks of
    the squared gradients of weights, summed over each row (collect.fisher). gradient is Σ gᵀg, g by
    the output of o or down. factors is one matrix per query head, by a complex factor of each RoPE
    pair; if heads are normed, by a real factor, and one more per query and key head, by the pairs'
    weights in its norm (collect.gradients).

    Of a mixture, the inputs of down are summed for each expert, over the tokens that reach it, each
    times its routing weight: the mixture's output is the sum of what down makes of these. The
    gradient by the output of down is that by the mixture's output. Two forms are only of `experts`:
    norm is Σ ‖y‖ over the tokens of each expert, y its output times the routing weight; output is
    Σ y over all tokens, those included that do not reach the expert, y what it makes of them. The
    site router is the logits by which a token chooses its experts.
    """

    site: str
    form: str

    def shape(self, width: int, heads: int) -> tuple[int, ...]:
        """Shape of the sum for a site of this width; `heads` is for blocks."""
        if self.form == "blocks":
            return heads, width // heads, width // heads
        return (width, width) if self.form == "full" else (width,)


# With q = x W_q, the block of a head is W_qᵀ R W_q, and solutions need no more of R (linalg.py).
KINDS = {
    "q_blocks": Kind("q", "blocks"),
    "k_blocks": Kind("k", "blocks"),
    "v_blocks": Kind("v", "blocks"),
    "o_proj_blocks": Kind("o_input", "blocks"),
    "down_diagonal": Kind("down_input", "diagonal"),
    # For baselines.
    "attention_input": Kind("attention_input", "full"),
    "attention_input_diagonal": Kind("attention_input", "diagonal"),
    "attention_input_abs": Kind("attention_input", "abs"),
    "attention_input_peak": Kind("attention_input", "peak"),
    "attention_fisher": Kind("qkv", "fisher"),
    "o_proj_input": Kind("o_input", "full"),
    "o_proj_input_abs": Kind("o_input", "abs"),
    "o_proj_input_peak": Kind("o_input", "peak"),
    "o_proj_fisher": Kind("o", "fisher"),
    "mlp_input": Kind("mlp_input", "full"),
    "mlp_input_abs": Kind("mlp_input", "abs"),
    "mlp_input_peak": Kind("mlp_input", "peak"),
    "mlp_fisher": Kind("mlp", "fisher"),
    "down_input": Kind("down_input", "full"),
    "down_input_abs": Kind("down_input", "abs"),
    "down_input_peak": Kind("down_input", "peak"),
    "down_mean": Kind("down_input", "mean"),
    "down_output": Kind("down", "full"),
    "down_fisher": Kind("down", "fisher"),
    # For modes beyond the paper.
    "k_mean": Kind("k", "mean"),
    "attention_gradient": Kind("o", "gradient"),
    "mlp_gradient": Kind("down", "gradient"),
    "pair_gradient": Kind("q", "factors"),
    # For modes that drop or merge whole experts.
    "expert_norm": Kind("experts", "norm"),
    "expert_output": Kind("experts", "output"),
    "router_logits": Kind("router", "full"),
}

# What a mixture of experts has of its MLPs.
EXPERT_KINDS = (
    *("down_diagonal", "down_input", "down_mean", "mlp_gradient"),
    *("expert_norm", "expert_output", "router_logits"),
)

# Families whose layers norm what attention and MLP make before they add it; of others a probe says.
NORMED_OUTPUTS = ("gemma2", "gemma3_text", "glm4", "olmo2")

# Gradients by activations, which are computed for one block in this many.
GRADIENT_BLOCKS = 4

# Of these, tokens whose logits are in memory together: with a large vocabulary nothing is larger.
LOGITS_TOKENS = 256

SAMPLED_FORMS = ("gradient", "factors")

# Forms that are Σ xᵀx of whole activations or gradients: symmetric, and stored as packed triangles.
TRIANGULAR_FORMS = ("full", "gradient")

# Rows of a triangle that are computed, packed or unpacked at a time.
PANEL = 256

# Statistics that need a backward pass.
GRADIENT_FORMS = ("fisher", *SAMPLED_FORMS)


def heads_of(site: str, arch: Mapping[str, Any]) -> int:
    """Heads of an activation; `arch` has the fields of arch.json."""
    return arch["kv_heads"] if site in "kv" else arch["heads"]


def width_of(site: str, arch: Mapping[str, Any]) -> int:
    """Width of an activation."""
    if site in ("q", "k", "v", "o", "o_input"):
        return heads_of(site, arch) * arch["head_dim"]
    names = {"down_input": "intermediate_size", "router": "experts"}
    return arch[names.get(site, "hidden_size")]


def has_pairs_in_norms(arch: Mapping[str, Any]) -> bool:
    """Whether each head of q and k is normed and all of it rotated: a norm is over RoPE pairs."""
    return arch["qk_norm"] == "head" and arch["rope_dims"] == arch["head_dim"]


def norms_output(arch: Mapping[str, Any], of_mlp: bool) -> bool:
    """Whether what attention or the MLP makes is normed before it is added to the hidden state.

    Of a mixture the sum over experts is, and each expert is compressed by itself: no.
    """
    probed = (arch.get("structure") or {}).get("norms_outputs", False)
    normed = probed or arch.get("family") in NORMED_OUTPUTS
    return normed and not (of_mlp and arch["experts"])


def sums_of(kind: Kind, arch: Mapping[str, Any]) -> int:
    """How many sums of a kind a layer has: inputs whose outputs are normed have two.

    An error of an output that is normed counts by its share of its token's output. So the inputs
    are summed a second time, divided by the root mean square of the output, and gradients are
    multiplied by it: the two are nearly independent then, as a loss E[gᵀg] ⊗ E[xᵀx] takes them.
    """
    inputs = kind.form == "full" and kind.site in ("o_input", "down_input")
    return 2 if inputs and norms_output(arch, kind.site == "down_input") else 1


def shape_of(kind: Kind, arch: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of one layer's statistic."""
    if kind.form == "fisher":
        # Up and gate, or only up; families that fuse them have one matrix for both.
        matrices = {"qkv": (3,), "mlp": (arch["mlp_inputs"],)}
        site = "down_input" if kind.site == "down" else kind.site
        return *matrices.get(kind.site, ()), width_of(site, arch)
    if kind.form == "gradient":
        return arch["hidden_size"], arch["hidden_size"]
    if kind.form == "factors":
        if has_pairs_in_norms(arch):
            return 2 * arch["heads"] + arch["kv_heads"], *[arch["rope_dims"] // 2] * 2
        return arch["heads"], arch["rope_dims"], arch["rope_dims"]
    if kind.form == "norm":
        return (arch["experts"],)
    shape = kind.shape(width_of(kind.site, arch), heads_of(kind.site, arch))
    return (arch["experts"], *shape) if is_of_experts(kind, arch) else shape


def is_of_experts(kind: Kind, arch: Mapping[str, Any]) -> bool:
    """Whether a kind is summed for each of a mixture's experts."""
    return bool(arch["experts"]) and kind.site in ("down_input", "experts")


def experts_of_token(kind: Kind, arch: Mapping[str, Any]) -> int:
    """To how many experts' sums of a kind a token adds something."""
    return arch["experts" if kind.form == "output" else "experts_per_token"]


def stored_bytes(arch: Mapping[str, Any], kind: str) -> int:
    """Bytes of one kind's file, all layers: triangles packed (a3.rxx.packed), others in float64."""
    shape = shape_of(KINDS[kind], arch)
    if KINDS[kind].form in TRIANGULAR_FORMS:
        n = shape[-1]
        sums = math.prod(shape[:-2]) * sums_of(KINDS[kind], arch)
        return arch["layers"] * sums * (3 * n * (n - 1) // 2 + 8 * n)
    return arch["layers"] * 8 * math.prod(shape)


def layer_memory(arch: Mapping[str, Any], kind: str) -> int:
    """Bytes of one layer's sums in float64, while they are collected: of a triangle its panels."""
    shape = shape_of(KINDS[kind], arch)
    if KINDS[kind].form in TRIANGULAR_FORMS:
        n = shape[-1]
        return math.prod(shape[:-2]) * sums_of(KINDS[kind], arch) * 4 * n * (n + min(n, PANEL))
    return 8 * math.prod(shape)


def states_disk(arch: Mapping[str, Any], tokens: int, dtype: str, kinds: Iterable[str]) -> int:
    """Bytes of the files in which a collection of these kinds has hidden states until its end.

    Those of all blocks are there twice, and so are the gradients by them; blocks that are used for
    gradients also have the inputs of all layers.
    """
    forms = {KINDS[kind].form for kind in kinds}
    fisher, sampled = "fisher" in forms, not forms.isdisjoint(SAMPLED_FORMS)
    used = max(fisher, sampled / GRADIENT_BLOCKS)
    copies = 2 + arch["layers"] * used + 2 * (fisher + sampled / GRADIENT_BLOCKS)
    return int(copies * tokens) * arch["hidden_size"] * WIDTHS[dtype]


# Statistics from which spectra are computed.
SPECTRA_KINDS = ("q_blocks", "k_blocks", "v_blocks", "down_diagonal")
