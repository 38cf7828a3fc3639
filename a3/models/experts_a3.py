"""A mixture's experts in compressed models: each has its own size; some are dropped or merged.

Needs only torch, like attention_a3.py; compressed folders have a copy of it.
"""

from functools import reduce

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """An MLP of `rank` channels, gated or not, without its activation function."""

    def __init__(self, d: int, rank: int, gated: bool, bias: bool, down_bias: bool) -> None:
        super().__init__()
        if gated:
            self.gate_proj = nn.Linear(d, rank, bias)
        self.up_proj = nn.Linear(d, rank, bias)
        self.down_proj = nn.Linear(rank, d, bias=down_bias)


class Experts(nn.ModuleList):
    """A mixture's experts, each with its own size; some may have been dropped or merged.

    `routed` has the numbers that the router has for each. A token that is routed to several of one
    expert's goes there once, and their routing weights add up.
    """

    def __init__(
        self,
        dense: nn.Module,
        ranks: list[int],
        hidden_size: int,
        down_bias: bool,
        routed: list[list[int]],
    ) -> None:
        first = first_of(dense)
        gated, biased = first == "gate_up_proj", hasattr(dense, f"{first}_bias")
        super().__init__(Expert(hidden_size, rank, gated, biased, down_bias) for rank in ranks)
        self.gated, self.routed = gated, routed
        if biased:
            self.down_proj_bias = nn.Parameter(torch.zeros(len(ranks), hidden_size))
        # Whether gate's and up's outputs follow one another, or alternate.
        self.concatenated = getattr(dense, "is_concatenated", True)
        # Has the family's own activation function, and needs no weights. In a list, so that it is
        # no module in this one.
        self.family = [dense]
        dense._parameters.clear()

    def forward(
        self, hidden_states: Tensor, index: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """hidden_states (T, d); index and weights (T, top k): where each token goes. Without them,
        hidden_states (E T, d) are each expert's, 0 where a token goes elsewhere, and so is it all.
        """
        if index is None or weights is None:
            each = enumerate(hidden_states.chunk(len(self)))
            return torch.cat([self.expert(i, x) * x.any(-1, keepdim=True) for i, x in each])
        out = torch.zeros_like(hidden_states)
        # A graph cannot loop over what tokens choose: every expert reads all of them.
        exporting = torch.compiler.is_exporting()
        reached = set() if exporting else set(index.unique().tolist())
        for number, own in enumerate(self.routed):
            if not exporting and reached.isdisjoint(own):
                continue
            chosen = reduce(torch.logical_or, [index == one for one in own])
            share = (weights * chosen).sum(-1, keepdim=True)
            if exporting:
                out = out + (self.expert(number, hidden_states) * share).to(out.dtype)
                continue
            token = torch.where(chosen.any(-1))[0]
            x = self.expert(number, hidden_states[token])
            out.index_add_(0, token, (x * share[token]).to(out.dtype))
        return out

    def expert(self, number: int, x: Tensor) -> Tensor:
        """What one expert makes of tokens (T, d)."""
        expert = self[number]
        first = expert.up_proj(x)
        if self.gated:
            both = (expert.gate_proj(x), first)
            first = torch.cat(both, -1) if self.concatenated else torch.stack(both, -1).flatten(-2)
        x = expert.down_proj(activated(self.family[0], first, self.gated))
        return x + self.down_proj_bias[number] if hasattr(self, "down_proj_bias") else x


def routed_to(merged: list[int] | None, count: int, dense: int, layer: int) -> list[list[int]]:
    """The router's numbers of `count` experts, into which each of the `dense` ones was `merged`."""
    if merged is None:
        return [[number] for number in range(count)]
    if len(merged) != dense or set(merged) != set(range(count)):
        raise ValueError(
            f"config.json: a3.merged of layer {layer} is {merged}; expected, for each of {dense} "
            f"experts, one of 0 to {count - 1}, and each of these. Save or build the model again."
        )
    return [[one for one, into in enumerate(merged) if into == number] for number in range(count)]


def first_of(experts: nn.Module) -> str:
    """The parameter of a family's experts that reads their input: gate and up, or up alone."""
    return "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"


def activated(experts: nn.Module, x: Tensor, gated: bool) -> Tensor:
    """What a family's experts make of the first matrix's outputs (T, 2n), or (T, n) if not gated:
    the inputs of the second (T, n)."""
    if not gated:
        return experts.act_fn(x)
    if hasattr(experts, "_apply_gate"):
        return experts._apply_gate(x)
    gate, up = x.chunk(2, dim=-1)
    return experts.act_fn(gate) * up
