"""Keeps what a target asks of a compressed model: a loss that is measured, sizes that are checked.

A predicted loss is of second order and of the calibration itself. So the loss that a user allows is
measured, on blocks of the calibration's text that the calibration did not use, and ranks are
allocated again until it is kept.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from a3.core.dtypes import WIDTHS
from a3.core.errors import A3Error
from a3.core.extras import require_installed
from a3.core.files import read_record, write_record
from a3.core.progress import LOG
from a3.models.arch import load_arch
from a3.models.load import load_tokenizer
from a3.models.shape import Arch
from a3.runnable import check_runtime
from a3.solutions.modes import eliminating
from a3.solutions.plan import Plan
from a3.solutions.target import TRIAL_BLOCKS, TRIALS, Target, target_of
from a3.stages.approx.allocate import Found, allocate
from a3.stages.approx.allocator import Allocator
from a3.stages.approx.approximate import approximate
from a3.stages.approx.limits import (
    BYTES,
    CACHED,
    FLOPS,
    PARAMETERS,
    asked,
    dense_amounts,
    folder_bytes,
    require_within_reach,
    words,
)
from a3.stages.approx.losses import losses as write_losses
from a3.stages.evaluate.fit import scores
from a3.stages.evaluate.perplexity import paired_increase, require_finite
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents, text_sha256

# So many blocks are left out after those of the calibration, since a document may be in both.
BETWEEN = 1

# A standard error needs several blocks.
FEWEST = 4

# The share of the allowed loss that is near enough.
NEAR = 0.94

# Where in between the next loss is aimed at.
AIM = 0.975


def file_bytes_of(plan: Plan, model_folder: Path) -> int | None:
    """Bytes of the dense model's GGUF file where the target is one; A3Error as export refuses."""
    target = plan.target
    if target is None or target.gguf is None:
        return None
    if not plan.one_size and {"qk", "ov"} & set(plan.shared):
        raise A3Error(
            f"{target}: {plan.said()} gives each layer heads of its own size, and llama.cpp wants "
            "one. Take --preset a3-stock."
        )
    require_installed("gguf", "export")
    from a3.stages.export.gguf import gguf_bytes

    return gguf_bytes(model_folder, target.gguf)


def check_target(plan: Plan, model_folder: Path) -> None:
    """Raise A3Error now, before anything long, for a model that the plan's runtime cannot run, and
    a target that cannot be met.
    """
    check_runtime(plan, model_folder)
    if plan.target is not None:
        arch = plan.written(load_arch(model_folder))
        file_bytes = file_bytes_of(plan, model_folder)
        if file_bytes is None:
            file_bytes = folder_bytes(model_folder, arch, plan.stored)
        require_within_reach(arch, plan, plan.target, file_bytes)


def held_out(folder: Path, text: Path, used: Mapping[str, Any]) -> Tensor:
    """Blocks (N, L) of a text after those that a calibration `used`; A3Error if there are none.

    `used` has its tokens, block_length, seed and bos.
    """
    length = used["block_length"]
    first = -(-used["tokens"] // length) + BETWEEN
    cut = (length, (first + TRIAL_BLOCKS) * length, used["seed"], used["bos"])
    blocks = token_blocks(load_documents(text), load_tokenizer(folder), *cut)[first:]
    if len(blocks) < FEWEST:
        raise A3Error(
            f"{text}: the calibration uses {used['tokens']} tokens and leaves {len(blocks)} blocks "
            f"of {length}; a loss is measured on {FEWEST} or more. Give more text, or fewer "
            "--tokens."
        )
    return blocks


@dataclass(frozen=True)
class Trials:
    """Measures the loss over the dense model's at any ranks, on text held out of the calibration.

    `text` is the calibration's, `losses` are the files that stage losses wrote; models are made in
    a temporary folder in `scratch`.
    """

    model_folder: Path
    rxx_folder: Path
    text: Path
    allocator: Allocator
    losses: list[Path]
    device: str
    scratch: Path

    @cached_property
    def calibration(self) -> dict[str, Any]:
        """What the statistics say of their text; gradients are of some of the blocks only."""
        summaries = (rxx.summary for rxx in self.allocator.statistics.values())
        return dict(max(summaries, key=lambda one: one["tokens"]))

    @cached_property
    def blocks(self) -> Tensor:
        """What is scored: (N, L)."""
        if self.calibration["text_sha256"] != text_sha256(self.text):
            raise A3Error(
                f"{self.text}: not the text of the statistics in {self.rxx_folder}, of which the "
                "unused part is scored. Name the file that a3 collect read."
            )
        return held_out(self.model_folder, self.text, self.calibration)

    @cached_property
    def dense(self) -> Tensor:
        """The dense model's loss on each block: (N,)."""
        return self.scores(self.model_folder)

    def scores(self, folder: Path) -> Tensor:
        """The loss on each block of the model in a folder."""
        found = scores(folder, self.blocks, self.calibration["dtype"], self.device, stream=None)
        require_finite(found, folder, self.text)
        return found

    def loss(self, chosen: list[int]) -> dict[str, Any]:
        """What a model loses at these ranks of the allocator's curves: nats a token, and the paired
        standard error over blocks.
        """
        with tempfile.TemporaryDirectory(prefix="trial.", dir=self.scratch) as name:
            allocation, small = Path(name, "allocation.json"), Path(name, "small")
            write_record(allocation, self.allocator.record(chosen, {}))
            solving: dict[str, Any] = {"losses": self.losses, "device": self.device}
            plan = self.allocator.plan
            approximate(self.model_folder, self.rxx_folder, plan, small, allocation, **solving)
            increase, error = paired_increase(self.dense, self.scores(small))
        predicted = self.allocator.predicted(chosen)
        return {"predicted": predicted, "increase": increase, "stderr": error} | {
            "blocks": len(self.blocks)
        }


@contextmanager
def known_losses(
    model_folder: Path,
    rxx_folder: Path,
    plan: Plan,
    losses: list[Path],
    device: str,
    scratch: Path,
) -> Iterator[list[Path]]:
    """Files of the losses by rank, so that no trial computes them again: those given, or new ones
    in a temporary folder in `scratch`, which is made if it is missing.
    """
    modes = eliminating({component: choice.name for component, choice in plan.choices.items()})
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="trial.", dir=scratch) as name:
        if not losses and modes:
            losses = [Path(name, "losses.safetensors")]
            write_losses(model_folder, rxx_folder, modes, losses[0], device=device)
        yield losses


def allocate_within(
    model_folder: Path,
    rxx_folder: Path,
    plan: Plan,
    text: Path | None,
    out: Path,
    *,
    losses: list[Path],
    device: str,
    uniform: tuple[str, ...] = (),
) -> None:
    """Allocate ranks (a3.stages.approx.allocate), by the loss measured on `text` where the plan's
    target has a largest one, and by the size of a GGUF file where it has one.

    Raises A3Error for a target that cannot be met, and where a loss is to be kept without a text.
    """
    check_target(plan, model_folder)
    options: dict[str, Any] = {"uniform": uniform, "device": device}
    options["file_bytes"] = file_bytes_of(plan, model_folder)
    if plan.target is None or plan.target.max_loss is None:
        allocate(model_folder, rxx_folder, plan, out, losses=losses, **options)
        return
    if text is None:
        raise A3Error(
            f"allocate: {plan.target}: a loss is measured on text. Name the calibration's with "
            "--text, or take a3 compress."
        )
    scratch = out.absolute().parent
    with known_losses(model_folder, rxx_folder, plan, losses, device, scratch) as known:

        def within_loss(allocator: Allocator) -> Found:
            trials = Trials(model_folder, rxx_folder, text, allocator, known, device, scratch)
            return keep_loss(trials)

        allocate(
            model_folder, rxx_folder, plan, out, losses=known, within_loss=within_loss, **options
        )


def upper(tried: Mapping[str, Any]) -> float:
    """The measured loss and one standard error, which is what has to be kept."""
    return tried["increase"] + (tried["stderr"] or 0.0)


def keep_loss(trials: Trials) -> Found:
    """The smallest ranks whose measured loss is kept within the target's, and what was measured.

    Ranks are allocated for a predicted loss, which is corrected by what is measured. Raises A3Error
    if the loss is not kept by any.
    """
    allocator = trials.allocator
    most = float(str(allocator.plan.target and allocator.plan.target.max_loss))
    tries: list[dict[str, Any]] = []
    kept: dict[float, list[int]] = {}
    bound, seen = most, []
    while len(tries) < TRIALS and (chosen := allocator.within_loss(bound)) not in seen:
        seen.append(chosen)
        tries.append(tried := trials.loss(chosen))
        LOG.info(
            f"allocate: predicted {tried['predicted']:.4f}, measured {tried['increase']:.4f} ± "
            f"{tried['stderr'] or 0:.4f} nats a token on {tried['blocks']} held-out blocks"
        )
        if upper(tried) <= most:
            kept[tried["predicted"]] = chosen
            if upper(tried) >= NEAR * most:
                break
        bound = next_bound(tries, most)
    if not kept or kept[max(kept)] == allocator.whole():
        least = min((one for one in tries if one["predicted"] > 0), key=upper)
        raise A3Error(
            f"{allocator.plan.target}: not kept: predicted {least['predicted']:.4f}, but measured "
            f"{least['increase']:.4f} ± {least['stderr'] or 0:.4f} nats a token on held-out text. "
            "Allow more, ask for less besides, or calibrate on more tokens."
        )
    best = max(kept)
    measured = next(tried for tried in tries if tried["predicted"] == best)
    return kept[best], {"held_out": measured, "tries": tries}


def next_bound(tries: list[dict[str, Any]], most: float) -> float:
    """The predicted loss at which the measured one should come near the allowed one.

    The measured loss is taken as a power of the predicted one, through the last two tries; of one
    try, as a multiple.
    """
    last, before = tries[-1], tries[-2:][0]
    if last["predicted"] <= 0:
        return most
    if upper(last) <= 0:
        return 2 * last["predicted"]
    power = 1.0
    if upper(before) > 0 and before["predicted"] > 0 and before["predicted"] != last["predicted"]:
        rise = math.log(upper(last) / upper(before))
        power = rise / math.log(last["predicted"] / before["predicted"])
    power = min(max(power, 0.5), 2.5)
    return last["predicted"] * (AIM * most / upper(last)) ** (1 / power)


def measured_amounts(target: Target, arch: Arch, small: Path) -> dict[str, float]:
    """What a compressed folder has of each quantity, counted in what was written.

    `arch` is the dense model's.
    """
    size = read_record(small / "approx.json")["size"]
    width = WIDTHS[arch.dtype]
    found = {
        PARAMETERS: size["compressed"]["parameters"],
        CACHED: size["compressed"]["kv_bytes_per_token"] // width,
        FLOPS: size["compressed"]["flops_per_token"],
        BYTES: sum(path.stat().st_size for path in small.glob("*.safetensors")),
    }
    if target.gguf is not None:
        require_installed("gguf", "export")
        from a3.stages.export.gguf import export_gguf

        with tempfile.TemporaryDirectory(prefix="trial.", dir=small.parent) as name:
            export_gguf(small, Path(name, "small.gguf"), target.gguf)
            found[BYTES] = Path(name, "small.gguf").stat().st_size
    return found


def check_kept(model_folder: Path, small: Path) -> list[str]:
    """What was asked of a compressed folder and what it has, in words; A3Error if it is more."""
    target = target_of(read_record(small / "approx.json")["modes"].values())
    if target is None:
        return []
    arch = load_arch(model_folder)
    dense = dense_amounts(arch, None)
    found, said = measured_amounts(target, arch, small), []
    for key, limit in asked(target, dense).items():
        if found[key] > limit:
            raise A3Error(
                f"{target}: {words(key, limit, dense)} asked, and the model has "
                f"{words(key, found[key], dense)}. This is a fault of a3; please report it."
            )
        said.append(f"{words(key, limit, dense)} asked, {words(key, found[key], dense)} written")
    return said
