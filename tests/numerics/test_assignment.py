"""Linear assignment: the largest sum, by trying all permutations."""

from itertools import permutations

import pytest
import torch

from a3.numerics.assignment import assign


def scores_of(case, n):
    draw = torch.Generator().manual_seed(n)
    scores = torch.randn(n, n, dtype=torch.float64, generator=draw)
    return {
        "random": scores,
        "far apart": scores * 10.0 ** (6 * torch.randn(n, n, generator=draw)).clamp(-9, 9),
        "whole numbers": (2 * scores).round(),  # many sums are the same
        "zeros": torch.zeros(n, n),
        "two rows alike": scores[[0, *range(n - 1)]],
    }[case]


CASES = ["random", "far apart", "whole numbers", "zeros", "two rows alike"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_no_permutation_has_a_larger_sum(case, n):
    scores = scores_of(case, n)
    found = assign(scores)
    assert sorted(found.tolist()) == list(range(n))
    best = max(
        sum(scores[i, p].item() for i, p in enumerate(one)) for one in permutations(range(n))
    )
    sums = scores[range(n), found].sum().item()
    assert sums == pytest.approx(best, rel=1e-12, abs=1e-12)
    assert torch.equal(found, assign(scores.clone()))


def test_a_permuted_matrix_is_put_in_order():
    x = torch.randn(80, 200, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    assert torch.equal(order[assign(x @ x[order].T)], torch.arange(80))
