"""Stage allocate: allocates one budget across layers and components by their predicted loss.

For each layer and rank, a mode that supports allocation predicts the model's second-order loss
(nats per token) from weights and Rxx alone: stage losses, which this stage repeats where it is not
given its files. The chosen ranks minimise the sum under the budget.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from a3.core.files import write_record
from a3.core.provenance import provenance
from a3.solutions.plan import Plan
from a3.stages.approx.allocator import Allocator

# Ranks of the allocator's curves, and what is said of how they were found.
Found = tuple[list[int], dict[str, Any]]


def allocate(
    model_folder: Path,
    rxx_folder: Path,
    plan: Plan,
    out: Path,
    *,
    uniform: tuple[str, ...] = (),
    losses: list[Path] | None = None,
    device: str = "cpu",
    file_bytes: int | None = None,
    within_loss: Callable[[Allocator], Found] | None = None,
) -> None:
    """Write each layer's ranks of the components with an allocated ratio (`plan.shared`), and the
    seconds that it took beside them.

    The budget allows as many parameters and as much KV cache as with the same ratio everywhere
    (`Allocator.at_ratio`), which also limits FLOPs, since they come from weights and attention
    products; or what the plan's target says. Ranks are multiples of `plan.step`. `within_loss`
    finds those of a target with a largest loss; the other arguments are the allocator's. Raises
    A3Error as Allocator does.
    """
    start = time.perf_counter()
    allocator = Allocator(
        model_folder,
        rxx_folder,
        plan,
        uniform=uniform,
        losses=losses,
        device=device,
        file_bytes=file_bytes,
    )
    said: dict[str, Any] = {}
    limits = allocator.at_ratio() if plan.target is None else allocator.asked()
    if plan.target is not None and plan.target.max_loss is not None:
        assert within_loss is not None
        chosen, said = within_loss(allocator)
    else:
        chosen = allocator.least_loss(limits)
    made = {kind: rxx.summary for kind, rxx in allocator.statistics.items()}
    record = allocator.record(chosen, limits) | said
    write_record(out, record | {"provenance": provenance(__name__, statistics=made)})
    write_record(out.with_suffix(".timing.json"), {"seconds": time.perf_counter() - start})
