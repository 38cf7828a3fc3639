"""The state of a training on disk, and its loop, which goes on after a kill."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from a3.core.files import whole_file
from a3.core.progress import LOG, Bar
from a3.stages.heal.distil import WARMUP, Distillation, schedule
from a3.stages.heal.fresh import FreshText

STATE = "training.safetensors"

# The state is as large as three copies of the trained weights in float32.
SECONDS_BETWEEN_SAVES = 180

# Of the first steps, so many are timed; the very first, which takes longer, is not among them.
TIMED = 3


@dataclass(frozen=True)
class Budget:
    """When a training ends: after so many minutes of steps, or so many tokens; None: no limit."""

    minutes: float | None
    tokens: int | None


@dataclass
class Progress:
    """How far a training is: the steps in all (None until some are timed), and those done."""

    loss_before: float
    steps: int | None
    # Of each step that is done.
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.steps is not None and self.done >= self.steps


class Training:
    """Trains within a budget, `batch_size` blocks of a text a step; keeps its state in `work`."""

    def __init__(
        self,
        distillation: Distillation,
        text: FreshText,
        budget: Budget,
        batch_size: int,
        work: Path,
    ) -> None:
        self.distillation = distillation
        self.text = text
        self.budget = budget
        self.batch_size = batch_size
        self.path = work / STATE
        self.saved = time.perf_counter()
        held_out = text.held_out()
        distillation.prepare(held_out[0])
        if self.path.exists():
            self.progress = self.restore()
            LOG.info(f"heal: goes on after step {self.progress.done} of {self.progress.steps}")
        else:
            steps = None if budget.tokens is None else max(1, budget.tokens // self.tokens)
            self.progress = Progress(distillation.measure(held_out), steps)
        self.blocks = self.cut()

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.text.block_length

    def cut(self) -> Tensor:
        """The blocks (N, L) of all steps that are planned, or as many as the text has."""
        return self.text.training((self.progress.steps or WARMUP) * self.batch_size)

    def run(self) -> None:
        """Take all steps that are left."""
        progress = self.progress
        if progress.steps is not None:
            self.announce()
        with Bar(unit="tok", desc="heal", initial=progress.done * self.tokens) as bar:
            while not progress.finished:
                self.step()
                if progress.done == 1 + TIMED and self.budget.minutes is not None:
                    self.plan(60 * self.budget.minutes)
                bar.total = progress.steps and progress.steps * self.tokens
                bar.set_postfix(loss=f"{progress.losses[-1]:.4f}", refresh=False)
                bar.update(self.tokens)
                if progress.finished or time.perf_counter() - self.saved > SECONDS_BETWEEN_SAVES:
                    self.save()

    def step(self) -> None:
        """The next step: all blocks are used once before any is used again."""
        progress, start = self.progress, time.perf_counter()
        first = progress.done * self.batch_size
        chosen = [number % len(self.blocks) for number in range(first, first + self.batch_size)]
        factor = schedule(progress.done, progress.steps)
        progress.losses.append(self.distillation.step(self.blocks[chosen], factor))
        progress.seconds.append(time.perf_counter() - start)

    def plan(self, seconds: float) -> None:
        """Fix the number of steps by the time of the first ones."""
        progress = self.progress
        left = seconds - sum(progress.seconds)
        most = progress.done + max(0, int(left / (sum(progress.seconds[1:]) / TIMED)))
        progress.steps = most if progress.steps is None else min(most, progress.steps)
        self.blocks = self.cut()
        self.announce()

    def announce(self) -> None:
        """Say how many steps are planned, which are known."""
        steps = self.progress.steps or 0
        passes = steps * self.batch_size / len(self.blocks)
        LOG.info(
            f"heal: {steps} steps of {self.tokens} tokens, {passes:.1f} times over the blocks that "
            "are left of the text"
        )

    def save(self) -> None:
        """Write the state, whole or not at all."""
        tensors = {
            name: value.cpu().contiguous() for name, value in self.distillation.state().items()
        }
        with whole_file(self.path) as temporary:
            save_file(tensors, temporary, {"progress": json.dumps(asdict(self.progress))})
        self.saved = time.perf_counter()

    def restore(self) -> Progress:
        """Go on from the state in the work folder."""
        with safe_open(self.path, framework="pt") as file:
            said: dict[str, Any] = json.loads(file.metadata()["progress"])
        self.distillation.restore(load_file(self.path))
        return Progress(**said)
