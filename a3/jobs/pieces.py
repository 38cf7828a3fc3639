"""Small pieces of a layer, which are timed on this machine, and the law by which their times grow.

A piece has the proportions of the model's layer, but fewer heads or channels. It is run by the code
that the stages run. Seconds of a larger layer follow from those of two sizes.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from a3.jobs.counts import Key, clock, counted, modelled, scaled
from a3.models.family import AttentionWeights, MLPWeights
from a3.models.shape import Arch
from a3.models.sizes import Ranks, sizes
from a3.numerics.assignment import assign
from a3.rxx.container import Accumulator
from a3.rxx.kinds import KINDS, is_of_experts
from a3.solutions.factors import Matrix
from a3.solutions.functions import losses_of, solver_of
from a3.solutions.modes import COMPONENTS, ONE_SIZE, SHARING, find_mode

# Floating-point operations of the longest piece, and the widths of pieces, by type of device.
PIECE_FLOPS = {"cpu": 1e10, "cuda": 1e12}

WIDTHS = {"cpu": (256, 768), "cuda": (1024, 4096)}

# Sizes of matrices in pieces of solutions.
SIZES = {"cpu": (256, 512), "cuda": (1024, 2048)}

# Query heads of a piece whose time grows with their number.
HEADS = 8

# Steps of an elimination in pieces.
STEPS = (4, 12)

# Statistics that cost as much as those of gradients.
ALIKE = {"gradient": "attention_input", "factors": "q_blocks"}


def grown(timed: Sequence[tuple[float, float]], size: float) -> float:
    """Seconds at `size`, by (size, seconds) of one or two smaller pieces, in ascending order.

    The law is a s + b s², with a and b not negative; one piece alone grows with its square.
    """
    last, most = timed[-1]
    less, step = timed[0][1], last / timed[0][0]
    # The share of the square.
    share = min(1.0, max(0.0, (1 - less * step / most) / (1 - 1 / step))) if step > 1 else 1.0
    growth = size / last
    return most * (share * growth**2 + (1 - share) * growth)


class Pieces:
    """Pieces of one layer of a model, on a device."""

    def __init__(self, arch: Arch, device: torch.device) -> None:
        self.arch = arch
        self.device = device
        self.widths = WIDTHS.get(device.type, WIDTHS["cpu"])
        self.sizes = SIZES.get(device.type, SIZES["cpu"])
        self.flops = PIECE_FLOPS.get(device.type, PIECE_FLOPS["cpu"])

    def narrow(self, heads: int) -> Arch:
        """The shapes of a layer with some of the query heads, and everything else in proportion.

        It is a Llama's, whose MLP is as wide as that of the experts that a token reaches.
        """
        arch = self.arch
        groups = max(1, arch.kv_heads * heads // arch.heads)
        while heads % groups:
            groups -= 1
        channels = arch.intermediate_size * max(1, arch.experts_per_token)
        return replace(
            arch,
            family="llama",
            mlp="3-layer",
            layers=1,
            hidden_size=arch.hidden_size // arch.heads * heads,
            heads=heads,
            kv_heads=groups,
            intermediate_size=max(1, channels * heads // arch.heads),
            experts=0,
            experts_per_token=0,
            rope_dims=arch.rope_dims or arch.head_dim,
            nope_layers=[],
            fixed={component: [] for component in COMPONENTS},
            rest=None,
            structure=None,
        )

    def heads(self, width: float) -> int:
        """How many query heads go with about so many hidden dimensions; at most all."""
        return min(self.arch.heads, max(1, round(width * self.arch.heads / self.arch.hidden_size)))

    def layer_flops(self, arch: Arch) -> int:
        """Floating-point operations of a token in one layer."""
        ranks: list[Ranks] = [(arch.head_dim, arch.head_dim, arch.intermediate_size)]
        known = sizes(arch.to_json() | {"vocab_size": 0}, ranks, 0, arch.dtype)
        return known["flops_per_token"]

    # --- passes over tokens ---

    def layer(self, block_length: int, dtype: str, gradient: str | None = None) -> float:
        """Seconds of one token in one layer; forward and backward with the gradients by
        `activations` or by `weights`, if one is named."""
        timed = [
            (heads, self.run(self.narrow(heads), block_length, dtype, gradient))
            for heads in sorted({self.heads(width) for width in self.widths})
        ]
        whole = self.narrow(self.arch.heads)
        outside = 2 * self.arch.hidden_size * self.arch.vocab_size
        each = (self.arch.size["flops_per_token"] - outside) / self.arch.layers
        return grown(timed, self.arch.heads) * each / self.layer_flops(whole)

    def run(self, piece: Arch, block_length: int, dtype: str, gradient: str | None) -> float:
        """Seconds of a token in a layer, as `layer` has it."""
        config = AutoConfig.for_model(
            "llama",
            hidden_size=piece.hidden_size,
            intermediate_size=piece.intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=piece.heads,
            num_key_value_heads=piece.kv_heads,
            head_dim=piece.head_dim,
            max_position_embeddings=block_length,
            vocab_size=2,
            bos_token_id=None,
            eos_token_id=None,
        )
        where = {"dtype": getattr(torch, dtype), "device": self.device}
        model = AutoModelForCausalLM.from_config(config, dtype=where["dtype"]).base_model
        model.to(self.device).eval().requires_grad_(gradient == "weights")
        length = min(block_length, max(32, int(self.flops / self.layer_flops(piece))))
        x = torch.rand(1, length, piece.hidden_size, **where)

        def call() -> None:
            with torch.inference_mode(gradient is None):
                given = x.detach().requires_grad_(gradient is not None)
                hidden = model(inputs_embeds=given, use_cache=False).last_hidden_state
                if gradient is not None:
                    hidden.sum().backward()

        return clock(call, self.device) / length

    def head(self, block_length: int, dtype: str) -> float:
        """Seconds of one token: logits and their loss."""
        d, vocab = self.arch.hidden_size, self.arch.vocab_size
        rows = min(vocab, max(32, int(self.flops / (2 * d * block_length))))
        where = {"dtype": getattr(torch, dtype), "device": self.device}
        hidden, weight = torch.ones(block_length, d, **where), torch.ones(rows, d, **where)
        labels = torch.zeros(block_length, dtype=torch.long, device=self.device)
        loss = nn.functional.cross_entropy
        seconds = clock(lambda: loss((hidden @ weight.T).float(), labels), self.device)
        return seconds * vocab / rows / block_length

    def statistic(self, kind: str, block_length: int, dtype: str) -> float:
        """Seconds to add one token to one layer's sums, which grow with the sums' numbers."""
        kind = ALIKE.get(KINDS[kind].form, kind)
        if KINDS[kind].form in ("fisher", "norm", "output") or KINDS[kind].site == "router":
            # Of the backward pass by weights; of the experts' outputs computed again; too little.
            return 0.0
        whole = self.narrow(self.arch.heads)
        known = whole.statistic_shape(KINDS[kind])
        full = KINDS[kind].form == "full"
        if full and is_of_experts(KINDS[kind], vars(self.arch)):
            # A matrix for each of the experts that a token reaches, not one of all their channels.
            n = self.arch.intermediate_size
            known = (self.arch.experts_per_token, n, n)
        heads = self.heads(self.widths[-1] * whole.hidden_size / known[-1]) if full else HEADS
        piece = self.narrow(min(heads, self.arch.heads))
        shape = piece.statistic_shape(KINDS[kind])
        width = shape[-1] * (shape[0] if KINDS[kind].form == "blocks" else 1)
        x = torch.rand(block_length, width, dtype=getattr(torch, dtype), device=self.device)
        accumulator = Accumulator(kind, piece.heads_of(KINDS[kind].site))
        seconds = clock(lambda: accumulator.add(0, x), self.device) / block_length
        return seconds * math.prod(known) / math.prod(shape)

    # --- solutions of one layer ---

    def solve(self, component: str, mode: str, rank: int) -> float:
        """Seconds to solve a component; of modes that eliminate, after that."""
        if find_mode(component, mode).factors:
            return self.factor(component, mode)
        if find_mode(component, mode).aligned:
            return self.alignment()
        if find_mode(component, mode).of_experts:
            return 0.0  # weights are copied or added up
        return self.of_component(component, mode, rank, partial(solving, component, mode))

    def alignment(self) -> float:
        """Seconds to put the channels of all experts in one order, at most: n³ operations each."""
        whole, n = self.arch.intermediate_size, min(self.arch.intermediate_size, self.sizes[0])
        seconds = clock(partial(assign, torch.rand(n, n)), torch.device("cpu"))
        return seconds * (whole / n) ** 3 * self.arch.experts

    def losses(self, component: str, mode: str, rank: int) -> float:
        """Seconds to eliminate down to a rank."""
        call = partial(partial, losses_of, component)
        return self.of_component(component, mode, rank, call, by_steps=True)

    def of_component(
        self,
        component: str,
        mode: str,
        rank: int,
        call: Callable[..., Any],
        by_steps: bool = False,
    ) -> float:
        """Seconds of what `call` makes of weights, statistics and rank, in the whole layer.

        Times grow with the number of key/value heads or channels, except where a statistic is a
        matrix of all of them: then operations are counted.
        """
        arch, chosen = self.arch, find_mode(component, mode)
        full = any(KINDS[kind].form == "full" for kind in chosen.kinds)

        def prepared(piece: Arch, rank: int = rank) -> Callable[[], Any]:
            with self.device:
                weights = mlp_weights(piece) if component == "mlp" else attention_weights(piece)
                read: list[Any] = [statistic(piece.statistic_shape(KINDS[k])) for k in chosen.kinds]
                if mode in ONE_SIZE:
                    read.append(torch.arange(piece.rope_dims // 2))
            own = rank
            if component == "mlp":
                own = max(1, rank * piece.intermediate_size // arch.intermediate_size)
            return call(weights, read, own)

        if component == "mlp" and full:
            each = self.by_counts(lambda n: prepared(self.channels(n)), arch.intermediate_size)
            return each * max(1, arch.experts)
        if component == "mlp":
            n = min(arch.intermediate_size, self.widths[-1])
            seconds = clock(prepared(replace(arch, intermediate_size=n, experts=0)), self.device)
            return seconds * arch.intermediate_size / n * max(1, arch.experts)
        if full and by_steps:
            return self.by_heads(prepared, rank)
        if full:
            whole = arch.hidden_size
            return self.by_counts(lambda d: prepared(self.attention(self.heads(d))), whole)
        groups = max(1, HEADS * arch.kv_heads // arch.heads)
        piece = replace(arch, heads=groups * arch.heads // arch.kv_heads, kv_heads=groups)
        return clock(prepared(piece), self.device) * arch.kv_heads / groups

    def channels(self, n: int) -> Arch:
        """The shapes of an MLP with n channels, and everything else in proportion."""
        d = max(1, self.arch.hidden_size * n // self.arch.intermediate_size)
        return replace(self.arch, hidden_size=d, intermediate_size=n, experts=0)

    def attention(self, heads: int) -> Arch:
        """The shapes of attention with some query heads, as wide, of at most two a group."""
        d = self.arch.hidden_size * heads // self.arch.heads
        pairs = heads % 2 == 0 and self.arch.kv_heads < self.arch.heads
        return replace(
            self.arch, hidden_size=d, heads=heads, kv_heads=heads // 2 if pairs else heads
        )

    def factor(self, component: str, mode: str) -> float:
        """Seconds to factor a component's matrices, by operations."""
        kinds = find_mode(component, mode).factors
        shapes = [
            (shape, kinds[name])
            for name, shape in self.arch.matrix_shapes(component).items()
            if name in kinds
        ]
        known = {key: self.factor_one(*key) for key in set(shapes)}
        return sum(known[key] for key in shapes)

    def factor_one(self, shape: tuple[int, int], kind: str | None) -> float:
        """Seconds to factor one matrix by its metric."""
        whole, of_output = max(shape), kind == "down_output"

        def prepared(size: int) -> Callable[[], Any]:
            m, n = (max(1, side * size // whole) for side in shape)
            R = None
            with self.device:
                if kind is not None:
                    full = KINDS[kind].form == "full"
                    R = statistic(((n, n) if of_output else (m, m)) if full else (m,))
                return partial(Matrix(random(m, n), R, of_output).factor, 1)

        return self.by_counts(prepared, whole)

    def by_counts(self, prepared: Callable[[int], Callable[[], Any]], whole: int) -> float:
        """Seconds of a call at the size `whole`, by its operations at two smaller sizes."""
        sizes = (min(whole, self.sizes[0]), min(whole, self.sizes[1]))
        calls = [prepared(size) for size in sizes]
        less, more = (counted(call) for call in calls)
        return self.fitted(calls, [less, more], scaled(less, more, sizes, whole))

    def by_heads(self, prepared: Callable[[Arch, int], Callable[[], Any]], rank: int) -> float:
        """Like `by_counts`, of query heads, and of the steps from a full head to `rank`.

        Operations grow with the number of steps, of which pieces take only some.
        """
        whole, h = self.arch.heads, self.arch.head_dim
        sizes = tuple(max(1, self.heads(2 * size) // 2 * 2) for size in self.sizes)
        first, second = sizes
        few, some = (min(h - rank, steps) for steps in STEPS)
        calls = [prepared(self.attention(heads), h - some) for heads in sizes]
        counts = [counted(call) for call in calls]
        full = counts
        if h - rank > some:
            more = (h - rank - few) / (some - few)
            full = []
            for heads, known in zip(sizes, counts, strict=True):
                less = counted(prepared(self.attention(heads), h - few))
                all_steps = {k: round(less[k] + more * (n - less[k])) for k, n in known.items()}
                full.append(Counter(all_steps))
        return self.fitted(calls, counts, scaled(full[0], full[1], (first, second), whole))

    def fitted(
        self, calls: list[Callable[[], Any]], counts: list[Counter[Key]], large: Mapping[Key, float]
    ) -> float:
        """Seconds of `large` counts of operations, by the counts and seconds of two smaller calls.

        Seconds are what operations should take, times a factor, and a constant (a call of torch
        takes longer than adding two numbers does). The factor is within 2 of one.
        """
        took = [clock(call, self.device) for call in calls]
        should = [modelled(one, self.device) for one in counts]
        factor = took[1] / should[1]
        if should[1] > 1.5 * should[0]:
            factor = (took[1] - took[0]) / (should[1] - should[0])
        factor = min(2.0, max(0.5, factor))
        return took[1] + factor * (modelled(large, self.device) - should[1])


def solving(
    component: str, mode: str, weights: Any, read: list[Any], rank: int
) -> Callable[[], Any]:
    """A mode's function, with what it needs."""
    prior = [1.0] if find_mode(component, mode).prior else []
    eliminates = mode == SHARING[component]
    known = [losses_of(component, weights, read, rank)] if eliminates else []
    return partial(solver_of(component, mode), weights, *read, *prior, rank, *known)


def attention_weights(arch: Arch) -> AttentionWeights:
    """Random weights of attention."""
    heads, groups, d, h = arch.heads, arch.kv_heads, arch.hidden_size, arch.head_dim
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


def mlp_weights(arch: Arch) -> MLPWeights:
    """Random weights of an MLP."""
    d, n, dtype = arch.hidden_size, arch.intermediate_size, getattr(torch, arch.dtype)
    gate = torch.ones(d, n, dtype=dtype) if arch.mlp == "3-layer" else None
    return MLPWeights(torch.ones(d, n, dtype=dtype), gate, random(n, d).to(dtype))


def random(*shape: int) -> Tensor:
    """Weights, float64."""
    return torch.rand(shape, dtype=torch.float64)


def statistic(shape: tuple[int, ...]) -> Tensor:
    """A random statistic of a layer: a vector, or positive definite matrices."""
    x = random(*shape)
    if len(shape) < 2 or shape[-1] != shape[-2]:
        return x
    R = x.mT @ x
    R.diagonal(dim1=-2, dim2=-1).add_(shape[-1])
    return R
