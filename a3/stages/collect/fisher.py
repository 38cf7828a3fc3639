"""Fisher information of the rows of weights, for FWSVD: gradients by weights, block by block."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from a3.models.layerwise import Layerwise
from a3.models.shape import Arch
from a3.rxx.container import Accumulator
from a3.rxx.kinds import KINDS
from a3.stages.collect.hooks import nothing, observed


def backward(model: Layerwise, hidden: Tensor, block: Tensor) -> None:
    """Put the gradient of a block's (L,) mean loss by the last layer's output (1, L, d) into its
    `grad`.
    """
    model.leave(hidden, labels=block[None]).loss.backward()


@contextmanager
def observe(
    model: Layerwise, arch: Arch, layer: int, accumulators: dict[str, Accumulator]
) -> Iterator[Callable[[], None]]:
    """Add Σ_j (∂L/∂W_ij)² for each row i of each matrix W (in, out) of one layer.

    L is the mean loss of a block's tokens: an empirical Fisher information with a block as the
    sample (Hsu et al. 2022, arXiv 2207.00112, equations 5 and 6). Yields what adds a block's
    gradients, which are in memory beside the layer's weights, in their dtype; squares are summed in
    float64.
    """
    matrices = {
        kind: [own(model.trunk, arch, layer, projection) for projection in projections(arch, kind)]
        for kind in accumulators
        if observed(arch, KINDS[kind].site, layer)
    }
    for kind in accumulators.keys() - matrices.keys():
        nothing(arch, layer, accumulators[kind])
    weights = [module.weight for found in matrices.values() for module, _ in found]
    for weight in weights:
        weight.requires_grad_(True)

    def add() -> None:
        for kind, found in matrices.items():
            rows = [power(module, projection, arch) for module, projection in found]
            shape = arch.statistic_shape(KINDS[kind])
            accumulators[kind].add_sum(layer, torch.stack(rows).reshape(shape))
        for weight in weights:
            weight.grad = None

    yield add
    for weight in weights:
        weight.requires_grad_(False)


def projections(arch: Arch, kind: str) -> list[str]:
    """The matrices of a kind, each by the first of the projections that are fused in it."""
    of_mlp = [together[0] for together in arch.adapter.first_of_mlp]
    return {"qkv": list("qkv"), "mlp": of_mlp}.get(KINDS[kind].site, [KINDS[kind].site])


def own(trunk: nn.Module, arch: Arch, layer: int, projection: str) -> tuple[nn.Module, str]:
    """The module of a projection."""
    return trunk.get_submodule(arch.adapter.module(layer, projection)), projection


def power(module: nn.Module, projection: str, arch: Arch) -> Tensor:
    """Squared gradients summed over the outputs of a projection, (in,), float64."""
    gradient = module.weight.grad.T if arch.adapter.transposed else module.weight.grad
    if projection in "qkv":
        gradient = arch.adapter.unfuse(gradient, projection, vars(arch))
    return gradient.double().square().sum(0)
