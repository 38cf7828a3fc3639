"""For stock runtimes: one set of RoPE pairs, contiguous pairs, one head size allocated."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from test_plus import (
    H,
    allocated,
    attention,
    collected,
    curve,
    gradient_model,
    least_factors,
    semidefinite,
    with_ridge,
    within,
)
from tiny import tiny_model

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.models.arch import load_arch
from a3.solutions import pairs_of_model, qk
from a3.solutions.modes import PRESETS, choose
from a3.solutions.plan import Plan
from a3.stages.approx.approximate import approximate
from a3.stages.approx.budget import at, cost, least_loss_by_rank, together

h = 16
PAIRS = h // 2
STOCK = PRESETS["a3-stock"]


@pytest.mark.parametrize("normed", [False, True])
def test_the_best_run_is_that_of_brute_force(normed):
    C = torch.cat([semidefinite(H, 2 * PAIRS, seed=s, rank=2 * PAIRS - 1) for s in (7, 8)])
    found = pairs_of_model.uniform_contiguous_losses(C, PAIRS, normed=normed)
    lifted = with_ridge(C[:, :PAIRS, :PAIRS] if normed else C)
    for dropped in range(PAIRS):
        kept = PAIRS - dropped
        losses = []
        for first in range(dropped + 1):
            gone = [f for f in range(PAIRS) if not first <= f < first + kept]
            e = [least_factors(one, gone, PAIRS) for one in lifted]
            losses.append(sum(x @ one @ x for x, one in zip(e, lifted, strict=True)).item() / 2)
        assert found.losses[dropped].item() == pytest.approx(min(losses), rel=1e-9, abs=1e-12)
        assert found.order[dropped] == losses.index(min(losses))


def test_contiguous_pairs_are_kept_and_refitted():
    weights = replace(attention(), rope_dims=attention().q.shape[-1])
    size = weights.q.shape[-1]
    C = semidefinite(H, size, seed=7, rank=size - 1)
    grams = semidefinite(H, size, seed=1), semidefinite(len(weights.k), size, seed=2)
    first = pairs_of_model.uniform_contiguous_losses(C, size // 2, normed=False).order
    for kept in range(1, size // 2):
        start = int(first[size // 2 - kept])
        found = qk.uniform_contiguous(weights, *grams, C, first, 2 * kept)
        assert found.pairs.tolist() == [list(range(start, start + kept))] * len(weights.k)
        order = torch.tensor([f for f in range(size // 2) if not start <= f < start + kept])
        order = torch.cat((order, torch.arange(start, start + kept)))
        same = qk.uniform_global(weights, *grams, C, order, 2 * kept)
        torch.testing.assert_close(found.q, same.q)
    full = qk.uniform_contiguous(weights, *grams, C, first, size)
    torch.testing.assert_close(full.q, weights.q)
    assert full.relative_error == 0


def test_contiguous_pairs_need_whole_rope(tmp_path):
    half = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    arch = load_arch(tiny_model(tmp_path / "m", "stablelm", rope_parameters=half))
    row = {"qk": "uniform-contiguous", "ov": "dense", "mlp": "dense", "ratio": "0.25"}
    with pytest.raises(A3Error, match="8 of 16 dimensions of a head are rotated"):
        Plan(choose(row)).ranks(arch)


# --- one head size --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_few_ranks_are_tried_one_by_one(seed):
    """Never worse than the best of all by more than the other curves' largest step."""
    mlps = [curve(10 * seed + i, True, 3, 0) for i in range(3)]
    heads = curve(10 * seed + 5, True, 40, 7)
    curves = [*mlps, replace(heads, components=("qk", "ov"))]
    budget = cost(curves, [5, 5, 5, 7])
    found = least_loss_by_rank(curves, 3, budget)
    every = product(*(c.ranks.tolist() for c in curves))
    fits = (ranks for ranks in every if within(cost(curves, ranks), budget))
    losses = [sum(map(at, curves, ranks)) for ranks in fits]
    step = max((c.loss[1:] - c.loss[:-1]).max().item() for c in mlps)
    assert within(cost(curves, found), budget)
    assert min(losses) - 1e-12 <= sum(map(at, curves, found)) <= min(losses) + step


def test_curves_of_one_rank_have_the_ranks_of_both():
    one, other = curve(1, True, 3, 1, component="qk"), curve(2, True, 5, 2, component="ov")
    costs = {key: cost[::2] for key, cost in other.costs.items()}
    other = replace(other, ranks=other.ranks[::2], loss=other.loss[::2], costs=costs)
    (joined,) = together([one, other], (), ("qk", "ov"))
    assert joined.ranks.tolist() == [8, 6, 4]
    torch.testing.assert_close(joined.loss, one.loss[::2] + other.loss)
    assert joined.costs["parameters"].tolist() == [8 * 8, 8 * 6, 8 * 4]
    assert joined.costs["cached_numbers"].tolist() == [3 * 8, 3 * 6, 3 * 4]


@pytest.fixture(scope="module")
def stocked(tmp_path_factory):
    """A model, and all statistics of a3-stock."""
    folder = tmp_path_factory.mktemp("stocked")
    gradient_model(folder, "llama-biased")
    collected(folder, "rxx", Plan(choose(STOCK | {"ratio": "0.3"})).kinds())
    return folder


@pytest.mark.parametrize("mode", ["uniform-global", "uniform-contiguous"])
def test_heads_get_one_size_and_mlps_one_by_layer(stocked, mode):
    row = STOCK | {"qk": f"{mode}~"}
    record = allocated(stocked, mode, row, ratio="0.6")
    ranks = record["ranks"]
    assert len({*ranks["qk"], *ranks["ov"]}) == 1
    assert ranks["qk"][0] < 16
    assert ranks["qk"][0] % 4 == 0
    assert all(rank % 32 == 0 or rank == 96 for rank in ranks["mlp"])
    assert record["spent"]["parameters"] <= record["budget"]["parameters"]
    plan, out = Plan(choose(row | {"ratio": "0.6"})), stocked / f"{mode}-small"
    approximate(stocked / "dense", stocked / "rxx", plan, out, stocked / f"{mode}.json")
    said = read_record(out / "approx.json")
    pairs = {tuple(row) for layer in said["layers"] for row in layer["qk"]["rope_pairs"]}
    assert len(pairs) == 1
    (kept,) = pairs
    if mode == "uniform-contiguous":
        assert kept == tuple(range(kept[0], kept[0] + len(kept)))
    # The budget is that of the ratio's own ranks, in parameters.
    even = {component: cell[:-1] for component, cell in row.items()} | {"ratio": "0.6"}
    approximate(stocked / "dense", stocked / "rxx", Plan(choose(even)), stocked / f"{mode}-even")
    size = read_record(stocked / f"{mode}-even/approx.json")["size"]["compressed"]["parameters"]
    saved = record["budget"]["parameters"] - record["spent"]["parameters"]
    assert size - said["size"]["compressed"]["parameters"] == saved


def test_a_multiple_is_one_of_heads_and_mlps(stocked):
    record = allocated(stocked, "eights", STOCK, multiple=8)
    assert all(rank % 8 == 0 for ranks in record["ranks"].values() for rank in ranks)


def test_uniform_mlps_beside_one_head_size(stocked):
    ranks = allocated(stocked, "even", STOCK, uniform=("mlp", "qk"))["ranks"]
    assert len(set(ranks["mlp"])) == 1
    assert len({*ranks["qk"], *ranks["ov"]}) == 1
