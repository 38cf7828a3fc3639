"""What an experiment asks of a model, checked before anything long runs."""

import math
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from a3.core.errors import A3Error
from a3.models.arch import Arch, load_arch
from a3.solutions.factors import rank_for
from a3.solutions.modes import (
    DENSE,
    EXPERTS,
    PARTS,
    SERVABLE,
    SHARED,
    Choice,
    Mode,
    check_fit,
    choose,
    find_mode,
    kinds_needed,
    rank_of,
)

# No part of a layer that shares out a ratio keeps less than this share: a second-order loss says
# nothing so far away.
LEAST = 0.125


@dataclass(frozen=True)
class Plan:
    """What to do to each part that is compressed: {"qk": choice, …}.

    `servable`: heads get the nearest of the sizes that fused kernels of serving runtimes have.
    `multiple`: a ratio leaves the nearest multiple of it, which hardware may like better.
    """

    choices: dict[str, Choice]
    servable: bool = False
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise A3Error(f"multiple is {self.multiple}; expected 1 or more.")
        shared = [part for part, choice in self.choices.items() if choice.shared and part != "mlp"]
        if self.servable and shared:
            raise A3Error(
                f"servable: {' and '.join(shared)} share out a ratio ({SHARED}), which makes heads "
                "differ by layer; serving runtimes want one size. Give them a ratio or rank each, "
                "or leave out --servable."
            )

    def kinds(self) -> list[str]:
        """Statistics that the modes read."""
        return kinds_needed(self.choices)

    def check(self, model_folder: Path) -> None:
        """Raise A3Error for what allocate or approx would refuse of it, before they run.

        A mode does not fit the model, nothing would be left of a part, or it cannot share a ratio.
        """
        arch = load_arch(model_folder)
        self.ranks(arch)
        self.check_sharing(arch)

    def check_sharing(self, arch: Arch) -> None:
        """Raise A3Error where a part that shares out a ratio cannot do so in this model."""
        for part, choice in self.shared.items():
            if part == "qk":
                require_whole_rope(arch)
            # What the ratio leaves before it is rounded makes the budget.
            require_room(arch, part, part_rank(arch, part, choice, 1), self.multiple)

    def ranks(self, arch: Arch) -> dict[str, int]:
        """Rank of each compressed part; raises A3Error where its mode or size does not fit."""
        if not self.choices:
            raise A3Error(f"qk, ov and mlp are all {DENSE!r}: nothing to do. Name a mode for one.")
        ranks = {
            part: part_rank(arch, part, choice, self.multiple)
            for part, choice in self.choices.items()
        }
        return servable_ranks(arch, ranks) if self.servable else ranks

    def dense_sizes(self, arch: Arch) -> dict[str, int]:
        """Sizes of heads and MLP that the model gets: full where matrices are only factored."""
        ranks = self.ranks(arch) if self.choices else {}
        return {
            part: ranks[part] if part in ranks and not self.mode(part).factors else full
            for part, full in ((part, arch.full_rank(part)) for part in PARTS)
        }

    def factors(self, arch: Arch) -> dict[str, int]:
        """Rank of each matrix that becomes a product of two, where all layers have the same."""
        found: dict[str, int | None] = {}
        for part, rank in (self.ranks(arch) if self.choices else {}).items():
            if self.mode(part).factors:
                found |= factor_ranks(arch, part, self.mode(part), rank, self.multiple)
        return {name: rank for name, rank in found.items() if rank is not None}

    @property
    def shared(self) -> dict[str, Choice]:
        """The parts that share out a ratio."""
        return {part: choice for part, choice in self.choices.items() if choice.shared}

    def mode(self, part: str) -> Mode:
        """The mode of a part."""
        return find_mode(part, self.choices[part].mode)


def factor_ranks(
    arch: Arch, part: str, mode: Mode, rank: int, multiple: int
) -> dict[str, int | None]:
    """Ranks of a part's matrices as products of two, for the `rank` of the part; None: it stays."""
    kept = rank / arch.full_rank(part)
    if mode.latent:
        return {"k": arch.kv_heads * rank if kept < 1 else None}
    shapes = arch.matrix_shapes(part)
    return {name: rank_for(shape, kept, multiple) for name, shape in shapes.items()}


def part_rank(arch: Arch, part: str, choice: Choice, multiple: int) -> int:
    """Rank of one part; raises A3Error where its mode or size does not fit the model.

    What a ratio leaves is rounded to a `multiple`; where matrices are factored, their ranks are.
    """
    mlp = EXPERTS if arch.experts else arch.mlp
    check_fit(part, choice.mode, mlp if part == "mlp" else arch.attention)
    full = arch.full_rank(part)
    # A head that is rotated whole consists of pairs.
    step = 2 if part == "qk" and arch.rope_dims == arch.head_dim else 1
    if isinstance(choice.size, Decimal) and not find_mode(part, choice.mode).factors:
        step = math.lcm(step, multiple)
    least = 2 if part == "qk" and arch.rope_layout else 1
    try:
        return rank_of(full, choice.size, step, least)
    except A3Error as error:
        raise A3Error(f"{part} mode {choice.mode!r}: {error}") from None


def require_whole_rope(arch: Arch) -> None:
    """Raise A3Error unless every layer rotates whole heads: a curve would say too little."""
    why = None
    if arch.rope_dims != arch.head_dim:
        why = f"{arch.rope_dims} of {arch.head_dim} dimensions of a head are rotated"
    elif arch.nope_layers:
        why = f"layer {arch.nope_layers[0]} has no RoPE"
    if why:
        raise A3Error(
            f"qk: {why}, and ranks are shared out for whole RoPE only. Give qk a ratio of its own: "
            "--qk fisher@0.2."
        )


def least_rank(arch: Arch, part: str) -> int:
    """The least rank that a layer may get of a part that shares out a ratio."""
    least = max(1, int(LEAST * arch.full_rank(part)))
    return 2 * max(1, least // 2) if part == "qk" else least


def require_room(arch: Arch, part: str, rank: int, multiple: int) -> None:
    """Raise A3Error where the same rank for all layers is none that a layer may get."""
    step = math.lcm(multiple, 2) if part == "qk" else multiple
    least = -(-least_rank(arch, part) // step) * step
    if rank < min(least, arch.full_rank(part)):
        raise A3Error(
            f"allocate: this ratio leaves {part} rank {rank} of {arch.full_rank(part)}, and no "
            f"layer gets less than {least} (an eighth, and a multiple of {step}). Take a smaller "
            "ratio or multiple."
        )


def servable_ranks(arch: Arch, ranks: dict[str, int]) -> dict[str, int]:
    """Ranks whose heads have the servable size nearest to the larger of them; QK and OV share it.

    A part that keeps all stays. Raises A3Error where there is no smaller size than the dense one.
    """
    heads = {p: ranks[p] for p in ("qk", "ov") if ranks.get(p, arch.head_dim) < arch.head_dim}
    if not heads:
        return ranks
    smaller = [size for size in SERVABLE if size < arch.head_dim]
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
            for part, choice in choices.items():
                part_rank(arch, part, choice, 1)
            Plan(choices).check_sharing(arch)
        except A3Error as error:
            said = ", ".join(f"{key} {value}" for key, value in row.items())
            raise A3Error(f"experiment {said}: {error}") from error
