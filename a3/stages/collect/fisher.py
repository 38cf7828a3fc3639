"""Fisher information of the rows of weights, for FWSVD: a backward pass for each block."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from a3.core.progress import Bar
from a3.models.arch import Arch
from a3.rxx.container import Accumulator
from a3.rxx.kinds import KINDS


def run_backward(
    model: PreTrainedModel, arch: Arch, accumulators: dict[str, Accumulator], blocks: Tensor
) -> None:
    """Add Σ_j (∂L/∂W_ij)² for each row i of each matrix W (in, out), block by block (N, L).

    L is the mean loss of a block's tokens: an empirical Fisher information with a block as the
    sample (Hsu et al. 2022, arXiv 2207.00112, equations 5 and 6). Gradients of one block are in
    memory beside the weights, in their dtype; squares are summed in float64.
    """
    weights = {
        (kind, layer): [
            own(model.base_model, arch, layer, projection) for projection in projections(arch, kind)
        ]
        for kind in accumulators
        for layer in range(arch.layers)
    }
    model.requires_grad_(False)
    for found in weights.values():
        for module, _ in found:
            module.weight.requires_grad_(True)
    with Bar(total=blocks.numel(), unit="tok", desc="fisher") as bar:
        for block in blocks:
            model(block[None], labels=block[None], use_cache=False).loss.backward()
            for (kind, layer), found in weights.items():
                rows = [power(module, projection, arch) for module, projection in found]
                shape = arch.statistic_shape(KINDS[kind])
                accumulators[kind].add_sum(layer, torch.stack(rows).reshape(shape))
            model.zero_grad(set_to_none=True)
            bar.update(block.numel())


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
