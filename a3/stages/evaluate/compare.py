"""a3 compare: a dense model and smaller ones side by side, as a record that a table is made of."""

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from a3.core.errors import A3Error
from a3.core.extras import require_installed
from a3.core.files import read_record
from a3.core.progress import warnings_only
from a3.models.arch import is_compressed, load_arch
from a3.models.compressed import compressed_record, dense_or_compressed, dtype_of, own_sizes
from a3.models.layerwise import Streamed
from a3.models.load import require_positions
from a3.models.tokenizer import require_rows
from a3.rxx.kinds import LOGITS_TOKENS
from a3.stages.evaluate.evaluated import Evaluated, hashes, load
from a3.stages.evaluate.generation import continued, prompt_ids
from a3.stages.evaluate.perplexity import (
    Scored,
    cut_text,
    last_states,
    paired_increase,
    require_finite,
    require_names,
    scores,
)

# What lies between two documents.
JOIN = "empty-line"

# How speed is measured: one sequence, transformers' fused attention.
SPEED: dict[str, Any] = {
    "batch": 1,
    "prompt": 256,
    "new_tokens": 32,
    "repeats": 5,
    "attention": ["sdpa"],
}


def compare(
    folders: Sequence[Path],
    texts: Sequence[Scored],
    prompts: Sequence[str],
    *,
    new_tokens: int,
    speed: bool = False,
    task: str | None = None,
    items: Path | None = None,
    **run: Any,
) -> dict[str, Any]:
    """Sizes, scores on texts and continuations of prompts of models; the first is the reference.

    Each model has, of each text, the scores of `a3 eval ppl`, the paired difference of the losses
    to the reference's with its standard error over blocks, and where both cut the same tokens KL(
    reference ‖ model) in nats a token and the share of tokens with the same likeliest next one.
    With `speed` it has tokens a second of prefill and decoding, as `a3 eval speed` times them, and
    with `task` the score of a task as `a3 eval harness`, of a local one with its `items`.
    `run` has tokens, block_length, bos, dtype and device. Only one layer at a time of a model is in
    memory, until prompts are continued. Raises A3Error for a folder named twice, two texts of one
    name, and as `perplexity` and `generation` do.
    """
    names = names_of(folders)
    require_names(texts)
    subjects = [Evaluated(folder) for folder in folders]
    ids = [[prompt_ids(subject, one, new_tokens) for one in prompts] for subject in subjects]
    found: list[dict[str, Any]] = [
        {"name": name, **size_of(subject.folder), **hashes(subject.checkpoint)}
        for name, subject in zip(names, subjects, strict=True)
    ]
    if texts:
        with tempfile.TemporaryDirectory(prefix="a3-compare-") as work, torch.inference_mode():
            scoring = Scoring(subjects[0], texts, Path(work), **run)
            for model, subject in zip(found, subjects, strict=True):
                model["texts"] = scoring.scores(subject)
                add_increase(model["texts"], found[0]["texts"])
    for model, subject, asked in zip(found, subjects, ids, strict=True):
        if prompts:
            loaded = load(subject.folder, run["dtype"], run["device"])
            made = [continued(loaded, one.to(run["device"]), new_tokens) for one in asked]
            model["continuations"] = [
                subject.tokenizer.decode(one, skip_special_tokens=True) for one in made
            ]
    if speed:
        for model, own in zip(found, speeds(folders, run["dtype"], run["device"]), strict=True):
            model["speed"] = own
    if task is not None:
        for model, folder in zip(found, folders, strict=True):
            model["task"] = score_of(folder, task, items, run["dtype"], run["device"])
    return {"models": found, "prompts": list(prompts), **run}


def names_of(folders: Sequence[Path]) -> list[str]:
    """What the columns call folders: as much of their paths' ends as tells them apart.

    Raises A3Error unless there are two or more, all of them different.
    """
    paths = [folder.resolve() for folder in folders]
    if len(paths) < 2:
        raise A3Error(f"compare: found {len(paths)} model, expected two or more. Name another.")
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise A3Error(f"compare: {twice[0]} is named twice. Name each folder once.")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path.parts[-length:]) for path in paths]


def size_of(folder: Path) -> dict[str, Any]:
    """Parameters, KV-cache bytes and FLOPs a token, bytes of the weights' files."""
    if is_compressed(folder):
        record = compressed_record(folder)
        size, dtype = own_sizes(record)["compressed"], dtype_of(record)
    else:
        arch = load_arch(folder)
        size, dtype = arch.size, arch.dtype
    names = ("parameters", "kv_bytes_per_token", "flops_per_token")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {name: size[name] for name in names} | {"file_bytes": weights, "stored": dtype}


def speeds(folders: Sequence[Path], dtype: str, device: str) -> list[dict[str, Any]]:
    """Of each model tokens a second of prefill and decoding, and the ratio to the first model's."""
    from a3.stages.evaluate.speed import speed
    from a3.stages.evaluate.speed_summary import compared

    with tempfile.TemporaryDirectory(prefix="a3-compare-") as work, warnings_only():
        out = Path(work, "speed.json")
        speed(folders, out, **SPEED, dtype=dtype, device=device)
        return compared(read_record(out))


def score_of(
    folder: Path, task: str, items: Path | None, dtype: str, device: str
) -> dict[str, Any]:
    """What `a3 eval harness` finds for a model."""
    require_installed("lm_eval", "eval")
    from a3.stages.evaluate.harness import harness

    run: dict[str, Any] = {"dtype": dtype, "device": device, "seed": 0}
    asked: dict[str, Any] = dict.fromkeys(("yaml", "metric", "shots", "limit"))
    with tempfile.TemporaryDirectory(prefix="a3-compare-") as work, warnings_only():
        out = Path(work, "task.json")
        harness(folder, task, out, items=items, **asked, **run)
        return read_record(out)


class Scoring:
    """Scores models on texts beside the reference, whose last hidden states are in a file."""

    def __init__(
        self, reference: Evaluated, texts: Sequence[Scored], work: Path, **run: Any
    ) -> None:
        self.texts, self.work, self.run = texts, work, run
        self.reference = reference
        self.blocks = torch.cat([ids for ids, _ in self.cuts(reference)])
        self.model, self.states = self.through(reference, self.blocks)

    def cuts(self, subject: Evaluated) -> list[tuple[Tensor, Tensor]]:
        """Blocks of each text, and their tokens' bytes, by a model's tokenizer."""
        length = self.run["block_length"]
        require_positions(subject.folder, length)
        cutting = (subject.tokenizer, length, self.run["tokens"], self.run["bos"], JOIN)
        cuts = [cut_text(text, None, *cutting) for text in self.texts]
        require_rows(subject.folder, subject.tokenizer, torch.cat([ids for ids, _ in cuts]))
        return cuts

    def through(self, subject: Evaluated, blocks: Tensor) -> tuple[Streamed, Tensor]:
        """A model, and its last layer's outputs (N, L, d) for blocks (N, L)."""
        folder, device = subject.folder, self.run["device"]
        model = Streamed(folder, dense_or_compressed(folder), self.run["dtype"], device)
        # The reference's file stays, those of the others are written over one another.
        out = self.work / ("reference" if subject is self.reference else "other")
        out.unlink(missing_ok=True)
        return model, last_states(model, blocks.to(device), out, folder.name)

    def scores(self, subject: Evaluated) -> list[dict[str, Any]]:
        """Of every text, the scores of a model, and where it cuts the same tokens, of the pair."""
        cuts = self.cuts(subject)
        blocks = torch.cat([ids for ids, _ in cuts])
        same = torch.equal(blocks, self.blocks)
        if subject is self.reference:
            model, states = self.model, self.states
        else:
            model, states = self.through(subject, blocks)
        with model.exit(), self.model.exit() if same and model is not self.model else nullcontext():
            theirs = self.states if same else [None] * len(blocks)
            every = [
                block_scores(model, own, block, self.model, other)
                for own, block, other in zip(states, blocks, theirs, strict=True)
            ]
        losses, divergences, agreed = torch.tensor(every, dtype=torch.float64).T
        found, start = [], 0
        for text, (ids, sizes) in zip(self.texts, cuts, strict=True):
            here = slice(start, start := start + len(ids))
            require_finite(losses[here], subject.folder, text.path)
            pair = {"kl": divergences[here].mean().item(), "same_top": agreed[here].mean().item()}
            found.append(scores(text, ids, sizes, losses[here]) | (pair if same else {}))
        return found


def block_scores(
    model: Streamed, states: Tensor, block: Tensor, reference: Streamed, theirs: Tensor | None
) -> tuple[float, float, float]:
    """Of a block (L,): the loss, KL(reference ‖ model), the share of the same likeliest tokens.

    By the last layers' outputs (L, d), in inference mode and in both models' `exit`; means over all
    tokens but the first. The last two are 0 without `theirs`. The logits of a few tokens are in
    memory at once.
    """
    loss = divergence = agreed = 0.0
    for piece in torch.arange(len(block) - 1).split(LOGITS_TOKENS):
        own = log_probabilities(model, states[piece])
        following = block[piece + 1].to(own.device)
        loss += nn.functional.nll_loss(own, following, reduction="sum").item()
        if theirs is not None:
            other = log_probabilities(reference, theirs[piece])
            divergence += nn.functional.kl_div(own, other, log_target=True, reduction="sum").item()
            agreed += (own.argmax(-1) == other.argmax(-1)).sum().item()
    count = len(block) - 1
    return loss / count, divergence / count, agreed / count


def log_probabilities(model: Streamed, states: Tensor) -> Tensor:
    """Of the next token (L, V), in float32, for the last layer's outputs (L, d)."""
    logits: Tensor = model.leave(states[None].to(model.device)).logits[0]
    return logits.float().log_softmax(-1)


def add_increase(found: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    """Give the scores of each text the increase of the loss over the reference's, in place.

    Nats a token, with the standard error of the paired difference over blocks; only where both
    scored the same tokens.
    """
    for own, base in zip(found, reference, strict=True):
        if own["token_ids_sha256"] == base["token_ids_sha256"]:
            losses = (torch.tensor(one["block_nll"], dtype=torch.float64) for one in (base, own))
            own["increase"], own["increase_stderr"] = paired_increase(*losses)
