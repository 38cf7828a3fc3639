"""Estimates of each stage's cost for one model, with times from pieces that are timed here."""

import math
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from a3.core.dtypes import WIDTHS
from a3.core.files import sha256
from a3.core.memory import memory_at_hand
from a3.jobs.counts import clock
from a3.jobs.pieces import Pieces
from a3.models.arch import load_arch, sketch
from a3.models.cost import (
    Cost,
    approx_cost,
    collect_cost,
    harness_cost,
    perplexity_cost,
    speed_cost,
    stream_cost,
)
from a3.models.sizes import Ranks, sizes
from a3.rxx.kinds import (
    GRADIENT_BLOCKS,
    KINDS,
    SAMPLED_FORMS,
    experts_of_token,
    is_of_experts,
    states_disk,
    stored_bytes,
)
from a3.solutions.modes import ALLOCATED, COMPONENTS, SHARING, choose, find_mode
from a3.solutions.plan import Plan, least_rank

# Seconds of Python, torch, transformers and the tokenizer before a job begins.
START = 5.0

# For the harness: tokens of a short item with one of its four answers, and items per batch.
ITEM_TOKENS, BATCH = 20, 8

# A statistic of experts computes up and gate (and down) again: this share of a forward pass, where
# tokens reach as many experts as in the model.
EXPERTS_AGAIN = 0.6

# Numbers that are copied, written and hashed to time it.
COPIED = 2**22


class Trial:
    """A model's folder (at least config.json); one of its layers is timed here when needed."""

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        self.folder = folder
        self.device = torch.device(device)
        self.arch = load_arch(folder) if (folder / "arch.json").exists() else sketch(folder)
        self.shapes = self.arch.to_json()
        # Seconds for one token, layer or number; each setting is timed once.
        self.pieces = pieces = Pieces(self.arch, self.device)
        self.layer, self.head = cache(pieces.layer), cache(pieces.head)
        self.statistic = cache(pieces.statistic)
        self.solve, self.losses = cache(pieces.solve), cache(pieces.losses)
        self.copy_seconds = cache(self._copy_seconds)

    # --- stages: (cost, bytes on disk, seconds) ---

    def collect(
        self, kinds: list[str], tokens: int, block_length: int, dtype: str
    ) -> tuple[Cost, int, float]:
        """All passes over `tokens` tokens; the weights layer by layer where they do not fit.

        Gradients by activations need one block in GRADIENT_BLOCKS, those by weights all; each
        needs another forward pass, a backward pass, and the head.
        """
        arch, forms = self.arch, {KINDS[kind].form for kind in kinds}
        cost = collect_cost(self.shapes, tokens, block_length, dtype, kinds)
        disk = sum(stored_bytes(self.shapes, kind) for kind in kinds)
        if cost.memory > memory_at_hand():
            cost = stream_cost(self.shapes, tokens, block_length, dtype, kinds)
            disk += states_disk(self.shapes, tokens, dtype, kinds)
        share = {kind: KINDS[kind].form in SAMPLED_FORMS for kind in kinds}
        # A layer's seconds of one token, and those of the head.
        each = sum(
            self.statistic(kind, block_length, dtype) / (GRADIENT_BLOCKS if sampled else 1)
            for kind, sampled in share.items()
        )
        forward = self.layer(block_length, dtype)
        each += forward / (GRADIENT_BLOCKS if forms <= set(SAMPLED_FORMS) else 1)
        heads = 0.0
        if forms & set(SAMPLED_FORMS):
            each += self.layer(block_length, dtype, "activations") / GRADIENT_BLOCKS
            heads += 2 / GRADIENT_BLOCKS
        if "fisher" in forms:
            each += self.layer(block_length, dtype, "weights")
            heads += 2
        again = sum(
            experts_of_token(KINDS[kind], self.shapes) / self.shapes["experts_per_token"]
            for kind in kinds
            if is_of_experts(KINDS[kind], self.shapes)
        )
        each += again * EXPERTS_AGAIN * forward
        each *= arch.layers
        each += heads * self.head(block_length, dtype) if heads else 0.0
        seconds = tokens * each + (self.numbers(kinds) + self.parameters) * self.copy_seconds()
        return cost, disk, START + seconds

    def approx(self, row: dict[str, str], jobs: int) -> tuple[Cost, int, float]:
        """One of several `jobs` that divide the layers of one checkpoint.

        Where ranks are allocated, losses have been computed before.
        """
        plan = Plan(choose(row))
        written, seconds = self.compressed(row)["parameters"], 0.0
        for component, rank in plan.ranks(self.arch).items():
            choice = plan.choices[component]
            own = self.solve(component, choice.mode, rank)
            seconds += own * (2 if choice.mode in ALLOCATED else 1)
            if choice.mode == SHARING[component] and not choice.shared:
                seconds += self.losses(component, choice.mode, rank)
        seconds *= self.arch.layers
        seconds += (self.parameters + written + self.numbers(plan.kinds())) * self.copy_seconds()
        disk = written * WIDTHS[self.arch.dtype] // jobs
        return approx_cost(self.shapes, jobs, plan.kinds()), disk, START + seconds / jobs

    def allocate(self, row: dict[str, str]) -> tuple[Cost, int, float]:
        """Losses at all ranks down to the least that a layer may get."""
        plan = Plan(choose(row))
        seconds = sum(
            self.losses(component, choice.mode, least_rank(self.arch, component))
            for component, choice in plan.shared.items()
        )
        kinds = {kind for component in plan.shared for kind in plan.mode(component).kinds}
        seconds *= self.arch.layers
        seconds += (self.parameters + self.numbers(kinds)) * self.copy_seconds()
        return approx_cost(self.shapes, 1, plan.kinds()), 0, START + seconds

    def quantise(self, row: dict[str, str]) -> tuple[Cost, int, float]:
        """Quantisation, estimated as one decomposition of each matrix by its input's statistic."""
        parameters = self.compressed(row)["parameters"]
        kinds = [kind for component in COMPONENTS for kind in find_mode(component, "svd-llm").kinds]
        seconds = self.arch.layers * sum(
            self.solve(component, "svd-llm", self.arch.full_rank(component))
            for component in COMPONENTS
        )
        seconds += 2 * parameters * self.copy_seconds()
        disk = parameters * WIDTHS[self.arch.dtype]
        return approx_cost(self.shapes, 1, kinds), disk, START + seconds

    def ppl(
        self, row: dict[str, str], tokens: int, block_length: int, dtype: str
    ) -> tuple[Cost, int, float]:
        """Scoring `tokens` tokens with the dense or a compressed model."""
        cost = perplexity_cost(self.shapes, tokens, block_length, dtype)
        return cost, 0, START + tokens * self.token_seconds(row, block_length, dtype)

    def harness(
        self, row: dict[str, str], items: int, shots: int, dtype: str
    ) -> tuple[Cost, int, float]:
        """One lm-eval task of items with four answers."""
        length = ITEM_TOKENS * (1 + shots)
        cost = harness_cost(self.shapes, items, shots, dtype)
        each = self.token_seconds(row, BATCH * length, dtype)
        return cost, 0, 2 * START + 4 * items * length * each

    def speed(
        self,
        row: dict[str, str],
        attention: list[str],
        batch: int,
        prompt: int,
        new_tokens: int,
        repeats: int,
        dtype: str,
    ) -> tuple[Cost, int, float]:
        """Timing a compressed model beside the dense one; the cache's growth is left out."""
        models = [self.shapes | {"size": size} for size in (self.arch.size, self.compressed(row))]
        counts = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens, "repeats": repeats}
        cost = speed_cost(models, len(attention), dtype=dtype, **counts)
        each = sum(
            tokens * self.token_seconds(modes, length, dtype)
            for modes in ({}, row)
            for tokens, length in ((batch * prompt, prompt), (batch * new_tokens, batch))
        )
        return cost, 0, START + (repeats + 1) * len(attention) * each

    def token_seconds(self, row: dict[str, str], block_length: int, dtype: str) -> float:
        """Seconds of a forward pass with head and softmax; compressed layers scale by FLOPs."""
        head = 2 * self.arch.hidden_size * self.arch.vocab_size
        dense, own = (s["flops_per_token"] - head for s in (self.arch.size, self.compressed(row)))
        layers = self.arch.layers * self.layer(block_length, dtype)
        return layers * own / dense + self.head(block_length, dtype)

    def compressed(self, row: dict[str, str]) -> dict[str, int]:
        """Sizes of a row's checkpoint; all biases are counted as if they were kept."""
        arch = self.arch
        plan = Plan(choose(row) if row else {})
        kept, factors = plan.dense_sizes(arch), plan.factors(arch)
        matrices = (3 if arch.mlp == "3-layer" else 2) * max(1, arch.experts)
        heads = arch.heads + arch.kv_heads
        parameters = arch.size["parameters"]
        for component, of_rank in {"qk": heads, "ov": heads, "mlp": matrices}.items():
            fewer = arch.hidden_size * of_rank * (arch.full_rank(component) - kept[component])
            for name, (m, n) in arch.matrix_shapes(component).items():
                fewer += m * n - factors[name] * (m + n) if name in factors else 0
            parameters -= fewer * sum(arch.solves(component, layer) for layer in range(arch.layers))
        ranks: list[Ranks] = [(kept["qk"], kept["ov"], kept["mlp"])] * arch.layers
        return sizes(self.shapes, ranks, parameters, arch.dtype, [factors] * arch.layers)

    @property
    def parameters(self) -> int:
        """Parameters of the dense model."""
        return self.arch.size["parameters"]

    def numbers(self, kinds: Iterable[str]) -> int:
        """Numbers in the statistics of these kinds."""
        shapes = (self.arch.statistic_shape(KINDS[kind]) for kind in kinds)
        return self.arch.layers * sum(map(math.prod, shapes))

    def _copy_seconds(self) -> float:
        """Seconds for one parameter: half of reading it as float64, packing, writing, hashing."""
        stored = torch.zeros(COPIED // 1024, 1024, dtype=getattr(torch, self.arch.dtype))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trial.safetensors")

            def copy() -> None:
                packed = stored.double().T.contiguous().to(stored.dtype)
                save_file({"x": packed}, path)
                sha256(path)

            return clock(copy, self.device) / stored.numel() / 2
