"""Stage eval ppl: perplexity of a dense or compressed folder on a text's blocks."""

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.core.progress import Bar
from a3.models.load import require_positions
from a3.models.tokenizer import require_rows
from a3.stages.evaluate.evaluated import Evaluated, load
from a3.texts.blocks import scored_blocks
from a3.texts.reading import load_documents, text_sha256


def perplexity(
    model_folder: Path,
    text: Path,
    out: Path,
    *,
    name: str,
    split: str,
    source: Path | None,
    tokens: int | str,
    block_length: int,
    bos: bool | str,
    join: str,
    dtype: str,
    device: str,
) -> None:
    """Score `tokens` tokens and write `out` (JSON), with the protocol and every block's loss.

    Documents are joined and cut as `scored_blocks` says, and scored block by block: each token but
    a block's first, given those before it in the block. `source` is the record beside docs.jsonl,
    which says where the text is from. Raises A3Error for a text too short, blocks longer than the
    model has positions, and losses that are not finite.
    """
    require_positions(model_folder, block_length)
    subject = Evaluated(model_folder)
    documents, tokenizer = load_documents(text), subject.tokenizer
    blocks, sizes = scored_blocks(documents, tokenizer, block_length, tokens, bos, join)
    require_rows(model_folder, tokenizer, blocks)
    model = load(model_folder, dtype, device)
    start = time.perf_counter()
    losses = block_losses(model, blocks.to(device))
    seconds = time.perf_counter() - start
    require_finite(losses, model_folder, text)
    record = {
        "text": name,
        "split": split,
        "source": None if source is None else read_record(source)["source"],
        "text_sha256": text_sha256(text),
        "join": join,
        "block_length": block_length,
        "stride": block_length,
        "bos": bos,
        "dtype": dtype,
        "token_ids_sha256": hashlib.sha256(blocks.numpy().astype("<i8").tobytes()).hexdigest(),
        **summarise(losses, len(losses) * (block_length - 1), int(sizes[:, 1:].sum())),
    }
    spent = {"seconds": seconds, "tokens_per_second": blocks.numel() / seconds}
    subject.write(out, __name__, record, spent)


def summarise(losses: Tensor, tokens: int, size: int) -> dict[str, Any]:
    """The scores of blocks from their losses (N,), in nats a token: of `tokens`, in `size` bytes.

    `perplexity` = exp(mean loss); its standard error is the blocks' by the delta method.
    `bits_per_byte` is the same loss in bits, over the UTF-8 bytes of the scored tokens' text.
    """
    mean = losses.mean().item()
    error = losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    return {
        "blocks": len(losses),
        "tokens_scored": tokens,
        "bytes_scored": size,
        "bits_per_byte": mean * tokens / math.log(2) / size,
        "nll": mean,
        "perplexity": math.exp(mean),
        "perplexity_stderr": math.exp(mean) * error,
        "block_nll": losses.tolist(),
    }


def require_finite(losses: Tensor, folder: Path, text: Path) -> None:
    """Raise A3Error if a model's loss on a block of text is not finite."""
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        block = int(bad[0].item())
        raise A3Error(
            f"{folder}: the loss of block {block} on {text} is {losses[block].item()}; expected a "
            "finite number. Try --dtype float32, or build the checkpoint again."
        )


def block_losses(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Mean loss of each block in nats a scored token: blocks (N, L) to (N,) float64 on the CPU."""
    losses = []
    with torch.inference_mode(), Bar(total=blocks.numel(), unit="tok", desc="ppl") as bar:
        for block in blocks:
            logits = model(block[None], use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, block[1:]).double().cpu())
            bar.update(block.numel())
    return torch.stack(losses)
