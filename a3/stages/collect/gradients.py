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
from torch.utils.hooks import RemovableHandle

from a3.models.layerwise import Layerwise
from a3.models.shape import Arch
from a3.models.sizes import component_of
from a3.rxx.container import Accumulator
from a3.rxx.kinds import KINDS, LOGITS_TOKENS, has_pairs_in_norms
from a3.stages.collect.hooks import nothing, observed, rms


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
    if site == "q" and has_pairs_in_norms(vars(arch)):
        return [attach_norm(trunk, arch, layer, accumulator, projection) for projection in "qk"]
    if site == "down" and arch.experts:
        # Of the sum over experts, which all have the same gradient.
        name = arch.adapter.experts_module(layer).removeprefix(f"{arch.adapter.prefix}.")
    else:
        name = arch.adapter.queries(layer) if site == "q" else arch.adapter.module(layer, site)

    def on_output(_: nn.Module, inputs: tuple, output: Tensor) -> None:
        # Experts that get all tokens one after another have as many equal gradients of each.
        copies = arch.experts if site == "down" and arch.experts and len(inputs) == 1 else 1
        output.register_hook(partial(on_gradient, output.detach(), copies))

    def on_gradient(x: Tensor, copies: int, g: Tensor) -> None:
        if site == "q":
            q, by_q = (heads_of(y, "q", arch) for y in (x, g))
            accumulator.add_sum(layer, by_factors(q, by_q, arch))
        else:
            rows = g.flatten(0, -2)
            rows = rows[: len(rows) // copies]
            normed = arch.norms_output(component_of(site))
            accumulator.add(layer, rows * rms(x) if normed else rows)

    return [trunk.get_submodule(name).register_forward_hook(on_output)]


def attach_norm(
    trunk: nn.Module, arch: Arch, layer: int, accumulator: Accumulator, projection: str
) -> RemovableHandle:
    """Hook the norm of the heads of q or k.

    The sums are those by factors of queries, by weights of their norms, and by weights of keys'.
    """

    def on_output(_: nn.Module, inputs: tuple, output: Tensor) -> None:
        output.register_hook(partial(on_gradient, inputs[0].detach(), output.detach()))

    def on_gradient(x: Tensor, normed: Tensor, g: Tensor) -> None:
        factors, norms = by_norm(*(heads_of(y, projection, arch) for y in (x, normed, g)))
        sums = norms.new_zeros(arch.statistic_shape(KINDS[accumulator.kind]))
        if projection == "q":
            sums[: 2 * arch.heads] = torch.cat((factors, norms))
        else:
            sums[2 * arch.heads :] = norms
        accumulator.add_sum(layer, sums)

    name = arch.adapter.norm_name(layer, projection)
    name = name.removeprefix(f"{arch.adapter.prefix}.").removesuffix(".weight")
    return trunk.get_submodule(name).register_forward_hook(on_output)


def heads_of(x: Tensor, projection: str, arch: Arch) -> Tensor:
    """q or k, or gradients by it, of a module's output: (1, L, …) to (heads, L, h), in halves.

    Of a norm the output may have its heads before its tokens.
    """
    if arch.adapter.norm_heads_first:
        x = x.transpose(1, 2)
    heads = arch.heads if projection == "q" else arch.kv_heads
    rows = x.reshape(-1, heads * arch.head_dim).T if arch.qk_norm else x.flatten(0, -2).T
    if arch.qk_norm is None:
        rows = arch.adapter.unfuse(rows, projection, vars(arch))
    else:
        rows = arch.adapter.in_halves(rows, vars(arch))
    return rows.unflatten(0, (heads, arch.head_dim)).mT


def by_factors(q: Tensor, g: Tensor, arch: Arch) -> Tensor:
    """Σ zᵀz over tokens of the gradients z (L, 2 F) by the pairs' factors 1 + α + β i, at 0.

    q and g (H, L, h); in float32, whatever the model is in. A factor takes (q₁, q₂) to
    (1 + α) q + β (-q₂, q₁), so that z is q₁ g₁ + q₂ g₂ for α and q₁ g₂ - q₂ g₁ for β. RoPE turns q
    and g alike, which changes neither.
    """
    (q1, q2), (g1, g2) = (x[..., : arch.rope_dims].float().chunk(2, dim=-1) for x in (q, g))
    z = torch.cat((q1 * g1 + q2 * g2, q1 * g2 - q2 * g1), dim=-1)
    return (z.mT @ z).double()


def by_norm(x: Tensor, normed: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Σ zᵀz over tokens of the gradients z (L, F) by pairs' factors, and by weights in norms, at 1.

    x (heads, L, h) before the norm, `normed` after it, and g by that. A factor multiplies a pair of
    the normed head, so that its gradient is z = q₁ g₁ + q₂ g₂. Weights a of pairs are in the norm's
    mean square, Σ a_f |x_f|² / h, so that a's gradient is -½ |x_f|² / |x|² times the sum of z over
    pairs.
    """
    (q1, q2), (g1, g2) = (y.float().chunk(2, dim=-1) for y in (normed, g))
    z = q1 * g1 + q2 * g2
    power = x.float().square().unflatten(-1, (2, -1)).sum(-2)
    tiny = torch.finfo(power.dtype).tiny
    by_weight = -0.5 * z.sum(-1, keepdim=True) * power / power.sum(-1, keepdim=True).clamp(min=tiny)
    return (z.mT @ z).double(), (by_weight.mT @ by_weight).double()
