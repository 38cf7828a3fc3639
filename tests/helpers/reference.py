"""The paper's solutions as the paper writes them: dense, slow, float64. What ours are held to.

Square roots and SVDs of d × d matrices, one head or group at a time; nothing is shared with a3.
"""

import torch


def root(R):
    """R^½ and its pseudo-inverse, by eigendecomposition."""
    values, vectors = torch.linalg.eigh((R + R.T) / 2)
    values = values.clamp(min=0).sqrt()
    inverse = torch.where(values > values.max() * 1e-9, 1 / values, 0.0)
    return vectors @ torch.diag(values) @ vectors.T, vectors @ torch.diag(inverse) @ vectors.T


def fused_low_rank(R, W, P, rank):
    """R^-½ SVD_r(R^½ W [P₁ … P_g]), as a d × d list, and the objective's value."""
    half, inverse = root(R)
    target = half @ W @ torch.cat(list(P), dim=1)
    U, S, V = torch.linalg.svd(target, full_matrices=False)
    best = inverse @ (U[:, :rank] * S[:rank]) @ V[:rank]
    return list(best.split(P.shape[-1], dim=1)), S[rank:].square().sum()


def objective(R, targets, found):
    """Σᵢ ‖R^½ (targetᵢ − foundᵢ)‖²."""
    half, _ = root(R)
    return sum((half @ (t - f)).square().sum() for t, f in zip(targets, found, strict=True))


def rope_pairs(Rq, Rk, Wq, Wk, rank, uniform=False):
    """Kept pairs of each group: Wq (G, g, d, h), Wk (G, d, h); halves layout."""
    half_q, half_k = root(Rq)[0], root(Rk)[0]
    pairs = Wk.shape[-1] // 2
    scores = torch.zeros(len(Wk), pairs, dtype=torch.float64)
    for group in range(len(Wk)):
        for head in range(Wq.shape[1]):
            for f in range(pairs):
                for j in (f, f + pairs):
                    left = (half_q @ Wq[group, head, :, j]).square().sum()
                    scores[group, f] += left * (half_k @ Wk[group, :, j]).square().sum()
    if uniform:
        scores = scores.sum(0, keepdim=True).expand_as(scores)
    return [sorted(row.argsort(descending=True)[: rank // 2].tolist()) for row in scores]


def mlp_channels(R, down, rank, weights=True):
    """Kept channels from the full n × n autocorrelation."""
    score = root(R)[0].square().sum(0)
    if weights:
        score = score * down.square().sum(1)
    return sorted(score.argsort(descending=True)[:rank].tolist())


def augment(R, mean):
    """Autocorrelation of [x, 1], for layers with biases."""
    row = torch.cat((mean, mean.new_ones(1)))
    return torch.cat((torch.cat((R, mean[:, None]), dim=1), row[None]))


def more_tokens(z, others, count=1):
    """An expert's tokens z (N, n) and `count` more, of uncorrelated channels, as rows.

    Each has the mean square that a channel has over the tokens of all experts, `others`.
    """
    n = z.shape[1]
    mean = sum(x.square().sum() for x in others) / (n * sum(len(x) for x in others))
    return torch.cat((z, (count * mean).sqrt() * torch.eye(n, dtype=z.dtype)))


def average_linkage(points, count):
    """Clusters of points by the definition: all distances of all pairs again in each step."""
    clusters = [[i] for i in range(len(points))]
    while len(clusters) > count:
        best = None
        for i in range(len(clusters)):
            for j in range(i + 1, len(clusters)):
                pairs = [(points[a] - points[b]).norm() for a in clusters[i] for b in clusters[j]]
                distance = sum(pairs) / len(pairs)
                # Not nearer by rounding alone.
                if best is None or distance < best[0] * (1 - 1e-12):
                    best = (distance, i, j)
        _, i, j = best
        clusters[i] = sorted(clusters[i] + clusters.pop(j))
    return [next(n for n, one in enumerate(clusters) if i in one) for i in range(len(points))]


def weighted_mean(values, weights):
    """Σ w_i v_i / Σ w_i over the first dimension."""
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total = total + weight * value
    return total / sum(weights)


def nearest_dominant(H, counts, keep):
    """Into which of the experts of the largest counts each goes: by cosines of logits H (T, E)."""
    dominant = sorted(sorted(range(len(counts)), key=lambda e: -counts[e])[:keep])
    found = []
    for e in range(len(counts)):
        cosines = []
        for d in dominant:
            norms = H[:, e].norm() * H[:, d].norm()
            cosines.append((H[:, e] @ H[:, d] / norms).item() if norms > 0 else 0.0)
        best = max(range(keep), key=lambda n: round(cosines[n], 9))
        found.append(dominant.index(e) if e in dominant else best)
    return found
