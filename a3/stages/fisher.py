"""Fisher information of rows of weights and of RoPE pairs: a backward pass for each block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from a3.kinds import KINDS, Kind
from a3.models.arch import Arch
from a3.statistics import Accumulator


def run_backward(
    model: PreTrainedModel, arch: Arch, accumulators: dict[str, Accumulator], blocks: Tensor
) -> None:
    """Add the statistics of gradients, block by block (N, L): of weights, and of RoPE pairs.

    Gradients of one block are in memory beside the weights, in their dtype; squares are summed in
    float64.
    """
    of_weights = {kind: one for kind, one in accumulators.items() if KINDS[kind].site != "q_pairs"}
    weights = {
        (kind, layer): [own(model.base_model, arch, layer, part) for part in parts(arch, kind)]
        for kind in of_weights
        for layer in range(arch.layers)
    }
    model.requires_grad_(False)
    for found in weights.values():
        for module, _ in found:
            module.weight.requires_grad_(True)
    with (
        queries(model.base_model, arch) as q,
        tqdm(total=blocks.numel(), unit="tok", desc="fisher") as bar,
    ):
        for block in blocks:
            model(block[None], labels=block[None], use_cache=False).loss.backward()
            for (kind, layer), found in weights.items():
                of_weights[kind].add_sum(layer, row_squares(found, arch, KINDS[kind]))
            for kind in accumulators.keys() - of_weights.keys():
                for layer, output in q.items():
                    accumulators[kind].add_sum(layer, pair_products(output, arch, len(block)))
            q.clear()
            model.zero_grad(set_to_none=True)
            bar.update(block.numel())


@contextmanager
def queries(trunk: nn.Module, arch: Arch) -> Iterator[dict[int, Tensor]]:
    """What makes q, before RoPE, of each layer that has it, with its gradient after a pass."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.requires_grad_(True)
            output.retain_grad()
            found[layer] = output
            return output

        return hook

    handles = [
        trunk.get_submodule(arch.adapter.queries(layer)).register_forward_hook(keep(layer))
        for layer in range(arch.layers)
        if arch.has_rope(layer)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def pair_products(output: Tensor, arch: Arch, tokens: int) -> Tensor:
    """Σ uᵀu over the tokens and heads of a block, (pairs, pairs) float64.

    u (pairs,) are the derivatives of a block's summed loss by factors on the pairs of one head's
    query at one position, all 1: u_f = Σ_{j in f} q_j ∂L/∂q_j. A factor of 0 takes the pair out of
    that query's scores, so that to second order, with the empirical Fisher information in place of
    the Hessian and no correlation between queries, to take out the pairs S costs
    ½ Σ_{f, g in S} (Σ uᵀu)_fg. The order in which RoPE turns q does not matter to u: a rotation
    of both vectors leaves their product. `tokens` undoes the loss's mean.
    """
    q, slope = queries_of(output.detach(), arch), queries_of(output.grad, arch) * (tokens - 1)
    u = (q * slope)[..., : arch.rope_dims].unflatten(-1, (2, -1)).sum(-2).flatten(0, -2)
    return u.T @ u


def queries_of(output: Tensor, arch: Arch) -> Tensor:
    """q (L, H, h), pairs in halves, float64, of the output (1, L, …) of what makes it."""
    rows = output.reshape(output.shape[1], -1).T.double()
    if arch.qk_norm is None:
        rows = arch.adapter.unfuse(rows, "q", vars(arch))
    else:
        rows = arch.adapter.in_halves(rows, vars(arch))
    return rows.T.unflatten(1, (-1, arch.head_dim))


def row_squares(found: list[tuple[nn.Module, str]], arch: Arch, kind: Kind) -> Tensor:
    """Σ_j (∂L/∂W_ij)² for each row i of each matrix W (in, out).

    L is the mean loss of a block's tokens: an empirical Fisher information with a block as the
    sample (Hsu et al. 2022, arXiv 2207.00112, equations 5 and 6).
    """
    rows = [power(module, part, arch) for module, part in found]
    return torch.stack(rows).reshape(arch.statistic_shape(kind))


def parts(arch: Arch, kind: str) -> list[str]:
    """The matrices of a kind, each by the first of the parts that are fused in it."""
    of_mlp = [together[0] for together in arch.adapter.first_of_mlp]
    return {"qkv": list("qkv"), "mlp": of_mlp}.get(KINDS[kind].site, [KINDS[kind].site])


def own(trunk: nn.Module, arch: Arch, layer: int, part: str) -> tuple[nn.Module, str]:
    """The module of a part."""
    return trunk.get_submodule(arch.adapter.module(layer, part)), part


def power(module: nn.Module, part: str, arch: Arch) -> Tensor:
    """Squared gradients summed over the outputs of a part, (in,), float64."""
    gradient = module.weight.grad.T if arch.adapter.transposed else module.weight.grad
    if part in "qkv":
        gradient = arch.adapter.unfuse(gradient, part, vars(arch))
    return gradient.double().square().sum(0)
