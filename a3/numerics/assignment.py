"""Linear assignment: which column each row takes, so that the sum is the largest."""

import numpy as np
import torch
from torch import Tensor


def assign(scores: Tensor) -> Tensor:
    """The permutation p (n,) that maximises Σ_i scores[i, p_i], of scores (n, n).

    Shortest augmenting paths (Jonker & Volgenant 1987; Crouse 2016, "On implementing 2D rectangular
    assignment algorithms"): rows are added one after another, each by the path that costs the
    least in reduced costs, in at most n³ operations. Equal inputs always give equal permutations.
    """
    costs = -scores.double().cpu().numpy()
    n = len(costs)
    row_of, column_of = np.full(n, -1), np.full(n, -1)
    of_rows, of_columns = np.zeros(n), np.zeros(n)
    for start in range(n):
        shortest, back = np.full(n, np.inf), np.full(n, -1)
        left = np.ones(n, dtype=bool)
        row, rows, reached = start, [start], 0.0
        while True:
            length = reached + costs[row] - of_rows[row] - of_columns
            better = left & (length < shortest)
            shortest[better], back[better] = length[better], row
            column = int(np.where(left, shortest, np.inf).argmin())
            reached = shortest[column]
            left[column] = False
            if row_of[column] < 0:
                break
            row = int(row_of[column])
            rows.append(row)
        of_rows[start] += reached
        others = rows[1:]
        of_rows[others] += reached - shortest[column_of[others]]
        of_columns[~left] -= reached - shortest[~left]
        while True:
            row = int(back[column])
            row_of[column] = row
            column, column_of[row] = int(column_of[row]), column
            if row == start:
                break
    return torch.from_numpy(column_of).to(scores.device)
