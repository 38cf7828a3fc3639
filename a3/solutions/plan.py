"""The plan of an experiment for a model; it is checked before anything long runs."""

import math
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from a3.core.errors import A3Error
from a3.models.arch import load_arch
from a3.models.shape import Arch
from a3.solutions.factors import rank_for
from a3.solutions.modes import (
    COMPONENTS,
    DENSE,
    EXPERTS,
    ONE_SIZE,
    SERVABLE,
    SHARED,
    STOCK_STEPS,
    Choice,
    Mode,
    check_fit,
    choose,
    find_mode,
    kinds_needed,
    rank_of,
)
from a3.solutions.taken import HEADS, Taken, require_smaller
from a3.solutions.target import Target

# Allocation keeps at least this share of a component in each layer: a second-order loss is not
# reliable for larger changes.
LEAST = 0.125


@dataclass(frozen=True)
class Plan:
    """What to do to each component that is compressed: {"qk": choice, …}.

    `servable`: head sizes are rounded to the nearest that fused kernels of serving runtimes
    support. `multiple`: ranks from a ratio are rounded to the nearest multiple of it, which may run
    faster. `runtime` (a3.solutions.runtime): they are rounded to sizes that it takes.
    """

    choices: dict[str, Choice]
    servable: bool = False
    multiple: int = 1
    runtime: str | None = None

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise A3Error(f"multiple is {self.multiple}; expected 1 or more.")
        if self.servable and self.shared_heads:
            raise A3Error(
                f"servable: {' and '.join(self.shared_heads)} are marked {SHARED}, so the "
                "allocation chooses sizes of heads; serving runtimes need one of a few. Give each "
                "its own ratio or rank, or remove --servable."
            )
        if self.runtime is not None:
            self.taken.require_modes()

    @property
    def taken(self) -> Taken:
        """What its runtime takes."""
        return Taken(self.runtime, self.choices)

    def kinds(self) -> list[str]:
        """Statistics that the modes read."""
        return kinds_needed(self.choices)

    def check(self, model_folder: Path) -> None:
        """Raise A3Error now for everything that allocate or approx would refuse later.

        That is: a mode does not fit the model, a component would vanish, or it cannot be allocated.
        """
        arch = load_arch(model_folder)
        self.ranks(arch)
        self.check_sharing(arch)

    def check_sharing(self, arch: Arch) -> None:
        """Raise A3Error if a component with an allocated ratio cannot do so in this model."""
        whole = self.whole(arch)
        for component, choice in self.shared.items():
            if component == "qk":
                require_whole_rope(arch)
            # The budget is the size at this ratio before rounding; others give what this one keeps.
            rank = component_rank(arch, component, choice, 1)
            if component not in whole:
                require_room(arch, component, rank, self.step(arch, component))

    def whole(self, arch: Arch) -> list[str]:
        """The components with an allocated ratio that keep their size, since the runtime takes no
        smaller one of them, and does of others.
        """
        runtime = self.runtime is not None
        found = [one for one in self.shared if runtime and len(self.allowed(arch, one)) == 1]
        return found if len(found) < len(self.shared) else []

    def ranks(self, arch: Arch) -> dict[str, int]:
        """Rank of each compressed component; raises A3Error if its mode or size does not fit."""
        if not self.choices:
            raise A3Error(f"qk, ov and mlp are all {DENSE!r}: nothing to do. Name a mode for one.")
        if self.runtime is not None:
            self.taken.require_multiples(arch, HEADS if self.servable else ())
        whole = self.whole(arch)
        multiples = {one: 1 if one in whole else self.rounding(arch, one) for one in self.choices}
        ranks = {
            component: component_rank(arch, component, choice, multiples[component])
            for component, choice in self.choices.items()
        }
        ranks |= {component: arch.full_rank(component) for component in whole}
        if self.servable:
            ranks = servable_ranks(arch, ranks, self.taken.head_step(arch))
        if self.runtime is not None:
            self.taken.require_ratios(arch, ranks, self.factors_of(arch, ranks))
            self.taken.require_one_head(arch, ranks)
        return ranks

    def dense_sizes(self, arch: Arch) -> dict[str, int]:
        """Sizes of heads and MLP that the model gets: full where matrices are only factored, or
        experts only made fewer.
        """
        ranks = self.ranks(arch) if self.choices else {}
        return {
            component: ranks[component]
            if component in ranks and not self.mode(component).keeps_sizes
            else arch.full_rank(component)
            for component in COMPONENTS
        }

    def factors(self, arch: Arch) -> dict[str, int]:
        """Rank of each matrix that becomes two factors, where all layers have the same."""
        return self.factors_of(arch, self.ranks(arch) if self.choices else {})

    def factors_of(self, arch: Arch, ranks: dict[str, int]) -> dict[str, int]:
        """`factors` of the components' ranks."""
        found: dict[str, int | None] = {}
        for component, rank in ranks.items():
            if self.mode(component).factors:
                found |= factor_ranks(arch, component, self.mode(component), rank, self.inner)
        return {name: rank for name, rank in found.items() if rank is not None}

    @property
    def shared(self) -> dict[str, Choice]:
        """The components with an allocated ratio."""
        return {component: choice for component, choice in self.choices.items() if choice.shared}

    @property
    def shared_heads(self) -> tuple[str, ...]:
        """The components of heads with an allocated ratio."""
        return tuple(component for component in self.shared if component != "mlp")

    @property
    def one_size(self) -> tuple[str, ...]:
        """The components of heads whose allocated rank is the same in all layers, and for both."""
        heads = self.shared_heads
        return heads if any(self.choices[one].mode in ONE_SIZE for one in heads) else ()

    @property
    def target(self) -> Target | None:
        """What the model has to meet, where no ratio says it."""
        sizes = [choice.size for choice in self.choices.values()]
        return next((size for size in sizes if isinstance(size, Target)), None)

    def written(self, arch: Arch) -> Arch:
        """A dense model in the dtype that the compressed one is written in."""
        return arch.in_dtype(self.stored) if self.stored else arch

    @property
    def stored(self) -> str | None:
        """The dtype that the compressed model is written in, None for the dense model's dtypes."""
        return self.target.stored if self.target else None

    def allowed(self, arch: Arch, component: str) -> list[int]:
        """The ranks that a layer may get of a component with an allocated ratio, descending."""
        alike = self.one_size if component in self.one_size else (component,)
        steps = [math.lcm(2 if one == "qk" else 1, self.step(arch, one)) for one in alike]
        least, full = max(least_rank(arch, one) for one in alike), arch.full_rank(component)
        step = math.lcm(*steps)
        return [full, *(rank for rank in range(full - 1, least - 1, -1) if rank % step == 0)]

    def said(self) -> str:
        """The modes, as tables join them."""
        return "+".join(choice.name for choice in self.choices.values())

    def step(self, arch: Arch, component: str) -> int:
        """Of what an allocated rank of a component is a multiple."""
        plain = self.runtime is None and self.multiple == 1
        return STOCK_STEPS[component] if self.one_size and plain else self.rounding(arch, component)

    def rounding(self, arch: Arch, component: str) -> int:
        """Of what a rank from a ratio is a multiple, by the options of the plan."""
        latent = component in self.choices and self.mode(component).latent
        return math.lcm(1 if latent else self.multiple, self.taken.step(arch, component))

    @property
    def inner(self) -> int:
        """Of what the rank of two factors is a multiple."""
        return math.lcm(self.multiple, self.taken.asked.inner)

    @property
    def uniform(self) -> tuple[str, ...]:
        """The components that its runtime wants in one size in all layers, of those allocated."""
        wanted = self.taken.asked.uniform
        return tuple(component for component in wanted if component in self.shared)

    def mode(self, component: str) -> Mode:
        """The mode of a component."""
        return find_mode(component, self.choices[component].mode)


def factor_ranks(
    arch: Arch, component: str, mode: Mode, rank: int, multiple: int
) -> dict[str, int | None]:
    """Ranks of a component's projections as factors, at its `rank`; None: it stays."""
    kept = rank / arch.full_rank(component)
    if mode.latent:
        return {"k": arch.kv_heads * rank if kept < 1 else None}
    shapes = arch.matrix_shapes(component)
    return {name: rank_for(shape, kept, multiple) for name, shape in shapes.items()}


def component_rank(arch: Arch, component: str, choice: Choice, multiple: int) -> int:
    """Rank of one component; raises A3Error if its mode or size does not fit the model.

    The rank from a ratio is rounded to a `multiple`; for factored matrices, their ranks are.
    """
    require_fit(arch, component, choice.mode)
    full, size = arch.full_rank(component), choice.size
    if isinstance(size, Target):
        return full  # how much is removed is known when ranks are allocated
    mode = find_mode(component, choice.mode)
    if mode.of_experts:
        return experts_kept(arch, choice.mode, size)
    # A head with full RoPE consists of pairs.
    step = 2 if component == "qk" and arch.rope_dims == arch.head_dim else 1
    if isinstance(size, Decimal) and (mode.latent or not mode.factors):
        step = math.lcm(step, multiple)
    least = 2 if component == "qk" and arch.rope_layout else 1
    try:
        return rank_of(full, size, step, least)
    except A3Error as error:
        require_smaller(component, full, step)
        raise A3Error(f"{component} mode {choice.mode!r}: {error}") from None


def experts_kept(arch: Arch, mode: str, size: Decimal | int) -> int:
    """How many experts a mode leaves; A3Error for fewer than a token takes if others are dropped.

    If they are merged with others, a token may take fewer than it did.
    """
    if not isinstance(size, Decimal) and size > arch.experts:
        raise A3Error(
            f"mlp mode {mode!r}: keeps {size} experts, and a layer has {arch.experts}. Keep fewer."
        )
    drops = find_mode("mlp", mode).drops
    try:
        return rank_of(arch.experts, size, least=arch.experts_per_token if drops else 1)
    except A3Error:
        taken = f", of which a token takes {arch.experts_per_token}" if drops else ""
        raise A3Error(
            f"mlp mode {mode!r}: {size} leaves too few of {arch.experts} experts{taken}. Take a "
            "smaller ratio or more experts."
        ) from None


def require_fit(arch: Arch, component: str, mode: str) -> None:
    """Raise A3Error if a mode does not fit the model's attention or MLP."""
    if not any(arch.solves(component, layer) for layer in range(arch.layers)):
        raise A3Error(
            f"{component} mode {mode!r}: a3 leaves {component} of {arch.family} as it is, and "
            f"a3 families says why. Take {DENSE} (--{component} {DENSE})."
        )
    mlp = EXPERTS if arch.experts else arch.mlp
    check_fit(component, mode, mlp if component == "mlp" else arch.attention)
    if mode == "uniform-contiguous" and (why := no_whole_rope(arch)):
        raise A3Error(
            f"qk mode {mode!r}: {why}, and RoPE stays plain only where it turns whole heads of all "
            "layers. Take uniform-global."
        )
    chosen = find_mode(component, mode)
    if (chosen.drops or "router_logits" in chosen.kinds) and not arch.routes:
        raise A3Error(
            f"mlp mode {mode!r}: a3 does not know which tensor routes tokens in {arch.family}, so "
            "that no expert can be dropped, or compared with others by its logits. Take hc-smoe, "
            "or a mode that makes experts smaller."
        )
    if component != "mlp" and chosen.factors and arch.runs_own_attention:
        raise A3Error(
            f"{component} mode {mode!r}: matrices of attention cannot be factored in "
            f"{arch.family}, whose own code runs with them. Take a mode that makes heads smaller, "
            f"or {DENSE}."
        )


def require_whole_rope(arch: Arch) -> None:
    """Raise A3Error unless every layer rotates whole heads: a curve would say too little."""
    if why := no_whole_rope(arch):
        raise A3Error(
            f"qk: {why}, and ranks are allocated for whole RoPE only. Give qk its own ratio: "
            "--qk fisher@0.2."
        )


def no_whole_rope(arch: Arch) -> str | None:
    """Why not every layer rotates whole heads; None if each does."""
    if arch.rope_dims != arch.head_dim:
        return f"{arch.rope_dims} of {arch.head_dim} dimensions of a head are rotated"
    nope = [layer for layer in arch.nope_layers if arch.solves("qk", layer)]
    return f"layer {nope[0]} has no RoPE" if nope else None


def least_rank(arch: Arch, component: str) -> int:
    """The least rank that a layer may get of a component with an allocated ratio."""
    least = max(1, int(LEAST * arch.full_rank(component)))
    return 2 * max(1, least // 2) if component == "qk" else least


def require_room(arch: Arch, component: str, rank: int, multiple: int) -> None:
    """Raise A3Error if the same rank for all layers is none that a layer may get."""
    least = least_multiple(arch, component, multiple)
    if rank < min(least, arch.full_rank(component)):
        require_smaller(component, arch.full_rank(component), multiple)
        step = math.lcm(multiple, 2) if component == "qk" else multiple
        raise A3Error(
            f"allocate: this ratio leaves {component} rank {rank} of {arch.full_rank(component)}, "
            f"and no layer gets less than {least} (an eighth, and a multiple of {step}). Take a "
            "smaller ratio or multiple."
        )


def least_multiple(arch: Arch, component: str, multiple: int) -> int:
    """The least multiple that is a rank which a layer may get."""
    step = math.lcm(multiple, 2) if component == "qk" else multiple
    return -(-least_rank(arch, component) // step) * step


def servable_ranks(arch: Arch, ranks: dict[str, int], step: int) -> dict[str, int]:
    """Ranks whose heads have the servable size nearest to the larger of them; QK and OV share it.

    It is a multiple of `step`. A component at full size is unchanged. Raises A3Error if no size is
    smaller than the dense one.
    """
    heads = {p: ranks[p] for p in ("qk", "ov") if ranks.get(p, arch.head_dim) < arch.head_dim}
    if not heads:
        return ranks
    smaller = [size for size in SERVABLE if size < arch.head_dim and size % step == 0]
    if not smaller:
        sizes = ", ".join(map(str, SERVABLE))
        raise A3Error(
            f"servable: heads have {arch.head_dim} dimensions, and kernels of serving runtimes are "
            f"for {sizes}: none is smaller. Compress the MLP alone (--qk dense --ov dense), or "
            "leave out --servable for runtimes that take any size."
        )
    wanted = max(heads.values())
    return ranks | dict.fromkeys(heads, min(smaller, key=lambda size: (abs(size - wanted), -size)))


def check_experiments(model_folder: Path, experiments: list[dict[str, str]]) -> None:
    """Raise A3Error, with the row, for the first experiment that does not fit the model.

    Rows are {"qk": …, "ov": …, "mlp": …, "ratio": …}; what else they say is for the message.
    """
    arch = load_arch(model_folder)
    for row in experiments:
        choices = choose(row)
        try:
            for component, choice in choices.items():
                component_rank(arch, component, choice, 1)
            Plan(choices).check_sharing(arch)
        except A3Error as error:
            said = ", ".join(f"{key} {value}" for key, value in row.items())
            raise A3Error(f"experiment {said}: {error}") from error
