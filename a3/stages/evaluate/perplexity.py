"""Stage eval ppl: perplexity of a dense or compressed folder on a text's blocks."""

import hashlib
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import a3.models.quantised  # noqa: F401
from a3.core.errors import A3Error
from a3.core.files import read_record, sha256, write_record
from a3.core.progress import Bar
from a3.core.provenance import provenance
from a3.models.checkpoint import Checkpoint, model_source
from a3.models.load import load_model, load_tokenizer, require_positions
from a3.models.tokenizer import require_rows
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
    a block's first, given those before it in the block. `perplexity` = exp(mean loss in nats a
    token); its standard error is the blocks' by the delta method. `bits_per_byte` is the same loss
    in bits, over the UTF-8 bytes of the scored tokens' text. `source` is the record beside
    docs.jsonl, which says where the text is from. Raises A3Error for a text too short, blocks
    longer than the model has positions, and losses that are not finite.
    """
    require_positions(model_folder, block_length)
    checkpoint = Checkpoint(model_folder)
    tokenizer = load_tokenizer(model_folder)
    blocks, sizes = scored_blocks(load_documents(text), tokenizer, block_length, tokens, bos, join)
    require_rows(model_folder, tokenizer, blocks)
    bytes_scored = int(sizes[:, 1:].sum())
    model = load_model(model_folder, dtype).to(device)
    start = time.perf_counter()
    losses = block_losses(model, blocks.to(device))
    seconds = time.perf_counter() - start
    if not torch.isfinite(losses).all():
        bad = (~torch.isfinite(losses)).nonzero()[0].item()
        raise A3Error(
            f"{model_folder}: the loss of block {bad} on {text} is {losses[bad].item()}; expected "
            "a finite number. Try --dtype float32, or build the checkpoint again."
        )
    mean = losses.mean().item()
    error = losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    tokens_scored = len(losses) * (block_length - 1)
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
        "blocks": len(losses),
        "tokens_scored": tokens_scored,
        "token_ids_sha256": hashlib.sha256(blocks.numpy().astype("<i8").tobytes()).hexdigest(),
        "bytes_scored": bytes_scored,
        "bits_per_byte": mean * tokens_scored / math.log(2) / bytes_scored,
        "nll": mean,
        "perplexity": math.exp(mean),
        "perplexity_stderr": math.exp(mean) * error,
        "block_nll": losses.tolist(),
        "checkpoint_sha256": checkpoint.sha256(),
        "config_sha256": sha256(model_folder / "config.json"),
        "provenance": provenance(__name__, model=model_source(model_folder)),
    }
    write_record(out, record)
    speed = {"seconds": seconds, "tokens_per_second": blocks.numel() / seconds}
    write_record(out.with_suffix(".timing.json"), speed)


def block_losses(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Mean loss of each block in nats a scored token: blocks (N, L) to (N,) float64 on the CPU."""
    losses = []
    with torch.inference_mode(), Bar(total=blocks.numel(), unit="tok", desc="ppl") as bar:
        for block in blocks:
            logits = model(block[None], use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, block[1:]).double().cpu())
            bar.update(block.numel())
    return torch.stack(losses)
