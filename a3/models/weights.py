"""The weights of one layer in the paper's row-vector convention, y = x W."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionWeights:
    """Weights of one layer's attention; d̂ is the hidden size, plus one if there are biases.

    q (H, d̂, h), k (G, d̂, h), v (G, d̂, h), o (H, h, d); head i belongs to group i // (H / G). The
    first `rope_dims` of the h dimensions of q and k are rotated. If q and k are normed before RoPE,
    over each head or over all heads together (`norm`), q_gain (H, h) and k_gain (G, h) are the
    norm's gains.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    rope_dims: int = 0
    norm: str | None = None
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None

    def grouped(self, heads: Tensor) -> Tensor:
        """(H, a, b) to (G, H / G, a, b)."""
        return heads.unflatten(0, (self.k.shape[0], -1))


@dataclass(frozen=True)
class MLPWeights:
    """Weights of one layer's MLP: up and gate (d̂, n), or no gate; down (n, d)."""

    up: Tensor
    gate: Tensor | None
    down: Tensor
