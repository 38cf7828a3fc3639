"""a3 frontier: what a model loses at every size, predicted from one set of statistics.

For each ratio the ranks that lose least are allocated, and their predicted losses added up. A
prediction is of second order and of the calibration itself, so at three ratios the loss is measured
on text that the calibration left, and all others are corrected by these: measured over predicted
loss is interpolated between them, both as logarithms.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from a3.core.errors import A3Error
from a3.core.files import write_record
from a3.core.progress import Bar
from a3.core.provenance import provenance
from a3.promise import Trials, known_losses
from a3.solutions.modes import DENSE, SHARED
from a3.solutions.plan import Plan
from a3.stages.approx.allocator import Allocator
from a3.stages.approx.budget import at
from a3.stages.approx.limits import BYTES, CACHED, FLOPS, PARAMETERS

# The ratios of a frontier, and those at which the loss is measured.
RATIOS = tuple(number / 40 for number in range(25))

MEASURED = (0.1, 0.3, 0.5)

# What a table shows as a share of the dense model's.
SHARES = (CACHED, FLOPS)


def frontier(
    model_folder: Path,
    rxx_folder: Path,
    plan: Plan,
    text: Path,
    out: Path,
    *,
    losses: list[Path],
    device: str = "cpu",
    check: Sequence[float] = (),
) -> None:
    """Write `out` (JSON): sizes, ranks and losses of a model at each ratio that it can have.

    `plan` has the modes, all of them marked ~; `text` is the calibration's, whose unused blocks are
    scored, and `losses` are the files of stage losses. At the ratios of `check` the loss is
    measured too, beside the corrected one, which does not know of it. Raises A3Error as `allocate`
    does, and for a text of which nothing is left.
    """
    start = time.perf_counter()
    if others := [str(choice) for choice in plan.choices.values() if not choice.shared]:
        raise A3Error(
            f"frontier: {', '.join(others)}: ranks of all components are allocated. Take modes "
            f"marked {SHARED}, or {DENSE}."
        )
    scratch = out.absolute().parent
    with known_losses(model_folder, rxx_folder, plan, losses, device, scratch) as known:
        allocator = Allocator(model_folder, rxx_folder, plan, losses=known, device=device)
        trials = Trials(model_folder, rxx_folder, text, allocator, known, device, scratch)
        record = frontier_of(trials, check)
    said = {"weights_sha256": allocator.arch.weights_sha256}
    made = {kind: rxx.summary for kind, rxx in allocator.statistics.items()}
    write_record(out, record | said | {"provenance": provenance(__name__, statistics=made)})
    write_record(out.with_suffix(".timing.json"), {"seconds": time.perf_counter() - start})


def frontier_of(trials: Trials, check: Sequence[float]) -> dict[str, Any]:
    """Every ratio's sizes and losses, and what was measured."""
    allocator = trials.allocator
    most = allocator.largest_ratio
    if unreached := [ratio for ratio in check if not 0 < ratio <= most]:
        raise A3Error(
            f"frontier: cannot check ratio {unreached[0]}: expected one above 0 and up to "
            f"{most:.3f}, since no layer gets less than an eighth of a size."
        )
    text_blocks = len(trials.blocks)  # so that a text too short is said before the long part
    ratios = sorted({*(ratio for ratio in RATIOS if ratio <= most), *check})
    points = [point_of(allocator, ratio) for ratio in Bar(ratios, unit="ratio", desc="frontier")]
    measured = measure(trials, [ratio for ratio in MEASURED if ratio <= most])
    correct(points, measured)
    return {
        "modes": {one: choice.name for one, choice in allocator.plan.shared.items()},
        "dense": {"amounts": allocator.dense, "ranks": full_ranks(allocator)},
        "points": points,
        "measured": measured,
        "checks": checks(points, measure(trials, check)),
        "blocks": text_blocks,
    }


def point_of(allocator: Allocator, ratio: float) -> dict[str, Any]:
    """Sizes, ranks and predicted losses at one ratio.

    `parts` has the losses by component and layer; of ranks that all layers share, each layer has
    the same part of it. Of a mixture's experts, ranks are means and losses sums.
    """
    chosen = allocator.least_loss(allocator.at_ratio(ratio))
    ranks = allocator.ranks(chosen)
    return {
        "ratio": ratio,
        "amounts": allocator.amounts(chosen),
        "predicted": allocator.predicted(chosen),
        "ranks": {
            component: [mean(one) if isinstance(one, list) else one for one in own]
            for component, own in ranks.items()
        },
        "parts": parts_of(allocator, ranks),
    }


def parts_of(allocator: Allocator, ranks: dict[str, Any]) -> dict[str, list[float]]:
    """The predicted loss of each component by layer, at these ranks."""
    parts = {component: [0.0] * allocator.arch.layers for component in ranks}
    for curve in allocator.curves:
        (component,) = curve.components
        layer, expert = curve.places[0]
        found = ranks[component][layer]
        loss = at(curve, found if expert is None else found[expert])
        for place, _ in curve.places:
            parts[component][place] += loss / len(curve.places)
    return parts


def full_ranks(allocator: Allocator) -> dict[str, int]:
    """The full rank of each component."""
    return {component: allocator.arch.full_rank(component) for component in allocator.even}


def measure(trials: Trials, ratios: Sequence[float]) -> list[dict[str, Any]]:
    """The measured loss at some ratios."""
    allocator = trials.allocator
    return [
        {"ratio": ratio} | trials.loss(allocator.least_loss(allocator.at_ratio(ratio)))
        for ratio in ratios
    ]


def correct(points: list[dict[str, Any]], measured: list[dict[str, Any]]) -> None:
    """Add the corrected loss to each point: the predicted one times what was measured over it.

    The factor is interpolated, as a logarithm, over the logarithm of the predicted loss; outside of
    the measured losses it is that of the nearest.
    """
    known = sorted(
        (math.log(one["predicted"]), math.log(one["increase"] / one["predicted"]))
        for one in measured
        if one["predicted"] > 0 and one["increase"] > 0
    )
    for point in points:
        predicted = point["predicted"]
        factor = 1.0
        if known and predicted > 0:
            factor = math.exp(np.interp(math.log(predicted), *zip(*known, strict=True)))
        point["corrected"] = predicted * factor


def checks(points: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured at ratios beside those of the correction, and the corrected loss there."""
    corrected = {point["ratio"]: point["corrected"] for point in points}
    return [one | {"corrected": corrected[one["ratio"]]} for one in found]


def table(record: dict[str, Any]) -> str:
    """A frontier as a readable table; measured losses stand beside the corrected ones."""
    dense = record["dense"]["amounts"]
    known = {one["ratio"]: one for one in (*record["measured"], *record["checks"])}
    rows = [["ratio", "parameters", "KV cache", "FLOPs", "file", "loss", "perplexity", "measured"]]
    for point in record["points"]:
        ratio, amounts = point["ratio"], point["amounts"]
        if ratio not in known and round(ratio * 40) % 4:
            continue
        tried = known.get(ratio)
        kept = [f"{amounts[key] / dense[key]:.1%}" if dense[key] else "–" for key in SHARES]
        rows.append(
            [
                f"{ratio:g}",
                f"{amounts[PARAMETERS] / 1e6:.1f} M",
                *kept,
                f"{amounts[BYTES] / 1e6:.0f} MB",
                f"{point['corrected']:.3f}",
                f"× {math.exp(point['corrected']):.2f}",
                "" if tried is None else f"{tried['increase']:.3f} ± {tried['stderr'] or 0:.3f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
