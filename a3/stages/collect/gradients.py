"""Autocorrelations of the loss's gradients by activations.

Labels are drawn from the model's own prediction. The autocorrelations are then the Fisher
information, which is the Hessian of the divergence from the dense model if the errors of tokens are
independent. An error e of an activation costs about ½ eᵀ E[gᵀg] e nats per token. Gradients of
weights are not computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from a3.models.layerwise import Layerwise
from a3.models.shape import Arch
from a3.rxx.container import Accumulator
from a3.rxx.kinds import KINDS, LOGITS_TOKENS
from a3.stages.collect.hooks import nothing, observed


def backward(model: Layerwise, hidden: Tensor, block: Tensor) -> None:
    """Put the gradient by the last layer's output (1, L, d) into its `grad`.

    The loss is the sum over a block's tokens, each with a label drawn from the model's prediction.
    The block (L,) seeds the draw, so it does not depend on sharding.
    """
    for number, some in enumerate(hidden.split(LOGITS_TOKENS, dim=1)):
        logits = model.leave(some).logits[0].float()
        labels = draw(logits.detach(), seed=int(block.sum()) + number)
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()


@contextmanager
def observe(
    model: Layerwise, arch: Arch, layer: int, accumulators: dict[str, Accumulator]
) -> Iterator[Callable[[], None]]:
    """Add Σ gᵀg of each kind over the tokens of each block; nothing is left to do after a block."""
    handles = [
        handle
        for accumulator in accumulators.values()
        for handle in attach(model.trunk, arch, layer, accumulator)
    ]
    yield lambda: None
    for handle in handles:
        handle.remove()


def draw(logits: Tensor, seed: int) -> Tensor:
    """A label for each token from the prediction: logits (L, V) to (L,)."""
    generator = torch.Generator(logits.device).manual_seed(seed)
    # Two, of which one is used: for one, torch draws V numbers a token, as long as a layer's pass.
    labels = torch.multinomial(logits.softmax(-1), 2, replacement=True, generator=generator)
    return labels[:, 0]


def attach(trunk: nn.Module, arch: Arch, layer: int, accumulator: Accumulator) -> list:
    """Hook one statistic of one layer onto the module whose output's gradient it uses."""
    site = KINDS[accumulator.kind].site
    turned = KINDS[accumulator.kind].form != "factors" or arch.has_rope(layer)
    if not turned or not observed(arch, site, layer):
        return [nothing(arch, layer, accumulator)]
    if site == "down" and arch.experts:
        # Of the sum over experts, which all have the same gradient.
        name = arch.adapter.experts_module(layer).removeprefix(f"{arch.adapter.prefix}.")
    else:
        name = arch.adapter.queries(layer) if site == "q" else arch.adapter.module(layer, site)

    def on_output(_: nn.Module, __: tuple, output: Tensor) -> None:
        output.register_hook(partial(on_gradient, output.detach()))

    def on_gradient(x: Tensor, g: Tensor) -> None:
        if site == "q":
            accumulator.add_sum(layer, by_factors(queries(x, arch), queries(g, arch), arch))
        else:
            accumulator.add(layer, g.flatten(0, -2))

    return [trunk.get_submodule(name).register_forward_hook(on_output)]


def queries(x: Tensor, arch: Arch) -> Tensor:
    """Queries, or gradients by them, of a module's output: (1, L, …) to (H, L, h), in halves.

    Of a norm the output may have its heads before its tokens.
    """
    if arch.adapter.norm_heads_first:
        x = x.transpose(1, 2)
    rows = x.reshape(-1, arch.heads * arch.head_dim).T if arch.qk_norm else x.flatten(0, -2).T
    if arch.qk_norm is None:
        rows = arch.adapter.unfuse(rows, "q", vars(arch))
    else:
        rows = arch.adapter.in_halves(rows, vars(arch))
    return rows.unflatten(0, (arch.heads, arch.head_dim)).mT


def by_factors(q: Tensor, g: Tensor, arch: Arch) -> Tensor:
    """Σ zᵀz over tokens of the gradients z (L, 2 F) by the pairs' factors 1 + α + β i, at 0.

    q and g (H, L, h); in float32, whatever the model is in. A factor takes (q₁, q₂) to
    (1 + α) q + β (-q₂, q₁), so that z is q₁ g₁ + q₂ g₂ for α and q₁ g₂ - q₂ g₁ for β. RoPE turns q
    and g alike, which changes neither.
    """
    (q1, q2), (g1, g2) = (x[..., : arch.rope_dims].float().chunk(2, dim=-1) for x in (q, g))
    z = torch.cat((q1 * g1 + q2 * g2, q1 * g2 - q2 * g1), dim=-1)
    return (z.mT @ z).double()
