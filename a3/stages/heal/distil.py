"""Distillation: trains the layers of a compressed model towards the dense model's predictions.

The loss is KL(dense ‖ compressed) per token. Embeddings, final norm and head do not change.
"""

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from a3.core.errors import A3Error
from a3.models.layerwise import Layerwise
from a3.rxx.kinds import LOGITS_TOKENS

# The learning rate rises in the first steps; a run that is planned in minutes is timed there.
WARMUP = 10

# The largest norm of a step's gradient; larger ones are scaled down to it.
CLIP = 1.0


class Distillation:
    """A compressed model in float32 whose layers are trained, and its teacher, the dense model.

    With another `dtype` both compute in it, and the compressed model's weights stay float32.
    """

    def __init__(self, student: Layerwise, teacher: Layerwise, rate: float, dtype: str) -> None:
        self.student, self.teacher = student, teacher
        self.device = next(student.model.parameters()).device
        self.rate, self.dtype = rate, getattr(torch, dtype)
        adapter = student.arch.adapter
        # The trained weights by their names in the checkpoint.
        self.weights: dict[str, nn.Parameter] = {
            f"{adapter.prefix}.{adapter.layer_path}.{layer}.{name}": weight.requires_grad_()
            for layer, stand_in in enumerate(student.stand_ins)
            for name, weight in stand_in.layer.named_parameters()
        }
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=rate, fused=True)

    def prepare(self, block: Tensor) -> None:
        """Learn how both models call their layers for blocks of this length (L,)."""
        for model in (self.student, self.teacher):
            with self.cast(), model.entrance():
                model.record(block.to(self.device))

    def step(self, blocks: Tensor, factor: float) -> float:
        """One step of Adam on blocks (N, L), at a share of the learning rate; the loss before it.

        Raises A3Error if the loss is not finite.
        """
        self.optimizer.zero_grad()
        loss = sum(self.divergence(block, len(blocks)) for block in blocks) / len(blocks)
        if not math.isfinite(loss):
            raise A3Error(
                f"heal: the loss is {loss}; expected a finite number. Lower the learning rate, "
                f"which is {self.rate}, or compute in float32."
            )
        torch.nn.utils.clip_grad_norm_(self.weights.values(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.rate
        self.optimizer.step()
        return loss

    def measure(self, blocks: Tensor) -> float:
        """The mean loss of blocks (N, L), nats a token; changes nothing."""
        with torch.no_grad():
            return sum(self.divergence(block) for block in blocks) / len(blocks)

    def divergence(self, block: Tensor, share_of: int | None = None) -> float:
        """KL(dense ‖ compressed) of a block (L,), nats a token.

        With `share_of`, the number of blocks of a step, it adds this one's to the gradient of their
        mean. The logits of a few tokens are in memory at once.
        """
        block = block.to(self.device)
        with torch.no_grad(), self.cast():
            target = through(self.teacher, block)
        with self.cast():
            own = through(self.student, block)
        hidden, loss = own.detach().requires_grad_(share_of is not None), 0.0
        pieces = (x.split(LOGITS_TOKENS, dim=1) for x in (hidden, target))
        for some, theirs in zip(*pieces, strict=True):
            with torch.no_grad():
                expected = self.predictions(self.teacher, theirs)
            found = self.predictions(self.student, some)
            nats = nn.functional.kl_div(found, expected, log_target=True, reduction="sum")
            loss += nats.item() / len(block)
            if share_of is not None:
                (nats / (len(block) * share_of)).backward()
        if share_of is not None:
            own.backward(hidden.grad)
        return loss

    def predictions(self, model: Layerwise, hidden: Tensor) -> Tensor:
        """Log-probabilities (1, L, V) in float32 for outputs (1, L, d) of the last layer."""
        with self.cast():
            logits = model.leave(hidden).logits
        return logits.float().log_softmax(-1)

    def cast(self) -> AbstractContextManager[None]:
        """Products are computed in the dtype inside the block."""
        wanted = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=wanted)

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on: each weight, Adam's two moments of it, and its steps.

        Experts that no token has reached have no moments.
        """
        found: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            own = {"weight": weight.detach()} | self.optimizer.state[weight]
            found |= {f"{key}.{name}": value for key, value in own.items()}
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state[f"weight.{name}"])
                self.optimizer.state[weight] = {
                    key: state[f"{key}.{name}"].to(weight.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in state
                }


def through(model: Layerwise, block: Tensor) -> Tensor:
    """The last layer's output (1, L, d) for a block (L,)."""
    hidden = model.enter(block)
    for layer in range(model.arch.layers):
        hidden = model.run(layer, hidden)
    return hidden


def schedule(step: int, steps: int | None) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine from 1 to 0.

    `steps` may be None in the warm-up, where it does not matter.
    """
    if step < WARMUP or steps is None:
        return min(1.0, (step + 1) / WARMUP)
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - WARMUP) / (steps + 1 - WARMUP)))
