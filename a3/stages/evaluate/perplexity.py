"""Stage eval ppl: perplexity of a dense or compressed folder on a text's blocks."""

import hashlib
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.core.mapped import mapped
from a3.core.progress import Bar
from a3.models.compressed import dense_or_compressed
from a3.models.layerwise import Layerwise, Streamed, fits
from a3.models.load import count_parameters, require_positions
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
    stream: bool | None = None,
) -> None:
    """Score `tokens` tokens and write `out` (JSON), with the protocol and every block's loss.

    Documents are joined and cut as `scored_blocks` says, and scored block by block: each token but
    a block's first, given those before it in the block. `source` is the record beside docs.jsonl,
    which says where the text is from. With `stream`, or if the weights do not fit in the available
    memory, only one layer at a time is in memory. Raises A3Error for a text too short, blocks
    longer than the model has positions, and losses that are not finite.
    """
    require_positions(model_folder, block_length)
    subject = Evaluated(model_folder)
    documents, tokenizer = load_documents(text), subject.tokenizer
    blocks, sizes = scored_blocks(documents, tokenizer, block_length, tokens, bos, join)
    require_rows(model_folder, tokenizer, blocks)
    if stream is None:
        stream = not fits(count_parameters(model_folder), dtype)
    score: Callable[[Tensor], Tensor]
    if stream:
        streamed = Streamed(model_folder, dense_or_compressed(model_folder), dtype, device)
        score = partial(streamed_losses, streamed)
    else:
        score = partial(block_losses, load(model_folder, dtype, device))
    start = time.perf_counter()
    losses = score(blocks.to(device))
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
            losses.append(loss_of(model(block[None], use_cache=False), block))
            bar.update(block.numel())
    return torch.stack(losses)


def streamed_losses(model: Layerwise, blocks: Tensor) -> Tensor:
    """As `block_losses`, one layer at a time; hidden states are in a temporary file."""
    layers = range(model.arch.layers)
    total = blocks.numel() * len(layers)
    with (
        tempfile.TemporaryDirectory(prefix="a3-ppl-") as work,
        torch.inference_mode(),
        Bar(total=total, unit="tok·layer", desc="ppl") as bar,
    ):
        shape = (*blocks.shape, model.arch.hidden_size)
        hidden, _ = mapped(Path(work, "hidden"), shape, model.dtype)
        with model.entrance():
            model.record(blocks[0])
            for number, block in enumerate(blocks):
                hidden[number] = model.enter(block)[0]
        for layer in layers:
            with model.layer(layer):
                for number, states in enumerate(hidden):
                    hidden[number] = model.run(layer, states[None].to(blocks.device, copy=True))[0]
                    bar.update(blocks.shape[1])
        losses = []
        with model.exit():
            for states, block in zip(hidden, blocks, strict=True):
                losses.append(loss_of(model.leave(states[None].to(blocks.device)), block))
    return torch.stack(losses)


def loss_of(output: CausalLMOutput, block: Tensor) -> Tensor:
    """The mean loss of a block's tokens (L,) but the first, by a model's output."""
    loss = nn.functional.cross_entropy(output.logits[0, :-1].float(), block[1:])
    return loss.double().cpu()
