"""Sizes and modes that a runtime takes: of a plan with `--for`, everything else is refused."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from a3.core.errors import A3Error
from a3.models.shape import Arch
from a3.solutions.modes import DENSE, ONE_SIZE, PRESETS, ROPE, Choice, Mode, find_mode
from a3.solutions.runtime import Runtime, beside, part, runtime_named

HEADS = ("qk", "ov")


@dataclass(frozen=True)
class Taken:
    """What a runtime, or None, takes of the components' choices."""

    runtime: str | None
    choices: Mapping[str, Choice]

    @property
    def asked(self) -> Runtime:
        """What the runtime asks for; without one, nothing."""
        return Runtime("", "") if self.runtime is None else runtime_named(self.runtime)

    @property
    def allocated(self) -> list[str]:
        """The components of heads whose sizes are allocated."""
        return [one for one in HEADS if one in self.choices and self.choices[one].shared]

    def mode(self, component: str) -> Mode | None:
        """The mode of a component; None if it is not compressed."""
        choice = self.choices.get(component)
        return None if choice is None else find_mode(component, choice.mode)

    def step(self, arch: Arch, component: str) -> int:
        """Of what any smaller rank of a component is a multiple, by the runtime alone."""
        mode = self.mode(component)
        if mode is not None and mode.latent:
            return part(self.asked.inner, arch.kv_heads)
        if mode is not None and (mode.factors or mode.of_experts):
            return 1  # the ranks of factors are rounded themselves (Runtime.inner)
        if component in HEADS and self.asked.one_size:
            return self.head_step(arch)
        return self.asked.step(component, arch.heads, arch.kv_heads)

    def head_step(self, arch: Arch) -> int:
        """Of what the one size of heads is a multiple."""
        return math.lcm(*(self.asked.step(one, arch.heads, arch.kv_heads) for one in HEADS))

    def require_modes(self) -> None:
        """Raise A3Error for modes whose models the runtime cannot run."""
        preset = PRESETS[self.asked.preset]
        wants = f"{self.runtime} runs {'+'.join(preset.values())}"
        for component, choice in self.choices.items():
            mode = find_mode(component, choice.mode)
            if mode.factors and self.asked.plain:
                raise A3Error(f"{choice.name}: makes two factors of a matrix, and {wants}.")
            if mode.biased and self.asked.plain:
                raise A3Error(f"{choice.name}: gives the MLP's output a bias, and {wants}.")
        if self.asked.one_size:
            self.require_one_rope(preset, wants)

    def require_one_rope(self, preset: Mapping[str, str], wants: str) -> None:
        """Raise A3Error for modes of which heads get several sizes or RoPE pairs."""
        qk = self.choices.get("qk")
        one = qk is not None and qk.mode in ONE_SIZE and len(self.allocated) == len(HEADS)
        if self.allocated and not one:
            said = "+".join(choice.name for choice in self.choices.values())
            raise A3Error(
                f"{said}: allocates heads of different sizes, and {self.runtime} wants one. "
                f"Write --qk {preset['qk']} --ov {preset['ov']}, or no modes."
            )
        if qk and qk.mode not in ONE_SIZE and {*ROPE} & {*find_mode("qk", qk.mode).fits}:
            where = "layer" if qk.mode.endswith("-uniform") else "group"
            raise A3Error(
                f"{qk.name}: keeps other RoPE pairs in each {where}, and {wants}. Take one of "
                f"{', '.join(ONE_SIZE)}."
            )

    def require_multiples(self, arch: Arch, others: Sequence[str]) -> None:
        """Raise A3Error for ranks that are named and no multiples, with the next ones; not of the
        components `others`, which are rounded.
        """
        for component, choice in self.choices.items():
            if component in others:
                continue
            full, step = arch.full_rank(component), self.step(arch, component)
            if not isinstance(choice.size, int) or choice.size >= full or step == 1:
                continue
            if component == "qk" and arch.rope_dims == arch.head_dim:
                step = math.lcm(step, 2)
            if choice.size % step:
                near = [f"{choice.mode}@{rank}" for rank in beside(choice.size, step, full)]
                raise A3Error(
                    f"{component} {choice}: {self.runtime} takes multiples of {step} here. Take "
                    f"{' or '.join(near)}."
                )

    def require_ratios(
        self, arch: Arch, ranks: Mapping[str, int], factors: Mapping[str, int | None]
    ) -> None:
        """Raise A3Error for ratios of which rounding leaves nothing: sizes would stay whole.

        `factors` are the ranks of matrices that become two, of all components together.
        """
        for component, choice in self.choices.items():
            mode, full = find_mode(component, choice.mode), arch.full_rank(component)
            named = not isinstance(choice.size, Decimal) or choice.size == 0
            if choice.shared or named or mode.of_experts:
                continue
            instead = f"leave it as it is: --{component} {DENSE}"
            if mode.factors and not mode.latent:
                for name, (m, n) in arch.matrix_shapes(component).items():
                    if (rank := factors.get(name)) and rank * (m + n) >= m * n:
                        raise A3Error(
                            f"{component} {choice}: {name} of {m} × {n} is no larger than two "
                            f"factors of rank {rank}, and {self.runtime} takes multiples of "
                            f"{self.asked.inner}. Take a larger ratio, or {instead}."
                        )
            elif ranks[component] == full:
                step = self.step(arch, component)
                require_smaller(component, full, step)
                raise A3Error(
                    f"{component} {choice}: {self.runtime} takes multiples of {step}, and all "
                    f"{full} are the nearest, which removes nothing. Take "
                    f"{choice.mode}@{beside(full - 1, step, full)[0]}, or {instead}."
                )

    def require_one_head(self, arch: Arch, ranks: Mapping[str, int]) -> None:
        """Raise A3Error for heads that the runtime cannot have: of two sizes, or of a wrong one."""
        qk, ov = (ranks.get(component, arch.head_dim) for component in HEADS)
        if self.asked.one_size and qk != ov and not self.allocated:
            raise A3Error(
                f"qk keeps {qk} dimensions of a head and ov {ov}, and {self.runtime} wants one "
                f"size. Give both the same: {self.same(arch, min(qk, ov))}."
            )
        whole = self.allocated or arch.head_dim in (qk, ov)
        if self.asked.whole and whole and arch.head_dim % self.asked.heads:
            raise A3Error(
                f"heads of {arch.head_dim} would stay whole, and {self.runtime} takes multiples of "
                f"{self.asked.heads}. {self.otherwise(arch)}"
            )

    def same(self, arch: Arch, most: int) -> str:
        """Options that give QK and OV the largest size that the runtime takes, of `most`."""
        step = self.head_step(arch)
        if most < step:
            return f"--qk {DENSE} --ov {DENSE}"
        return f"--qk {ONE_SIZE[0]}@{most // step * step} --ov joint@{most // step * step}"

    def otherwise(self, arch: Arch) -> str:
        """What to do about heads that may not stay whole."""
        if self.head_step(arch) < arch.head_dim:
            return f"Give them a size: {self.same(arch, arch.head_dim)}."
        return "Take --for llama.cpp, and keys in f16."


def require_smaller(component: str, full: int, step: int) -> None:
    """Raise A3Error if no size of a component below the full one is a multiple."""
    if step >= full:
        raise A3Error(
            f"{component}: no size below {full} is a multiple of {step}, which --multiple or --for "
            f"wants. Leave it as it is: --{component} {DENSE}."
        )
