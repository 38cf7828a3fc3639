"""Simulates low precision in a compressed model, by the entry `quantised` of its config.

`modules` has, by name, the format of a linear layer's input `x` and its `rank`. Weights in the
checkpoint are already rounded to their formats. `products` has the formats of the operands q, k, p
and v of attention's two products. All arithmetic is in the model's dtype, so nothing runs faster
than before.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import repeat_kv

from a3.models.attention_a3 import A3Attention
from a3.models.modeling_a3 import inside
from a3.numerics.formats import quantise


class QuantisedLinear(nn.Linear):
    """x_q W_q + (x_q A)_q B + b: x, and x A, in the format `x`."""

    def __init__(self, inputs: int, outputs: int, bias: bool, rank: int, x: str) -> None:
        super().__init__(inputs, outputs, bias)
        self.x = x
        self.A = self.B = None
        if rank:
            self.A = nn.Parameter(torch.zeros(inputs, rank))
            self.B = nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) to (..., outputs)."""
        x = quantise(x, self.x)
        out = super().forward(x)
        return out if self.A is None else out + quantise(x @ self.A, self.x) @ self.B


class QuantisedProducts:
    """Eager attention whose operands are quantised: q, k and v along the head, p along the keys.

    The published code groups k along the tokens, in blocks of sixteen; a growing cache could not
    keep such blocks.
    """

    def __init__(self, formats: dict[str, str]) -> None:
        self.formats = formats

    def __call__(
        self,
        module: A3Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """q (B, H, L, r), k and v (B, G, K, r), mask additive; (B, L, H, r') and p (B, H, L, K)."""
        # For a prompt, heads are padded with zeros to one size.
        q, k = (
            quantise(x[..., : module.qk_rank], self.formats[name])
            for x, name in ((q, "q"), (k, "k"))
        )
        v = quantise(v[..., : module.ov_rank], self.formats["v"])
        scores = q @ repeat_kv(k, module.num_key_value_groups).mT * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            scores = scores + mask
        p = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        p = nn.functional.dropout(p, p=dropout, training=module.training)
        out = quantise(p, self.formats["p"]) @ repeat_kv(v, module.num_key_value_groups)
        return out.transpose(1, 2).contiguous(), p


def simulate(model: nn.Module, said: dict[str, Any]) -> None:
    """Replace the linear layers and the attention products that a config's `quantised` names.

    `model` is without its head.
    """
    for name, one in said["modules"].items():
        dense = model.get_submodule(inside(name))
        inputs, outputs = sizes_of(dense)
        linear = QuantisedLinear(inputs, outputs, dense.bias is not None, one["rank"], one["x"])
        model.set_submodule(inside(name), linear)
    if set(said["products"].values()) == {"none"}:
        return
    for module in model.modules():
        if isinstance(module, A3Attention):
            module.eager = QuantisedProducts(said["products"])
            # Fused kernels do not expose the probabilities.
            module.config._attn_implementation = "eager"


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, for both orientations of its weight."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return linear.nx, linear.nf
