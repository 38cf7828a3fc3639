"""Which RoPE pairs go from all heads of all layers alike, and what that costs.

The modes `uniform-global` and `uniform-contiguous` of a3.solutions.qk keep the others; each has its
function here, whose name ends in `_losses`.
"""

import torch
from torch import Tensor

from a3.numerics.elimination import Elimination
from a3.solutions.qk import by_group, eliminate_pairs, inverse_of


def uniform_global_losses(C: Tensor, real: bool) -> Elimination:
    """The order (F,) in which pairs go from all heads of all layers, C (L H, 2 F, 2 F).

    `real`: queries are normed, so that factors have no imaginary part.
    """
    found = eliminate_pairs(by_group(C, 1, real))
    return found._replace(order=found.order[0])


def uniform_contiguous_losses(C: Tensor, real: bool) -> Elimination:
    """The first pair (F,) of the best run where 0 to F - 1 pairs go; C and `real` as above.

    Dropping D costs ½ V_Dᵀ (P_DD)⁻¹ V_D = ½ ‖L⁻¹ V_D‖² with P_DD = L Lᵀ. L of the pairs before a
    run, followed by those after it from the last one on, has the L of all runs that start there.
    """
    grouped = by_group(C, 1, real)
    parts, pairs = grouped.shape[2:4]
    P = inverse_of(grouped)[0]
    losses = P.new_full((pairs, pairs), torch.inf)  # by first pair, and number dropped
    losses[0, 0] = 0
    for start in range(pairs):
        gone = torch.cat((torch.arange(start), torch.arange(pairs - 1, start, -1))).to(P.device)
        dims = (gone[:, None] + pairs * torch.arange(parts, device=P.device)).flatten()
        root = torch.linalg.cholesky(P[:, dims][:, :, dims])
        V = (dims < pairs).to(P.dtype).expand(len(P), -1)[..., None]
        Y = torch.linalg.solve_triangular(root, V, upper=False)
        cost = Y.square().sum((0, 2)).unflatten(0, (-1, parts)).sum(1).cumsum(0) / 2
        least = max(start, 1)
        losses[start, least:] = cost[least - 1 :]
    best = losses.min(0)
    return Elimination(best.indices, best.values, grouped[:, :, 0, :, 0].sum() / 2)
