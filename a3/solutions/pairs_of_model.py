"""Which RoPE pairs go from all heads of all layers alike, and what that costs.

The modes `uniform-global` and `uniform-contiguous` of a3.solutions.qk keep the others; each has its
function here, whose name ends in `_losses`.
"""

import torch
from torch import Tensor

from a3.numerics.elimination import Elimination
from a3.solutions.pairs import eliminate, inverse, pairs_of

# Heads whose matrices are in memory at once.
HEADS = 256


def uniform_global_losses(C: Tensor, pairs: int, normed: bool) -> Elimination:
    """The order (F,) in which `pairs` go from all heads of all layers, C (L H, 2 F, 2 F).

    If they are `normed`, factors have no imaginary part, and C may be that of factors and norms.
    """
    found = eliminate(pairs_of(C, 1, len(C), pairs, normed))
    return found._replace(order=found.order[0])


def uniform_contiguous_losses(C: Tensor, pairs: int, normed: bool) -> Elimination:
    """The first pair (F,) of the best run where 0 to F - 1 pairs go; arguments as above.

    Dropping D costs ½ V_Dᵀ (P_DD)⁻¹ V_D = ½ ‖L⁻¹ V_D‖² with P_DD = L Lᵀ. L of the pairs before a
    run, followed by those after it from the last one on, has the L of all runs that start there.
    """
    losses = C.new_zeros(pairs, pairs)  # by first pair, and number dropped
    for some in C.split(HEADS):
        P = inverse(pairs_of(some, 1, len(some), pairs, normed).C)[0]
        for start in range(pairs):
            losses[start, 1:] += _dropped(P, pairs, start)
    # Runs that start at a pair have lost all before it.
    losses.masked_fill_(torch.ones_like(losses, dtype=torch.bool).tril(-1), torch.inf)
    best = losses.min(0)
    return Elimination(best.indices, best.values, C[:, :pairs, :pairs].sum() / 2)


def _dropped(P: Tensor, pairs: int, start: int) -> Tensor:
    """The loss (F - 1,) of all heads of P (H, n, n) when 1 to F - 1 of their pairs are dropped:
    those before `start` first, then the last ones."""
    gone = torch.cat((torch.arange(start), torch.arange(pairs - 1, start, -1))).to(P.device)
    parts = P.shape[-1] // pairs
    dims = (gone[:, None] + pairs * torch.arange(parts, device=P.device)).flatten()
    root = torch.linalg.cholesky(P[:, dims][:, :, dims])
    V = (dims < pairs).to(P.dtype).expand(len(P), -1)[..., None]
    Y = torch.linalg.solve_triangular(root, V, upper=False)
    return Y.square().sum((0, 2)).unflatten(0, (-1, parts)).sum(1).cumsum(0) / 2
