"""The passes of a collection: all blocks go through one layer after the other, up and down.

Peak memory is the weights (those of one layer if they are streamed), the sums of one layer, and the
activations of one block in one layer. Hidden states and gradients of all blocks are in files, in
the model's dtype. The arithmetic is that of a pass over the whole model, and so are the results, to
the byte.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from a3.core.progress import Bar
from a3.models.layerwise import Layerwise
from a3.models.shape import Arch
from a3.rxx.container import Accumulator
from a3.stages.collect import fisher, gradients
from a3.stages.collect.hooks import attach_all
from a3.stages.collect.state import State

# Hooks statistics onto one layer, and yields what has to be called after each block.
Observe = Callable[
    [Layerwise, Arch, int, dict[str, Accumulator]], AbstractContextManager[Callable[[], None]]
]


@dataclass(frozen=True)
class Passes:
    """The statistics to collect, by the type of pass over the blocks that computes them."""

    # Sums of activations.
    forward: dict[str, Accumulator] = field(default_factory=dict)
    # Gradients by weights.
    fisher: dict[str, Accumulator] = field(default_factory=dict)
    # Gradients by activations.
    gradients: dict[str, Accumulator] = field(default_factory=dict)


@dataclass(frozen=True)
class Down:
    """A pass from the loss down: its statistics, the numbers of its blocks, and how it begins.

    `backward` takes the model, the last layer's output (1, L, d), which gets the loss's gradient,
    and the block (L,).
    """

    name: str
    accumulators: dict[str, Accumulator]
    numbers: list[int]
    backward: Callable[[Layerwise, Tensor, Tensor], None]
    observe: Observe


def run_passes(
    model: Layerwise, arch: Arch, passes: Passes, blocks: Tensor, sampled: list[int], state: State
) -> None:
    """Collect all statistics over blocks (N, L); gradients by activations over `sampled` ones.

    A collection of nothing else does not run the other blocks.
    """
    if not passes.forward and not passes.fisher:
        blocks, sampled = blocks[sampled], list(range(len(sampled)))
    every = list(range(len(blocks)))
    downs = [
        Down("fisher", passes.fisher, every, fisher.backward, fisher.observe),
        Down("gradients", passes.gradients, sampled, gradients.backward, gradients.observe),
    ]
    downs = [down for down in downs if down.accumulators]
    kept = sorted({number for down in downs for number in down.numbers})
    walk = Walk(model, arch, blocks, kept, state)
    walk.up(passes.forward)
    for down in downs:
        walk.down(down)


class Walk:
    """One collection's blocks (N, L) on their way through a model.

    `hidden` (2, N, L, d) has the input and the output of the present layer, in turns; `inputs`
    (layers, K, L, d) the inputs of all layers of the K blocks `kept` for gradients.
    """

    def __init__(
        self, model: Layerwise, arch: Arch, blocks: Tensor, kept: list[int], state: State
    ) -> None:
        self.model, self.arch, self.blocks, self.state = model, arch, blocks, state
        self.place = {number: place for place, number in enumerate(kept)}
        self.hidden = self.tensor("hidden", 2, len(blocks))
        self.inputs = self.tensor("inputs", arch.layers, len(kept)) if kept else None

    def tensor(self, name: str, *counts: int) -> Tensor:
        """Hidden states or gradients (…, L, d) in a file."""
        shape = (*counts, self.blocks.shape[1], self.arch.hidden_size)
        return self.state.tensor(name, shape, self.model.dtype)

    def copy(self, states: Tensor) -> Tensor:
        """States (L, d) of a file where the model is, (1, L, d)."""
        return states[None].to(self.blocks.device, copy=True)

    def up(self, accumulators: dict[str, Accumulator]) -> None:
        """From the embedding to the last layer, with the sums of activations."""
        with self.model.entrance():
            self.model.record(self.blocks[0])
            for _ in self.state.todo(["embedding"]):
                for number, block in enumerate(self.blocks):
                    self.hidden[0, number] = self.model.enter(block)[0]
        steps = self.state.todo(range(self.arch.layers))
        with self.bar("collect", len(self.blocks)) as bar, torch.no_grad():
            for layer in steps:
                source, target = self.hidden[layer % 2], self.hidden[(layer + 1) % 2]
                with self.model.layer(layer), hooked(self.model, self.arch, layer, accumulators):
                    for number in range(len(self.blocks)):
                        x = self.copy(source[number])
                        if self.inputs is not None and number in self.place:
                            self.inputs[layer, self.place[number]] = x[0]
                        target[number] = self.model.run(layer, x)[0]
                        bar.update(self.blocks.shape[1])
                finish(accumulators, layer)

    def down(self, one: Down) -> None:
        """From the loss to the first layer, with the sums of gradients."""
        assert self.inputs is not None
        layers = self.arch.layers
        gradients = self.tensor(f"{one.name}-gradients", 2, len(one.numbers))
        for _ in self.state.todo(["head"]):
            with self.model.exit():
                for place, number in enumerate(one.numbers):
                    x = self.copy(self.hidden[layers % 2, number]).requires_grad_()
                    one.backward(self.model, x, self.blocks[number])
                    gradients[layers % 2, place] = x.grad[0]
        with self.bar(one.name, len(one.numbers)) as bar:
            for layer in self.state.todo(reversed(range(layers))):
                source, target = gradients[(layer + 1) % 2], gradients[layer % 2]
                observed = one.observe(self.model, self.arch, layer, one.accumulators)
                with self.model.layer(layer), observed as after_block:
                    for place, number in enumerate(one.numbers):
                        x = self.copy(self.inputs[layer, self.place[number]]).requires_grad_()
                        self.model.run(layer, x).backward(self.copy(source[place]))
                        target[place] = x.grad[0]
                        after_block()
                        bar.update(self.blocks.shape[1])
                finish(one.accumulators, layer)

    def bar(self, name: str, blocks: int) -> Bar:
        """The progress of one pass of some blocks."""
        total = blocks * self.blocks.shape[1] * self.arch.layers
        return Bar(total=total, unit="tok·layer", desc=name)


@contextmanager
def hooked(
    model: Layerwise, arch: Arch, layer: int, accumulators: dict[str, Accumulator]
) -> Iterator[None]:
    """All statistics of activations of one layer are summed inside the block."""
    handles = attach_all(arch, accumulators, model.trunk, layer)
    yield
    for handle in handles:
        handle.remove()


def finish(accumulators: dict[str, Accumulator], layer: int) -> None:
    """The sums of a layer are complete."""
    for accumulator in accumulators.values():
        accumulator.finish(layer)
