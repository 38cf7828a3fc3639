"""Runs and solves one layer with random weights on this machine, to time it."""

import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors.torch import save_file
from torch import Tensor, nn

from a3.core.dtypes import WIDTHS
from a3.core.files import sha256
from a3.core.memory import memory_at_hand
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
from a3.models.family import AttentionWeights, MLPWeights
from a3.models.layerwise import empty_on
from a3.models.load import load_config
from a3.models.sizes import Ranks, sizes
from a3.rxx.container import Accumulator
from a3.rxx.kinds import GRADIENT_BLOCKS, GRADIENT_FORMS, KINDS, SAMPLED_FORMS, Kind, stored_bytes
from a3.solutions.factors import Matrix
from a3.solutions.functions import solver_of
from a3.solutions.modes import ALLOCATED, COMPONENTS, choose, find_mode
from a3.solutions.plan import LEAST, Plan
from a3.stages.collect.hooks import attach_all

# Seconds of Python, torch, transformers and the tokenizer before a job begins.
START = 5.0

# For the harness: tokens of a short item with one of its four answers, and items per batch.
ITEM_TOKENS, BATCH = 20, 8

# Cost of a pass with gradients, in passes without.
BACKWARD = 3

# Numbers of tokens, groups and channels that keep the trial of a layer to seconds.
TRIAL_FLOPS, TRIAL_GROUPS, TRIAL_CHANNELS = 5e10, 4, 4096

# Number of dimensions for decompositions, whose time grows with its cube.
TRIAL_SIZE = 512


class Trial:
    """A model's folder (at least config.json); one of its layers is timed here when needed."""

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        self.folder = folder
        self.device = torch.device(device)
        self.arch = load_arch(folder) if (folder / "arch.json").exists() else sketch(folder)
        self.shapes = self.arch.to_json()
        # Seconds for one token, layer, component or parameter; each setting is timed once.
        self.layer_seconds = cache(self._layer_seconds)
        self.head_seconds = cache(self._head_seconds)
        self.component_seconds = cache(self._component_seconds)
        self.copy_seconds = cache(self._copy_seconds)

    # --- stages: (cost, bytes on disk, seconds) ---

    def collect(
        self, kinds: list[str], tokens: int, block_length: int, dtype: str
    ) -> tuple[Cost, int, float]:
        """One pass over `tokens` tokens; layer by layer where the weights do not fit."""
        arch = self.arch
        cost = collect_cost(self.shapes, tokens, block_length, dtype, kinds)
        disk = sum(stored_bytes(self.shapes, kind) for kind in kinds)
        if cost.memory > memory_at_hand():
            cost = stream_cost(self.shapes, tokens, block_length, dtype, kinds)
            disk += tokens * arch.hidden_size * WIDTHS[dtype]
        forms = {KINDS[kind].form for kind in kinds}
        hooked = tuple(kind for kind in kinds if KINDS[kind].form not in GRADIENT_FORMS)
        each = self.layer_seconds(block_length, dtype, hooked)
        passes = ("fisher" in forms) + (not forms.isdisjoint(SAMPLED_FORMS)) / GRADIENT_BLOCKS
        each += passes * BACKWARD * self.layer_seconds(block_length, dtype, ())
        return cost, disk, START + tokens * arch.layers * each

    def approx(self, row: dict[str, str], jobs: int) -> tuple[Cost, int, float]:
        """One of several `jobs` that divide the layers of one checkpoint."""
        plan = Plan(choose(row))
        ranks = plan.ranks(self.arch)
        written = self.compressed(row)["parameters"]
        seconds = self.arch.layers * sum(
            self.component_seconds(component, plan.choices[component].mode, rank)
            for component, rank in ranks.items()
        )
        seconds += (self.arch.size["parameters"] + written) * self.copy_seconds()
        disk = written * WIDTHS[self.arch.dtype] // jobs
        return approx_cost(self.shapes, jobs, plan.kinds()), disk, START + seconds / jobs

    def allocate(self, row: dict[str, str]) -> tuple[Cost, int, float]:
        """Losses at all ranks, which cost as much as the solution at the smallest rank."""
        plan = Plan(choose(row))
        seconds = 0.0
        for component, choice in plan.shared.items():
            least = max(2, int(LEAST * self.arch.full_rank(component)) // 2 * 2)
            seconds += self.arch.layers * self.component_seconds(component, choice.mode, least)
        return approx_cost(self.shapes, 1, plan.kinds()), 0, START + seconds

    def quantise(self, row: dict[str, str]) -> tuple[Cost, int, float]:
        """Quantisation, estimated as one decomposition of each matrix by its input's statistic."""
        parameters = self.compressed(row)["parameters"]
        kinds = [kind for component in COMPONENTS for kind in find_mode(component, "svd-llm").kinds]
        seconds = self.arch.layers * sum(
            self.component_seconds(component, "svd-llm", self.arch.full_rank(component))
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
        layers = self.arch.layers * self.layer_seconds(block_length, dtype, ())
        return layers * own / dense + self.head_seconds(block_length, dtype)

    def compressed(self, row: dict[str, str]) -> dict[str, int]:
        """Sizes of a row's checkpoint; all biases are counted as if they were kept."""
        arch = self.arch
        plan = Plan(choose(row) if row else {})
        kept, factors = plan.dense_sizes(arch), plan.factors(arch)
        gone = {component: arch.full_rank(component) - kept[component] for component in COMPONENTS}
        matrices = (3 if arch.mlp == "3-layer" else 2) * max(1, arch.experts)
        layer = (arch.heads + arch.kv_heads) * (gone["qk"] + gone["ov"]) + matrices * gone["mlp"]
        fewer = arch.hidden_size * layer
        for component in COMPONENTS:
            for name, (m, n) in arch.matrix_shapes(component).items():
                fewer += m * n - factors[name] * (m + n) if name in factors else 0
        parameters = arch.size["parameters"] - arch.layers * fewer
        ranks: list[Ranks] = [(kept["qk"], kept["ov"], kept["mlp"])] * arch.layers
        return sizes(self.shapes, ranks, parameters, arch.dtype, [factors] * arch.layers)

    # --- trials, in seconds ---

    def _layer_seconds(self, block_length: int, dtype: str, kinds: tuple[str, ...]) -> float:
        """Seconds of one token in one layer, with statistics of these kinds."""
        trunk = self.one_layer(dtype)
        flops = self.arch.size["flops_per_token"] / self.arch.layers
        length = min(block_length, max(32, int(TRIAL_FLOPS / flops)))
        ids = torch.zeros(1, length, dtype=torch.long, device=self.device)
        heads = {kind: self.arch.heads_of(KINDS[kind].site) for kind in kinds}
        accumulators = {kind: Accumulator(kind, heads[kind]) for kind in kinds}
        attach_all(self.arch, accumulators, trunk, 0)
        return self.clock(lambda: trunk(ids, use_cache=False)) / length

    def one_layer(self, dtype: str) -> nn.Module:
        """The trunk with one layer; random weights, zero embeddings (which take no memory)."""
        config = load_config(self.folder)
        config.num_hidden_layers = 1
        trunk = empty_on(config, dtype, self.device).base_model
        for name, weight in list(trunk.named_parameters()):
            fill = 0.01 if name.startswith(self.arch.adapter.layer_path) else 0.0
            make = partial(torch.full, fill_value=fill) if fill else torch.zeros
            value = make(tuple(weight.shape), dtype=getattr(torch, dtype))
            set_module_tensor_to_device(trunk, name, self.device, value=value)
        return trunk

    def _head_seconds(self, block_length: int, dtype: str) -> float:
        """Seconds of one token: logits and their loss."""
        d, vocab = self.arch.hidden_size, self.arch.vocab_size
        rows = min(vocab, max(32, int(TRIAL_FLOPS / (2 * d * block_length))))
        where = {"dtype": getattr(torch, dtype), "device": self.device}
        hidden, weight = torch.ones(block_length, d, **where), torch.ones(rows, d, **where)
        labels = torch.zeros(block_length, dtype=torch.long, device=self.device)
        loss = nn.functional.cross_entropy
        seconds = self.clock(lambda: loss((hidden @ weight.T).float(), labels))
        return seconds * vocab / rows / block_length

    def _component_seconds(self, component: str, mode: str, rank: int) -> float:
        """Seconds to solve one component of a layer."""
        if find_mode(component, mode).factors:
            return self.factor_seconds(component, mode)
        if component == "mlp":
            return self.mlp_seconds(mode, rank)
        groups = min(self.arch.kv_heads, TRIAL_GROUPS)
        weights, chosen = self.attention_weights(groups), find_mode(component, mode)
        read = [self.of_heads(KINDS[kind], groups, len(weights.q)) for kind in chosen.kinds]
        if mode == "uniform-global":
            read.append(torch.arange(self.arch.rope_dims // 2))
        prior = [1.0] if chosen.prior else []
        solve = partial(solver_of(component, mode), weights, *read, *prior, rank)
        return self.clock(solve) * self.arch.kv_heads / groups

    def mlp_seconds(self, mode: str, rank: int) -> float:
        """Seconds to solve one layer's MLP, extrapolated from a smaller one."""
        chosen = find_mode("mlp", mode)
        forms = [KINDS[kind].form for kind in chosen.kinds]
        full = "full" in forms
        channels = min(self.arch.intermediate_size, TRIAL_SIZE if full else TRIAL_CHANNELS)
        scale = channels / self.arch.intermediate_size
        share = (scale**3 if full else scale) / max(1, self.arch.experts)
        sizes = {"full": channels, "gradient": self.arch.hidden_size}
        read = [gram(1, sizes[form])[0] if form in sizes else random(channels) for form in forms]
        prior = [1.0] if chosen.prior else []
        small = max(1, int(rank * scale))
        weights = self.mlp_weights(channels)
        return self.clock(partial(solver_of("mlp", mode), weights, *read, *prior, small)) / share

    def of_heads(self, kind: Kind, groups: int, heads: int) -> Tensor:
        """A random attention statistic with some of the heads."""
        count, arch = groups if kind.site in "kv" else heads, self.arch
        if kind.form == "blocks":
            return gram(count, arch.head_dim)
        if kind.form == "factors":
            return gram(count, arch.rope_dims)
        if kind.form == "mean":
            return random(count * arch.head_dim)
        if kind.form in ("full", "gradient"):
            of_input = kind.site == "o_input"
            return gram(1, count * arch.head_dim if of_input else arch.hidden_size)[0]
        return random(arch.hidden_size)

    def factor_seconds(self, component: str, mode: str) -> float:
        """Seconds to factor a component's matrices, from smaller ones of the same proportions."""
        kinds, total = find_mode(component, mode).factors, 0.0
        for name, (m, columns) in self.arch.matrix_shapes(component).items():
            if name not in kinds:
                continue
            scale = min(1.0, TRIAL_SIZE / max(m, columns))
            m, columns = (max(2, int(size * scale)) for size in (m, columns))
            R = gram(1, m)[0] if kinds[name] else None
            matrix = Matrix(random(m, columns), R)
            total += self.clock(partial(matrix.factor, 1)) / scale**3
        return 2 * total if mode in ALLOCATED else total

    def attention_weights(self, groups: int) -> AttentionWeights:
        """Random weights of some key/value heads and their query heads."""
        arch = self.arch
        heads, d, h = groups * arch.heads // arch.kv_heads, arch.hidden_size, arch.head_dim
        gains = {}
        if arch.qk_norm:
            gains = {"q_gain": torch.ones(heads, h), "k_gain": torch.ones(groups, h)}
        return AttentionWeights(
            q=random(heads, d, h),
            k=random(groups, d, h),
            v=random(groups, d, h),
            o=random(heads, h, d),
            rope_dims=arch.rope_dims,
            norm=arch.qk_norm,
            **{name: gain.double() for name, gain in gains.items()},
        )

    def mlp_weights(self, channels: int) -> MLPWeights:
        """Random weights of some channels."""
        d, dtype = self.arch.hidden_size, getattr(torch, self.arch.dtype)
        gate = torch.zeros(d, channels, dtype=dtype) if self.arch.mlp == "3-layer" else None
        up, down = torch.zeros(d, channels, dtype=dtype), torch.zeros(channels, d, dtype=dtype)
        return MLPWeights(up, gate, down)

    def _copy_seconds(self) -> float:
        """Seconds for one parameter: half of reading it as float64, packing, writing, hashing."""
        stored = torch.zeros(TRIAL_CHANNELS, 1024, dtype=getattr(torch, self.arch.dtype))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trial.safetensors")

            def copy() -> None:
                packed = stored.double().T.contiguous().to(stored.dtype)
                save_file({"x": packed}, path)
                sha256(path)

            return self.clock(copy) / stored.numel() / 2

    def clock(self, call: Callable[[], Any]) -> float:
        """Seconds of the second of two calls; the first one warms up."""
        seconds = 0.0
        with torch.inference_mode():
            for _ in range(2):
                start = time.perf_counter()
                call()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
        return seconds


def random(*shape: int) -> Tensor:
    """Weights, float64."""
    return torch.rand(shape, dtype=torch.float64)


def gram(count: int, size: int) -> Tensor:
    """Statistics of `count` heads, (count, size, size)."""
    x = random(count, 2 * size, size)
    return x.mT @ x
