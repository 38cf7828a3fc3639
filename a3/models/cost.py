"""Estimates of a job's memory and FLOPs, from the model's shapes alone.

Jobs request these from a cluster, so they are generous: measured peaks are 0.7 to 1 times the
estimate (docs/scale.md). The Snakefile imports this at every start, so it imports nothing heavy.
`arch` is `shapes` of arch.json throughout.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from a3.core.dtypes import WIDTHS
from a3.core.shards import LARGEST_SHARD
from a3.models.sizes import kv_bytes
from a3.rxx.kinds import (
    GRADIENT_BLOCKS,
    GRADIENT_FORMS,
    KINDS,
    LOGITS_TOKENS,
    SAMPLED_FORMS,
    experts_of_token,
    is_of_experts,
    layer_memory,
    shape_of,
    stored_bytes,
    sums_of,
)

# Python with torch and transformers (and lm-eval) imported, in bytes; approx needs fewer of them.
LIBRARIES = 550 * 2**20

SOLVERS = 400 * 2**20

# lm-eval scores batches of 8; its local items are short, other tasks' items seldom longer.
HARNESS_TOKENS = 8 * 96

# For a text that is scored whole: least bytes per token, and tokens if it does not exist yet.
BYTES_PER_TOKEN = 3

WHOLE_TEXT = 1_000_000

# A generation step reads all weights, so it takes as long as a step with this many sequences.
DECODE_ROWS = 16

# Slow cores and GPUs: the requested time is a limit, and jobs that exceed it are killed.
CPU_FLOPS = 1e10

GPU_FLOPS = 1e13

# Fields of arch.json that are read here.
FIELDS = (
    "dtype",
    "experts",
    "experts_per_token",
    "head_dim",
    "heads",
    "hidden_size",
    "intermediate_size",
    "kv_heads",
    "layers",
    "mlp_inputs",
    "qk_norm",
    "rope_dims",
    "size",
    "vocab_size",
)


@dataclass(frozen=True)
class Cost:
    """Peak memory in bytes, and floating-point operations."""

    memory: int
    flops: float

    def megabytes(self) -> int:
        """Memory in MiB, rounded up."""
        return -(-self.memory // 2**20)

    def minutes(self, threads: int, device: str) -> int:
        """Time in minutes, rounded up, with ten to start and to read the model."""
        rate = CPU_FLOPS * threads if device == "cpu" else GPU_FLOPS
        return 10 + int(self.flops / rate / 60)


def shapes(record: dict[str, Any]) -> dict[str, Any]:
    """The shapes in an arch.json; raises KeyError or TypeError if they are missing."""
    return {name: record[name] for name in FIELDS}


def collect_cost(
    arch: dict[str, Any], tokens: int, block_length: int, dtype: str, kinds: Iterable[str]
) -> Cost:
    """Cost of one pass over `tokens` calibration tokens, with the statistics of some kinds.

    All blocks go through one layer after the other: the sums of one layer are in memory, and
    float64 copies of the widest activation of a block. Gradients come from another forward pass
    through each layer and one back, which by activations take as long as two without gradients, and
    by weights as three; they hold the activations and the gradients of weights of one layer, or the
    logits of a block.
    """
    h, kinds = arch["head_dim"], tuple(kinds)
    widest = max(arch["intermediate_size"], arch["heads"] * h)
    copies = 3 * 8 * block_length * widest
    forward = forward_memory(arch, block_length)
    layer = forward + copies + sum(layer_memory(arch, kind) for kind in kinds)
    passes, head = 1.0, 0
    forms = {KINDS[kind].form for kind in kinds}
    if forms & set(GRADIENT_FORMS):
        passes += 3 * ("fisher" in forms)
        passes += 2 / GRADIENT_BLOCKS * (not forms.isdisjoint(SAMPLED_FORMS))
        layer += forward + ("fisher" in forms) * WIDTHS[dtype] * layer_parameters(arch)
        logits = block_length if "fisher" in forms else min(block_length, LOGITS_TOKENS)
        head = 3 * 4 * logits * arch["vocab_size"]
    memory = LIBRARIES + weights_memory(arch, dtype) + max(layer, head)
    flops = passes * tokens * arch["size"]["flops_per_token"]
    # Of symmetric sums half is computed; a token is in the sums of the experts that it reaches.
    flops += tokens * arch["layers"] * sum(numbers_of_token(kind, arch) for kind in kinds)
    if "output" in forms:
        # All experts' outputs of every token.
        mlp = (arch["mlp_inputs"] + 1) * arch["hidden_size"] * arch["intermediate_size"]
        flops += 2 * tokens * arch["layers"] * mlp * arch["experts"]
    return Cost(memory, flops)


def numbers_of_token(kind: str, arch: dict[str, Any]) -> int:
    """To how many of a layer's sums of a kind a token adds something."""
    count = math.prod(shape_of(KINDS[kind], arch))
    if is_of_experts(KINDS[kind], arch):
        return count // arch["experts"] * experts_of_token(KINDS[kind], arch)
    return count * sums_of(KINDS[kind], arch)


def stream_cost(
    arch: dict[str, Any], tokens: int, block_length: int, dtype: str, kinds: Iterable[str]
) -> Cost:
    """Cost of the same passes with one layer at a time in memory."""
    whole = collect_cost(arch, tokens, block_length, dtype, kinds)
    return Cost(whole.memory - spared_memory(arch, dtype), whole.flops)


def layer_parameters(arch: dict[str, Any]) -> int:
    """Parameters of one layer."""
    outside = 2 * arch["vocab_size"] * arch["hidden_size"]
    return max(0, arch["size"]["parameters"] - outside) // arch["layers"]


def spared_memory(arch: dict[str, Any], dtype: str) -> int:
    """Bytes of weights that are not in memory if layers, embedding and head are read in turn."""
    largest = max(layer_parameters(arch), arch["vocab_size"] * arch["hidden_size"])
    parameters = arch["size"]["parameters"]
    resident = weights_memory(arch, dtype)
    return int(resident * (1 - min(1, largest / parameters)))


def approx_cost(arch: dict[str, Any], jobs: int = 1, kinds: Iterable[str] = ()) -> Cost:
    """Cost of one of `jobs` that divide the layers: its input and output, and one layer.

    A job that makes the whole checkpoint writes files of 1 GiB and holds one of them in memory. Its
    input is memory-mapped and counts as used while there is room. Attention is solved in float64.
    The smallest dimension of every product in a solution is the head size h, so FLOPs grow as
    parameters times h. Solutions that read full statistics matrices (`kinds`) also factor these and
    the weights.
    """
    parameters = arch["size"]["parameters"]
    width = WIDTHS[arch["dtype"]]
    layer = width * (parameters // arch["layers"])
    attention = 2 * arch["hidden_size"] * arch["head_dim"] * (arch["heads"] + arch["kv_heads"])
    made = width * parameters // jobs if jobs > 1 else min(width * parameters, LARGEST_SHARD)
    memory = 7 * max(made, layer) // 4 + 2 * 8 * attention + layer
    full = [kind for kind in kinds if KINDS[kind].form == "full"]
    shapes = [shape_of(KINDS[kind], arch) for kind in full]
    widest = max((shape[-1] for shape in shapes), default=0)
    # Experts have a matrix each, of which one is in memory.
    matrices = sum(math.prod(shape[:-2]) for shape in shapes)
    flops = 10.0 * parameters * arch["head_dim"] + 10.0 * matrices * arch["layers"] * widest**3
    if full:
        # Several copies of the largest matrix, and the layer's weights in float64.
        memory += 6 * 8 * widest**2 + 3 * 8 * parameters // arch["layers"]
    return Cost(SOLVERS + memory, flops / jobs)


def surgery_cost(arch: dict[str, Any], together: bool, kinds: Iterable[str]) -> Cost:
    """Cost of rebuilding Q, K and V of a model, all layers' in memory at once where `together`.

    Weights are decomposed in d dimensions or in their number of outputs, twice if there is a
    budget. The rebuilt matrices and one file of weights are in memory.
    """
    d, h = arch["hidden_size"], arch["head_dim"]
    outputs = (arch["heads"] + 2 * arch["kv_heads"]) * h
    widest = max(d, arch["heads"] * h, 2 * arch["kv_heads"] * h)
    held = WIDTHS[arch["dtype"]] * arch["layers"] * d * outputs
    working = 8 * (8 * widest**2 + 3 * d * outputs)
    if together:
        # Centred and fitted weights in float64, and the metric and triangle of each layer.
        working += 8 * arch["layers"] * d * (4 * outputs + 3 * d)
    file = WIDTHS[arch["dtype"]] * arch["size"]["parameters"]
    flops = (60.0 + 60.0 * len(list(kinds))) * arch["layers"] * widest**3
    return Cost(SOLVERS + held + working + file, flops)


def merge_cost(arch: dict[str, Any], shards: int, kind: str) -> Cost:
    """Cost of adding one kind's sums of all shards: one layer's, and as stored before and after."""
    sums, stored = layer_memory(arch, kind), stored_bytes(arch, kind) // arch["layers"]
    return Cost(LIBRARIES + sums + 2 * stored, 100.0 * shards * arch["layers"] * sums / 8)


def gather_cost(arch: dict[str, Any]) -> Cost:
    """Cost of linking all shards: embeddings and head, which are in none of them, are copied."""
    outside = 2 * WIDTHS[arch["dtype"]] * arch["vocab_size"] * arch["hidden_size"]
    return Cost(LIBRARIES + 2 * outside, 100.0 * outside)


def perplexity_cost(arch: dict[str, Any], tokens: int, block_length: int, dtype: str) -> Cost:
    """Cost of scoring `tokens` tokens: the logits of a block, in float32, and their softmax."""
    logits = 3 * 4 * block_length * arch["vocab_size"]
    memory = weights_memory(arch, dtype) + forward_memory(arch, block_length) + logits
    return Cost(LIBRARIES + memory, tokens * arch["size"]["flops_per_token"])


def heal_cost(arch: dict[str, Any], tokens: int, block_length: int, dtype: str) -> Cost:
    """Cost of training a model on `tokens` tokens beside its teacher.

    In float32: weights, gradients, Adam's two moments and, as they are saved, copies of all but the
    gradients; the activations of all layers for one block, and logits of both models. A step back
    takes as long as two steps forward.
    """
    trained = 7 * weights_memory(arch, "float32") + weights_memory(arch, dtype)
    logits = 8 * 4 * min(block_length, LOGITS_TOKENS) * arch["vocab_size"]
    memory = trained + arch["layers"] * forward_memory(arch, block_length) + logits
    return Cost(LIBRARIES + memory, 4.0 * tokens * arch["size"]["flops_per_token"])


def harness_cost(arch: dict[str, Any], items: int, shots: int, dtype: str) -> Cost:
    """Cost of one lm-eval task with `items` items of four choices; each shot is one item more."""
    tokens = HARNESS_TOKENS * (1 + shots)
    return perplexity_cost(arch, items * 4 * tokens // 8, tokens, dtype)


def speed_cost(
    archs: list[dict[str, Any]],
    attentions: int,
    batch: int,
    prompt: int,
    new_tokens: int,
    repeats: int,
    dtype: str,
) -> Cost:
    """Cost of timing models, all of them in memory, and a round to warm up.

    Products of generation count as those of at least DECODE_ROWS sequences, because the requested
    time depends on them.
    """
    held = [
        batch * forward_memory(arch, prompt)
        + batch * (prompt + new_tokens) * kv_bytes(arch["size"], arch["dtype"], dtype)
        for arch in archs
    ]
    tokens = batch * prompt + new_tokens * max(batch, DECODE_ROWS)
    flops = sum(arch["size"]["flops_per_token"] for arch in archs)
    memory = sum(weights_memory(arch, dtype) for arch in archs) + max(held)
    return Cost(LIBRARIES + memory, attentions * (repeats + 1) * tokens * flops)


def weights_memory(arch: dict[str, Any], dtype: str) -> int:
    """Bytes of a model in `dtype`; another dtype on disk counts as well, while it is read."""
    width = WIDTHS[dtype] + (WIDTHS[arch["dtype"]] if dtype != arch["dtype"] else 0)
    return width * arch["size"]["parameters"]


def forward_memory(arch: dict[str, Any], block_length: int) -> int:
    """Bytes of the activations of one layer for one block, float32: hidden states, MLP, scores."""
    hidden, inner = arch["hidden_size"], arch["intermediate_size"]
    scores = 2 * arch["heads"] * min(block_length, 4096) ** 2
    return 4 * (block_length * (6 * hidden + 3 * inner) + scores)
