"""Stage eval ppl: perplexity of a dense or compressed folder on blocks of one or several texts."""

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
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
from a3.texts.blocks import permuted, scored_blocks
from a3.texts.reading import load_documents, text_sha256


@dataclass(frozen=True)
class Scored:
    """A text to score: what the result calls it, its documents, and where they are from.

    `source` is the record beside docs.jsonl, which says so; None if there is none.
    """

    name: str
    path: Path
    source: Path | None = None


def perplexity(
    model_folder: Path,
    texts: Sequence[Scored],
    out: Path,
    *,
    split: str,
    tokens: int | str,
    block_length: int,
    bos: bool | str,
    join: str,
    dtype: str,
    device: str,
    seed: int | None = None,
    stream: bool | None = None,
) -> None:
    """Score `tokens` tokens of each text in one pass, and write `out` (JSON).

    Documents, in an order drawn by `seed` if there is one, are joined and cut as `scored_blocks`
    says, and scored block by block: each token but a block's first, given those before it in the
    block. The result has the protocol and every block's loss, of several texts as `summarise_set`
    says. With `stream`, or if the weights do not fit in the available memory, only one layer at a
    time is in memory. Raises A3Error for two texts of one name, a text too short, blocks longer
    than the model has positions, and losses that are not finite.
    """
    require_positions(model_folder, block_length)
    require_names(texts)
    subject = Evaluated(model_folder)
    cutting = (subject.tokenizer, block_length, tokens, bos, join)
    cuts = [cut_text(text, seed, *cutting) for text in texts]
    blocks = torch.cat([ids for ids, _ in cuts])
    require_rows(model_folder, subject.tokenizer, blocks)
    if stream is None:
        stream = not fits(count_parameters(model_folder), dtype)
    score: Callable[[Tensor], Tensor]
    if stream:
        streamed = Streamed(model_folder, dense_or_compressed(model_folder), dtype, device)
        score = partial(streamed_losses, streamed)
    else:
        score = partial(block_losses, load(model_folder, dtype, device))
    start = time.perf_counter()
    losses = score(blocks.to(device)).split([len(ids) for ids, _ in cuts])
    seconds = time.perf_counter() - start
    drawn = {} if seed is None else {"seed": seed}
    protocol = {"split": split, "join": join, "bos": bos, "dtype": dtype} | drawn
    records = []
    for text, (ids, sizes), own in zip(texts, cuts, losses, strict=True):
        require_finite(own, model_folder, text.path)
        records.append(protocol | scores(text, ids, sizes, own))
    spent = {"seconds": seconds, "tokens_per_second": blocks.numel() / seconds}
    found = records[0] if len(records) == 1 else summarise_set(records)
    subject.write(out, __name__, found, spent)


def require_names(texts: Sequence[Scored]) -> None:
    """Raise A3Error if two texts of a result have one name."""
    names = [text.name for text in texts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise A3Error(
            f"{', '.join(str(text.path) for text in texts)}: {twice[0]} names two of these texts. "
            "Give each a name of its own (--name)."
        )


def cut_text(
    text: Scored,
    seed: int | None,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    tokens: int | str,
    bos: bool | str,
    join: str,
) -> tuple[Tensor, Tensor]:
    """The token blocks of a text and their sizes, as `scored_blocks`; its error names the text."""
    documents = load_documents(text.path)
    if seed is not None:
        documents = permuted(documents, seed)
    try:
        return scored_blocks(documents, tokenizer, block_length, tokens, bos, join)
    except A3Error as error:
        raise A3Error(f"{text.path}: {error}") from error


def summarise_set(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The scores of several texts: their records, the mean over texts, and the worst text.

    Texts count equally: `nll` is the mean of their mean losses in nats a token, `perplexity` = exp
    of it, and its standard error that of the blocks within the texts, by the delta method.
    """
    mean = fmean(record["nll"] for record in records)
    # Of the mean loss; that of each text's loss is perplexity_stderr / perplexity.
    errors = [record["perplexity_stderr"] / record["perplexity"] for record in records]
    worst = max(records, key=lambda record: record["nll"])
    return {
        "texts": records,
        "nll": mean,
        "perplexity": math.exp(mean),
        "perplexity_stderr": math.exp(mean) * math.hypot(*errors) / len(errors),
        "worst": {key: worst[key] for key in ("text", "nll", "perplexity")},
    }


def scores(text: Scored, blocks: Tensor, sizes: Tensor, losses: Tensor) -> dict[str, Any]:
    """What was scored of a text, its blocks (N, L) and their tokens' bytes, and the scores."""
    count, length = blocks.shape
    return {
        "text": text.name,
        "source": None if text.source is None else read_record(text.source)["source"],
        "text_sha256": text_sha256(text.path),
        "block_length": length,
        "stride": length,
        "token_ids_sha256": hashlib.sha256(blocks.numpy().astype("<i8").tobytes()).hexdigest(),
        **summarise(losses, count * (length - 1), int(sizes[:, 1:].sum())),
    }


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


def paired_increase(before: Tensor, after: Tensor) -> tuple[float, float | None]:
    """The mean increase of blocks' losses (N,), and its standard error; None for a single block."""
    more = after - before
    error = more.std().item() / len(more) ** 0.5 if len(more) > 1 else None
    return more.mean().item(), error


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
    with tempfile.TemporaryDirectory(prefix="a3-ppl-") as work, torch.inference_mode():
        hidden = last_states(model, blocks, Path(work, "hidden"), "ppl")
        losses = []
        with model.exit():
            for states, block in zip(hidden, blocks, strict=True):
                losses.append(loss_of(model.leave(states[None].to(blocks.device)), block))
    return torch.stack(losses)


def last_states(model: Layerwise, blocks: Tensor, out: Path, what: str) -> Tensor:
    """The last layer's outputs (N, L, d) for blocks (N, L), one layer at a time, in a new file.

    `what` is the progress bar's word.
    """
    layers = range(model.arch.layers)
    shape = (*blocks.shape, model.arch.hidden_size)
    hidden, _ = mapped(out, shape, model.dtype)
    with Bar(total=blocks.numel() * len(layers), unit="tok·layer", desc=what) as bar:
        with model.entrance():
            model.record(blocks[0])
            for number, block in enumerate(blocks):
                hidden[number] = model.enter(block)[0]
        for layer in layers:
            with model.layer(layer):
                for number, states in enumerate(hidden):
                    hidden[number] = model.run(layer, states[None].to(blocks.device, copy=True))[0]
                    bar.update(blocks.shape[1])
    return hidden


def loss_of(output: CausalLMOutput, block: Tensor) -> Tensor:
    """The mean loss of a block's tokens (L,) but the first, by a model's output."""
    loss = nn.functional.cross_entropy(output.logits[0, :-1].float(), block[1:])
    return loss.double().cpu()
