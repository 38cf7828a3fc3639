"""Hierarchical clustering of a few points."""

import torch
from torch import Tensor


def average_linkage(points: Tensor, count: int) -> Tensor:
    """In which of `count` clusters each point (m, d) is, (m,), by the order of their first points.

    At first each point is a cluster. The two clusters with the least mean distance between a point
    of the one and a point of the other are joined, until `count` are left (Sokal & Michener 1958).
    Of pairs with the same mean the first is joined, so equal inputs always give equal clusters.
    """
    x = points.double()
    # Sums of the distances between the points of two clusters, which add up when they are joined.
    sums = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    members = torch.eye(len(x), dtype=torch.bool, device=x.device)
    while len(members) > count:
        sizes = members.sum(1).double()
        means = sums / (sizes[:, None] * sizes)
        # Each pair once, and none of a cluster and itself.
        means.masked_fill_(torch.ones_like(means, dtype=torch.bool).tril(), torch.inf)
        one, other = divmod(int(means.argmin()), len(means))
        members[one] |= members[other]
        sums[one] += sums[other]
        sums[:, one] += sums[:, other]
        left = torch.arange(len(members), device=x.device) != other
        members, sums = members[left], sums[left][:, left]
    return members.int().argmax(0)
