"""Stage eval fit: a compressed model's loss on calibration and dev text, beside the predicted one.

Ranks are allocated by a predicted loss, from statistics of the calibration text. On the calibration
itself the prediction should hold; how much more the model loses on a dev text shows how much it is
overfitted. A few blocks are enough, since the same blocks are scored before and after.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.models.arch import is_compressed
from a3.models.checkpoint import Checkpoint
from a3.models.compressed import compressed_record, dense_or_compressed
from a3.models.layerwise import Streamed, fits
from a3.models.load import count_parameters, load_tokenizer, require_positions
from a3.models.tokenizer import require_rows
from a3.solutions.modes import DENSE
from a3.stages.evaluate.evaluated import Evaluated, load
from a3.stages.evaluate.perplexity import (
    block_losses,
    paired_increase,
    require_finite,
    streamed_losses,
)
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents, text_sha256

# Blocks of each text.
BLOCKS = 4


class Few(NamedTuple):
    """A few blocks (N, L) of a text."""

    text: Path
    blocks: Tensor


def fit(
    model_folder: Path,
    small_folder: Path,
    text: Path,
    out: Path,
    *,
    dev_text: Path | None,
    allocation: Path | None,
    blocks: int,
    tokens: int,
    dtype: str,
    device: str,
    stream: bool | None = None,
    **cut: Any,
) -> None:
    """Write `out` (JSON): how much more a compressed model loses than the dense one.

    On as many `blocks` of the calibration `text`, of which `tokens` tokens were used, and of
    `dev_text`; `cut` has block_length, seed and bos of the calibration. `allocation` is the file
    that says the predicted loss. Raises A3Error for another dense model than the compressed one's,
    and as `few_blocks` and `increases` do.
    """
    if not is_compressed(small_folder):
        raise A3Error(
            f"{small_folder}: a dense model. Name the dense folder, then a compressed one."
        )
    subject = Evaluated(small_folder)
    record = compressed_record(small_folder)
    require_base(model_folder, small_folder, record)
    few = {"calibration": few_blocks(model_folder, text, blocks, tokens=tokens, **cut)}
    if dev_text is not None:
        few["dev"] = few_blocks(model_folder, dev_text, blocks, **cut)
    start = time.perf_counter()
    found: dict[str, Any] = {"predicted": predicted_loss(allocation, record), "dev": None}
    found |= increases(model_folder, small_folder, few, dtype, device, stream)
    seconds = time.perf_counter() - start
    said = {"base_sha256": record["base"]["weights_sha256"], "dtype": dtype, "tokens": tokens}
    subject.write(out, __name__, found | said | cut, {"seconds": seconds})


def require_base(model_folder: Path, small_folder: Path, record: Mapping[str, Any]) -> None:
    """Raise A3Error unless a model was made from the one of `model_folder`, by its record."""
    expected, found = record["base"]["weights_sha256"], Checkpoint(model_folder).sha256()
    # If transformers saved the model again, the dense weights are not known.
    if expected not in (None, found):
        raise A3Error(
            f"{model_folder}: weights_sha256 is {found}, but {small_folder} was made from a model "
            f"whose weights_sha256 is {expected}. Name that model's folder."
        )


def few_blocks(
    folder: Path,
    text: Path,
    count: int,
    *,
    block_length: int,
    seed: int,
    bos: bool,
    tokens: int | None = None,
) -> Few:
    """`count` blocks, spread over the first `tokens` tokens of a text; without, its first blocks.

    Blocks are cut as `a3 collect` does; a short text gives fewer. Raises A3Error as `token_blocks`
    does, and for blocks longer than the model has positions.
    """
    require_positions(folder, block_length)
    tokenizer = load_tokenizer(folder)
    tokens = count * block_length if tokens is None else tokens
    blocks = token_blocks(load_documents(text), tokenizer, block_length, tokens, seed, bos)
    require_rows(folder, tokenizer, blocks)
    chosen = torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).long()
    return Few(text, blocks[chosen])


def predicted_loss(allocation: Path | None, record: Mapping[str, Any]) -> float | None:
    """The loss that an allocation predicts for the model of a record (approx.json).

    None if there is no allocation, or if it is not of all components that were compressed. Raises
    A3Error if it is of another model, or of other modes.
    """
    if allocation is None:
        return None
    said = read_record(allocation)
    modes = record.get("modes", {})  # unknown if transformers saved the model again
    compressed = {key: mode for key, mode in modes.items() if mode != DENSE}
    found = {"modes": said["modes"], "weights_sha256": said["weights_sha256"]}
    expected = {
        "modes": {key: compressed.get(key) for key in said["modes"]},
        "weights_sha256": record["base"]["weights_sha256"],
    }
    for key in found:
        if found[key] != expected[key]:
            raise A3Error(
                f"{allocation}: {key} is {found[key]!r}, the compressed model's {expected[key]!r}. "
                "Name the allocation that it was made with."
            )
    return said["predicted_nll"] if said["modes"] == compressed else None


def increases(
    dense: Path,
    small: Path,
    texts: Mapping[str, Few],
    dtype: str,
    device: str,
    stream: bool | None = None,
) -> dict[str, dict[str, Any]]:
    """Mean losses of two models on blocks of each text, and their paired difference.

    In nats a token, with the difference's standard error over blocks. All texts are scored in one
    pass over the weights, one layer at a time with `stream` or if they do not fit in memory. Raises
    A3Error if a loss is not finite.
    """
    every = torch.cat([few.blocks for few in texts.values()])
    sizes = [len(few.blocks) for few in texts.values()]
    before = scores(dense, every, dtype, device, stream).split(sizes)
    after = scores(small, every, dtype, device, stream).split(sizes)
    found = {}
    for (name, few), one, other in zip(texts.items(), before, after, strict=True):
        require_finite(one, dense, few.text)
        require_finite(other, small, few.text)
        increase, error = paired_increase(one, other)
        found[name] = {
            "text_sha256": text_sha256(few.text),
            "blocks": len(one),
            "dense": one.mean().item(),
            "compressed": other.mean().item(),
            "increase": increase,
            "stderr": error,
        }
    return found


def scores(folder: Path, blocks: Tensor, dtype: str, device: str, stream: bool | None) -> Tensor:
    """The mean loss of each block (N, L) by the model of a folder: (N,), float64."""
    if stream is None:
        stream = not fits(count_parameters(folder), dtype)
    if stream:
        streamed = Streamed(folder, dense_or_compressed(folder), dtype, device)
        return streamed_losses(streamed, blocks.to(device))
    return block_losses(load(folder, dtype, device), blocks.to(device))
