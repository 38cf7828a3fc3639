"""Every solution against the slow dense reference, on friendly and unfriendly statistics."""

from dataclasses import replace

import pytest
import reference
import torch

from a3.models.family import AttentionWeights, MLPWeights
from a3.numerics.linalg import gram_factor, keep_best, shared_subspace, subspace_error
from a3.solutions import mlp, ov, qk

D, H, G, h, N = 24, 6, 3, 8, 40
TOLERANCE = 1e-9  # of the objective of the zero solution (method.md)


def inputs(kind, width, seed=0):
    """Autocorrelation of tokens with a mean: full rank, ill conditioned, or of 10 tokens."""
    draw = torch.Generator().manual_seed(seed)
    count = 10 if kind == "singular" else 400
    x = torch.randn(count, width, dtype=torch.float64, generator=draw) + 0.5
    if kind == "ill-conditioned":
        x = x * torch.logspace(0, -6, width, dtype=torch.float64)
    if kind == "dead-channel":
        x[:, 3] = 0
    return x.T @ x / count, x.mean(0)


def gram(R, W):
    """What collect sees: the autocorrelation of x W."""
    return W.mT @ R @ W


def attention(width=D, seed=1):
    draw = torch.Generator().manual_seed(seed)
    shape = {"q": (H, width, h), "k": (G, width, h), "v": (G, width, h), "o": (H, h, D)}
    drawn = {
        name: torch.randn(*size, dtype=torch.float64, generator=draw)
        for name, size in shape.items()
    }
    return AttentionWeights(**drawn, rope_dims=h)


KINDS = ("random", "ill-conditioned", "singular", "dead-channel")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 5, h])
@pytest.mark.parametrize("mode", ["xkv", "identity", "biased xkv"])
def test_ov_is_as_good_as_the_joint_svd(kind, rank, mode):
    R, mean = inputs(kind, D)
    if mode == "biased xkv":
        R = reference.augment(R, mean)
    weights = attention(len(R))
    if mode == "identity":
        R = torch.eye(len(R), dtype=torch.float64)
    if mode == "identity":
        found = ov.identity(weights, rank)
    else:
        found = ov.xkv(weights, gram(R, weights.v), rank)
    assert found.v.shape == (G, len(R), rank)
    assert found.o.shape == (H, rank, D)
    lost = whole = 0.0
    for group in range(G):
        P = weights.grouped(weights.o)[group]
        targets = [weights.v[group] @ W for W in P]
        solution = [found.v[group] @ W for W in weights.grouped(found.o)[group]]
        zero = reference.objective(R, targets, [0 * t for t in targets])
        best, _ = reference.fused_low_rank(R, weights.v[group], P, rank)
        ours = reference.objective(R, targets, solution)
        assert ours <= reference.objective(R, targets, best) + TOLERANCE * zero
        lost, whole = lost + ours, whole + zero
    assert found.relative_error == pytest.approx((lost / whole).item(), rel=1e-6, abs=1e-9)
    if rank == h:
        torch.testing.assert_close(
            found.v[0] @ found.o[0], weights.v[0] @ weights.o[0], rtol=0, atol=1e-7
        )


@pytest.mark.parametrize("kind", KINDS)
def test_axkv_of_mha_is_the_svd_of_each_head_with_its_own_statistics(kind):
    weights = attention()
    weights = AttentionWeights(
        q=weights.q, k=weights.k, v=weights.q.flip(0).contiguous(), o=weights.o
    )
    weights = AttentionWeights(q=weights.q, k=weights.q, v=weights.v, o=weights.o)  # H groups
    attended = torch.stack([inputs(kind, D, seed)[0] for seed in range(H)])
    blocks = weights.v.mT @ attended @ weights.v
    found = ov.axkv(weights, blocks, 3)
    for head in range(H):
        target = [weights.v[head] @ weights.o[head]]
        best, _ = reference.fused_low_rank(
            attended[head], weights.v[head], weights.o[head][None], 3
        )
        ours = reference.objective(attended[head], target, [found.v[head] @ found.o[head]])
        zero = reference.objective(attended[head], target, [0 * target[0]])
        assert ours <= reference.objective(attended[head], target, best) + TOLERANCE * zero


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 5, h])
@pytest.mark.parametrize("mode", ["qk", "q_only", "k_only", "identity", "biased qk", "qk_cov"])
def test_qk_without_rope_is_as_good_as_the_joint_svd(kind, rank, mode):
    R, mean = inputs(kind, D)
    R = reference.augment(R, mean) if mode == "biased qk" else R
    one = torch.eye(len(R), dtype=torch.float64)
    Rq = one if mode in ("k_only", "identity") else R
    Rk = one if mode in ("q_only", "identity") else R
    weights = attention(len(R))
    Gq, Gk = gram(R, weights.q), gram(R, weights.k)
    reads = {"q_only": [Gq], "k_only": [Gk], "identity": []}.get(mode, [Gq, Gk])
    if mode == "qk_cov":
        Rk = R - mean[:, None] * mean
        reads.append((mean @ weights.k).flatten())
    found = getattr(qk, mode.removeprefix("biased "))(weights, *reads, rank)
    assert found.q.shape == (H, len(R), rank)
    assert found.k.shape == (G, len(R), rank)
    half_q = reference.root(Rq)[0]
    lost = whole = 0.0
    for group in range(G):
        P = torch.stack([q.T @ half_q for q in weights.grouped(weights.q)[group]])
        targets = [weights.k[group] @ W for W in P]
        solution = [found.k[group] @ q.T @ half_q for q in weights.grouped(found.q)[group]]
        zero = reference.objective(Rk, targets, [0 * t for t in targets])
        best, _ = reference.fused_low_rank(Rk, weights.k[group], P, rank)
        ours = reference.objective(Rk, targets, solution)
        assert ours <= reference.objective(Rk, targets, best) + TOLERANCE * zero
        lost, whole = lost + ours, whole + zero
    assert found.relative_error == pytest.approx((lost / whole).item(), rel=1e-6, abs=1e-9)
    if rank == h:
        torch.testing.assert_close(
            found.q[0] @ found.k[0].T, weights.q[0] @ weights.k[0].T, rtol=0, atol=1e-7
        )


def test_what_all_keys_have_in_common_takes_no_rank():
    """Keys of rank 2 beside a large mean: attention is the same with 2 dimensions of 6 and more."""
    generator = torch.Generator().manual_seed(0)
    weights = attention()
    x = torch.randn(200, 2, generator=generator, dtype=torch.float64) @ torch.randn(
        2, D, generator=generator, dtype=torch.float64
    ) + 20 * torch.randn(D, generator=generator, dtype=torch.float64)
    R, mean = x.T @ x / len(x), x.mean(0)
    Gq, Gk = gram(R, weights.q), gram(R, weights.k)
    scores = [weights.grouped(x @ weights.q) @ (x @ weights.k).mT[:, None]]
    for found in (
        qk.qk_cov(weights, Gq, Gk, (mean @ weights.k).flatten(), 2),
        qk.qk(weights, Gq, Gk, 2),
    ):
        scores.append(found.q.unflatten(0, (G, -1)))
        scores[-1] = (x @ scores[-1]) @ (x @ found.k).mT[:, None]
    dense, centred, plain = ((s / h**0.5).softmax(-1) for s in scores)
    torch.testing.assert_close(centred, dense, rtol=0, atol=1e-6)
    assert (plain - dense).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 6, h])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_qk_keeps_the_pairs_of_the_paper(kind, rank, uniform, biased):
    R, mean = inputs(kind, D)
    R = reference.augment(R, mean) if biased else R
    weights = attention(len(R))
    solve = qk.rxx_w_rxx_uniform if uniform else qk.rxx_w_rxx
    found = solve(weights, gram(R, weights.q), gram(R, weights.k), rank)
    Wq = weights.grouped(weights.q)
    pairs = reference.rope_pairs(R, R, Wq, weights.k, rank, uniform)
    assert found.pairs.tolist() == pairs
    lost = whole = 0.0
    half = reference.root(R)[0]
    for head in range(H):
        group = head // (H // G)
        columns = pairs[group] + [f + h // 2 for f in pairs[group]]
        torch.testing.assert_close(found.q[head], weights.q[head][:, columns], rtol=0, atol=0)
        torch.testing.assert_close(found.k[group], weights.k[group][:, columns], rtol=0, atol=0)
        dense = half @ weights.q[head] @ weights.k[group].T @ half
        small = half @ found.q[head] @ found.k[group].T @ half
        lost, whole = lost + (dense - small).square().sum(), whole + dense.square().sum()
    assert found.relative_error == pytest.approx((lost / whole).item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 17, N])
@pytest.mark.parametrize("gated", [True, False])
def test_mlp_keeps_the_channels_of_the_paper(kind, rank, gated):
    R, _ = inputs(kind, N)
    draw = torch.Generator().manual_seed(2)
    up, gate, down = (torch.randn(D, N, dtype=torch.float64, generator=draw) for _ in range(3))
    weights = MLPWeights(up=up, gate=gate if gated else None, down=down.T.contiguous())
    for solve, uses_weights in ((mlp.rxx_w, True), (mlp.rxx, False)):
        found = solve(weights, R.diagonal(), rank)
        kept = reference.mlp_channels(R, weights.down, rank, uses_weights)
        assert found.channels.tolist() == kept
        torch.testing.assert_close(found.up, up[:, kept], rtol=0, atol=0)
        torch.testing.assert_close(found.down, weights.down[kept], rtol=0, atol=0)
        assert (found.gate is not None) == gated
        assert 0 <= found.relative_error <= 1
        if rank == N:
            assert found.relative_error == pytest.approx(0, abs=1e-12)


def test_a_channels_scale_costs_no_precision():
    """W D and D⁻¹ P give one and the same product, however wild the diagonal D."""
    draw = torch.Generator().manual_seed(3)
    G1 = torch.randn(h, h, dtype=torch.float64, generator=draw)
    K1 = torch.randn(h, h, dtype=torch.float64, generator=draw)
    G1, K1 = G1 @ G1.T, K1 @ K1.T
    scale = torch.logspace(-8, 8, h, dtype=torch.float64)
    E, D1 = shared_subspace(G1, K1, 3)
    G2, K2 = G1 * scale[:, None] * scale, K1 / scale[:, None] / scale
    E2, D2 = shared_subspace(G2, K2, 3)
    assert subspace_error(G2, K2, E2, D2).item() == pytest.approx(
        subspace_error(G1, K1, E, D1).item(), rel=1e-8
    )


def test_factor_of_nothing_is_invertible():
    C, inverse = gram_factor(torch.zeros(2, h, h, dtype=torch.float64))
    torch.testing.assert_close(C @ inverse, torch.eye(h).double().expand(2, -1, -1))


def test_ties_go_to_the_lower_index():
    assert keep_best(torch.tensor([1.0, 2, 1, 2, 1]), 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize("norm", ["head", "layer"])
def test_normed_heads_keep_the_best_pairs_and_their_length(norm):
    """The norm over r of h dimensions is too large; one scalar a head (or layer) undoes that."""
    draw = torch.Generator().manual_seed(4)
    weights = attention()
    spread = torch.tensor([1, 1, 1, 0.1] * 2).double()
    gains = [1 + 0.3 * torch.randn(n, h, generator=draw, dtype=torch.float64) for n in (H, G)]
    weights = replace(weights, norm=norm, q_gain=gains[0], k_gain=gains[1])
    raw = torch.randn(500, H, h, generator=draw, dtype=torch.float64) * spread

    def normed(x):
        return x / x.square().mean((-2, -1) if norm == "layer" else -1, keepdim=True).sqrt()

    q, k = normed(raw), normed(raw[:, :G].roll(1, dims=2))
    found = qk.rxx_w_rxx(weights, *(torch.einsum("thi,thj->hij", x, x) / 500 for x in (q, k)), 6)
    mean_q = (q * gains[0]).square().mean(0).unflatten(0, (G, -1)).sum(1)
    score = (mean_q * (k * gains[1]).square().mean(0)).unflatten(-1, (2, -1)).sum(-2)
    best = score.argsort(descending=True)[:, :3].sort().values
    assert found.pairs.tolist() == best.tolist()
    kept = torch.cat((best, best + h // 2), dim=1).repeat_interleave(H // G, dim=0)
    dense = (q * gains[0]).gather(2, kept.expand(500, -1, -1))
    again = normed(raw.gather(2, kept.expand(500, -1, -1)))
    small = again * found.q_gain
    without = again * gains[0].gather(1, kept)
    # The best scalar that knows every token: a regression of the dense vectors on the small ones.
    dims = (0, 1, 2) if norm == "layer" else (0, 2)
    exact = without * (
        (dense * without).sum(dims, keepdim=True) / without.square().sum(dims, keepdim=True)
    )
    ours, best, none = ((dense - x).square().sum().item() for x in (small, exact, without))
    assert best <= ours < 1.02 * best
    assert best < 0.5 * none
