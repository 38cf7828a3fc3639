"""Counts the operations of a computation while it runs, and what each takes on this machine.

Counts of small pieces are exact, so they can be scaled to sizes at which a run would take minutes.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What is counted of an operation: multiply-adds by type and dtype, bytes read and written, calls.
Key = tuple[str, torch.dtype | None]

BYTES: Key = ("bytes", None)

CALLS: Key = ("calls", None)

PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")

# Sizes of the matrices, and bytes, with which rates are measured.
SIZE, COPIED = 640, 2**25

# A call is timed again until these seconds have passed, and once again if it took less than LONG.
PATIENCE, LONG = 0.03, 0.1


class Counts(TorchDispatchMode):
    """Counts the operations of all calls of torch inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Key] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: else torch imports its compiler, which takes a second."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Called by torch in place of each operation."""
        result = func(*args, **(kwargs or {}))
        given = [one for one in args if isinstance(one, Tensor)]
        if given and not _is_view(func):
            self.found[CALLS] += 1
            made = [one for one in _listed(result) if isinstance(one, Tensor)]
            self.found[BYTES] += sum(x.numel() * x.element_size() for x in (*given, *made))
            if (what := _operations(func.overloadpacket.__name__, given)) is not None:
                self.found[what[0], given[0].dtype] += what[1]
        return result


@cache
def _is_view(func: Any) -> bool:
    """Whether an operation moves no data: its result is a view of an argument."""
    aliases = [one.alias_info for one in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _listed(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _operations(name: str, given: list[Tensor]) -> tuple[str, int] | None:
    """Type and number of multiply-adds of an operation of linear algebra; None for others."""
    first, last = given[0], given[-1]
    if name in PRODUCTS:
        left, right = given[-2:]
        return "product", left.numel() * right.shape[-1]
    if first.dim() < 2:
        return None
    n = first.shape[-1]
    cube = first.numel() * n
    if name in ("linalg_cholesky_ex", "cholesky"):
        return "cholesky", cube // 6
    if name in ("_linalg_eigh", "linalg_eigh"):
        return "eigh", cube
    if name == "cholesky_inverse":
        return "triangular", cube // 3
    if name in ("linalg_solve_triangular", "cholesky_solve"):
        matrix, other = (last, first) if name == "cholesky_solve" else (first, last)
        passes = 2 if name == "cholesky_solve" else 1
        return "triangular", passes * other.numel() * matrix.shape[-1] // 2
    if name in ("linalg_inv_ex", "linalg_qr", "_linalg_solve_ex"):
        return "triangular", cube
    return None


def counted(call: Callable[[], Any]) -> Counter[Key]:
    """The operations of a call."""
    with Counts() as counts:
        call()
    return counts.found


def clock(call: Callable[[], Any], device: torch.device) -> float:
    """Least seconds of a call; short ones are repeated.

    On one thread they are those of this process, whatever else the machine does.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if alone else time.perf_counter
    least, spent, calls = math.inf, 0.0, 0
    while spent < PATIENCE or (calls < 2 and spent < LONG):
        start = now()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = now() - start
        least, spent, calls = min(least, took), spent + took, calls + 1
    return least


@cache
def rate(key: Key, device: torch.device) -> float:
    """Seconds of one operation here: of a matrix of SIZE, of a copy, or of a call."""
    what, dtype = key
    if key == CALLS:
        one = torch.ones(1, device=device)
        return clock(lambda: [one + one for _ in range(1000)], device) / 1000
    if key == BYTES:
        source = torch.zeros(COPIED // 8, dtype=torch.float64, device=device)
        target = source.clone()
        return clock(lambda: target.copy_(source), device) / (2 * COPIED)
    x = torch.rand(SIZE, SIZE, dtype=dtype, device=device)
    if what == "product":
        return clock(lambda: x @ x, device) / SIZE**3
    R = x @ x.T + SIZE * torch.eye(SIZE, dtype=dtype, device=device)
    calls: dict[str, tuple[Callable[[], Any], float]] = {
        "cholesky": (lambda: torch.linalg.cholesky(R), SIZE**3 / 6),
        "eigh": (lambda: torch.linalg.eigh(R), SIZE**3),
        "triangular": (lambda: torch.linalg.solve_triangular(R, x, upper=False), SIZE**3 / 2),
    }
    call, operations = calls[what]
    return clock(call, device) / operations


def modelled(counts: Mapping[Key, float], device: torch.device) -> float:
    """Seconds that operations take here, by their counts."""
    return sum(number * rate(key, device) for key, number in counts.items())


def scaled(
    less: Counter[Key], more: Counter[Key], sizes: tuple[int, int], size: int
) -> Counter[Key]:
    """Counts at `size`, by those at two smaller `sizes`.

    Multiply-adds are a s² + b s³, bytes a s + b s², with a and b not negative. What grows more
    slowly goes on as it grows between the two.
    """
    found: Counter[Key] = Counter()
    step, growth = sizes[1] / sizes[0], size / sizes[1]
    for key, number in more.items():
        power = 2.0 if key == BYTES else 3.0
        share = 1.0  # of the higher power
        if step > 1 and less[key] > 0:
            share = (1 - less[key] * step ** (power - 1) / number) / (1 - 1 / step)
            if share < 0:
                share, power = 1.0, max(0.0, math.log(number / less[key], step))
        share = min(1.0, share)
        found[key] = round(number * growth ** (power - 1) * (share * growth + 1 - share))
    return found
