"""Whole experts: some of a layer's are kept as they are, or merged with others."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from a3.models.checkpoint import Checkpoint
from a3.models.shape import Arch
from a3.models.weights import MLPWeights
from a3.solutions.mlp import aligned_to, mean_of_experts, shares_of_merged


@dataclass(frozen=True)
class WholeExperts:
    """The experts of a layer.

    `weights` reads one by its number, and `pack` names its tensors by a number in the compressed
    model.
    """

    arch: Arch
    checkpoint: Checkpoint
    layer: int
    weights: Callable[[int], MLPWeights]
    pack: Callable[[MLPWeights, int], dict[str, Tensor]]

    def kept(self, kept: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of some dense experts, numbered anew, and the rows of the router for them."""
        tensors: dict[str, Tensor] = {}
        for number, expert in enumerate(kept):
            tensors |= self.pack(self.weights(expert), number)
        if len(kept) < self.arch.experts:
            name = f"{self.arch.adapter.modules['router'].format(self.layer)}.weight"
            tensors[name] = self.checkpoint.tensor(name)[list(kept)].contiguous()
        return tensors

    def merged(
        self, merged: Tensor, counts: Tensor, *, aligned: bool
    ) -> tuple[dict[str, Tensor], float]:
        """The tensors of merged experts, and what their weights lose.

        `merged` (E,) says into which of them an expert goes, `counts` (E,) how many tokens reach
        it. With `aligned`, channels are first put in the order of the layer's first expert. The
        loss is Σ_e f_e ‖W_e - W_merged(e)‖² / Σ_e f_e ‖W_e‖², f_e being the counts: of weights,
        since how experts differ on a token is in no sum over tokens. The router stays.
        """
        shares = shares_of_merged(merged, counts)
        tensors: dict[str, Tensor] = {}
        lost = whole = 0.0
        for number in range(int(merged.max()) + 1):
            members = (merged == number).nonzero()[:, 0].tolist()
            alone = not aligned or len(members) == 1
            several = map(self.weights, members) if alone else self.aligned(members)
            found = mean_of_experts(several, shares[members].tolist())
            tensors |= self.pack(found.weights, number)
            lost += found.spread * counts[members].sum().item()
            whole += found.power * counts[members].sum().item()
        name = f"{self.arch.adapter.experts_module(self.layer)}.down_proj_bias"
        if name in self.checkpoint.names():
            biases = self.checkpoint.tensor(name)
            sums = torch.zeros(number + 1, biases.shape[1], dtype=torch.float64)
            sums.index_add_(0, merged.cpu(), biases.double() * shares.cpu()[:, None])
            tensors[name] = sums.to(biases.dtype)
        return tensors, lost / whole if whole else 0.0

    def aligned(self, members: Sequence[int]) -> Iterator[MLPWeights]:
        """Some experts with their channels in the order of the layer's first expert."""
        first = self.weights(0)
        for expert in members:
            yield first if expert == 0 else aligned_to(first, self.weights(expert))
