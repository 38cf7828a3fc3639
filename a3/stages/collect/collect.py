"""Stage collect: model and text to Rxx files, in one pass over the calibration blocks."""

import math
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from torch import Tensor

from a3.core.errors import A3Error
from a3.core.files import SEAL, read_record, sha256, write_record
from a3.core.progress import LOG
from a3.core.provenance import provenance
from a3.core.shards import share
from a3.models.arch import Arch, CompressedArch, is_compressed, load_arch, modules_of
from a3.models.checkpoint import check_small, model_source
from a3.models.compressed import compressed_arch
from a3.models.load import load_model, load_tokenizer, require_positions
from a3.models.tokenizer import require_rows
from a3.rxx.container import Accumulator
from a3.rxx.kinds import GRADIENT_BLOCKS, GRADIENT_FORMS, KINDS, SAMPLED_FORMS
from a3.stages.collect.fisher import run_backward
from a3.stages.collect.gradients import run_gradients
from a3.stages.collect.hooks import SITES, attach_all, run
from a3.stages.collect.stream import fits, run_streamed
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents, text_sha256

# An h × h block has rank h from h tokens on. Of N it is known, in its worst direction, to about
# 2 sqrt(h / N): to a half or so with ten tokens a dimension.
TOKENS_A_DIMENSION = 10

# And a mean square to about sqrt(2 / N): to 9 %, as with fewer tokens experts are not compressed.
TOKENS_A_DIAGONAL = 256


def collect(
    model_folder: Path,
    text: Path,
    outputs: dict[str, Path],
    *,
    tokens: int,
    block_length: int,
    seed: int,
    bos: bool,
    dtype: str,
    device: str,
    shard: str | None = None,
    stream: bool | None = None,
) -> None:
    """Sum the statistics of each kind in `outputs` over `tokens` calibration tokens.

    Blocks of `block_length` tokens without padding, BOS first where `bos`, each run alone, as at
    evaluation; gradients by activations are taken of one block in GRADIENT_BLOCKS, since they cost
    three times as much and need be known less well. Of `shard` "0of4" only the first of four runs
    of blocks. With `stream`, and where the weights do not fit the memory at hand, one layer at a
    time is in memory. Writes one safetensors file a kind, and its seconds in `<kind>.timing.json`.
    Raises A3Error for an unknown kind, a text too short for one block a shard, blocks longer than
    the model has positions, or sums that are not finite.
    """
    for kind in outputs:
        if kind not in KINDS:
            raise A3Error(f"statistic {kind!r} is not known. Kinds: {', '.join(KINDS)}.")
    compressed = is_compressed(model_folder)
    arch = compressed_arch(model_folder) if compressed else load_arch(model_folder)
    require_kinds(arch, outputs)
    check_small(model_folder)
    require_positions(model_folder, block_length)
    tokenizer = load_tokenizer(model_folder)
    blocks = token_blocks(
        load_documents(text),
        tokenizer,
        block_length=block_length,
        tokens=tokens,
        seed=seed,
        bos=bos,
    )
    require_rows(model_folder, tokenizer, blocks)
    warn_if_short(arch, outputs, blocks.numel())
    run_of = range(len(blocks)) if shard is None else share(len(blocks), shard, "blocks")
    blocks = blocks[run_of.start : run_of.stop]
    streamed = not (compressed or fits(arch, dtype)) if stream is None else stream
    announce(arch, outputs, blocks, streamed)
    accumulators = {kind: Accumulator(kind, arch.heads_of(KINDS[kind].site)) for kind in outputs}
    forms = {kind: KINDS[kind].form for kind in outputs}
    hooked, fisher, gradients = (
        {kind: one for kind, one in accumulators.items() if wanted(forms[kind])}
        for wanted in (
            lambda form: form not in GRADIENT_FORMS,
            lambda form: form == "fisher",
            lambda form: form in SAMPLED_FORMS,
        )
    )
    # Of all shards together, the same ones.
    few = blocks[-run_of.start % GRADIENT_BLOCKS :: GRADIENT_BLOCKS]
    if gradients and not len(few):
        raise A3Error(
            f"shard {shard}: gradients use one block in {GRADIENT_BLOCKS}, and none "
            f"of its {len(blocks)} blocks is one of them. Collect in fewer shards."
        )
    start = time.perf_counter()
    if streamed:
        if compressed:
            raise A3Error(
                f"{model_folder}: a compressed model is not read layer by layer yet. "
                "Remove --stream."
            )
        if fisher | gradients:
            raise A3Error(
                f"{', '.join(fisher | gradients)}: gradients need the whole model in memory, and "
                "its weights do not fit. Take another mode, or a machine with more memory."
            )
        attach = partial(attach_all, arch, hooked)
        run_streamed(model_folder, arch, attach, blocks.to(device), dtype)
    else:
        model = load_model(model_folder, dtype).to(device)
        if hooked:
            run(model.base_model, arch, hooked, blocks.to(device))
        if fisher:
            run_backward(model, arch, fisher, blocks.to(device))
        if gradients:
            run_gradients(model, arch, gradients, few.to(device))
    seconds = time.perf_counter() - start
    record = provenance(
        __name__,
        *modules_of(model_folder),
        weights_sha256=arch.weights_sha256,
        config_sha256=sha256(model_folder / "config.json"),
        model=model_source(model_folder),
        text=text_source(text),
        text_sha256=text_sha256(text),
        block_length=block_length,
        seed=seed,
        bos=bos,
        dtype=dtype,
        **({} if shard is None else {"shard": shard}),
    )
    for kind, path in outputs.items():
        seen = (few if kind in gradients else blocks).numel()
        accumulators[kind].save(path, record | {"tokens": seen})
        timing = {"seconds": seconds, "tokens_per_second": blocks.numel() / seconds}
        write_record(path.with_suffix(".timing.json"), timing)


def text_source(text: Path) -> str:
    """Where a text is from as the record beside it says; its file's name where there is none.

    A file of that name without a seal is another of the user's, or the text itself.
    """
    record = text.with_suffix(".json")
    if text.suffix != ".jsonl" or not record.is_file() or SEAL.encode() not in record.read_bytes():
        return text.name
    return read_record(record).get("source", text.name)


def require_kinds(arch: Arch, kinds: Iterable[str]) -> None:
    """Raise A3Error for statistics that a mixture of experts or a compressed model has not."""
    for kind in kinds:
        site, form = KINDS[kind].site, KINDS[kind].form
        if form == "factors" and not arch.rope_layout:
            raise A3Error(
                f"statistic {kind!r} requires RoPE, which {arch.family} does not use. Remove it."
            )
        if isinstance(arch, CompressedArch) and site not in SITES:
            raise A3Error(
                f"statistic {kind!r}: a compressed model has only statistics of inputs, with "
                "which it is quantised. Collect it on the dense model."
            )
        of_mlp = site in ("mlp", "mlp_input", "down", "down_input")
        if arch.experts and of_mlp and (site, form) != ("down_input", "diagonal"):
            raise A3Error(
                f"statistic {kind!r}: not available for a mixture of experts, each of which has "
                "its own MLP. Use down_diagonal."
            )


def announce(arch: Arch, outputs: dict[str, Path], blocks: Tensor, streamed: bool) -> None:
    """Say what the run will cost before it starts."""
    total = sum(math.prod(arch.statistic_shape(KINDS[kind])) for kind in outputs)
    LOG.info(
        f"collect: {', '.join(outputs)} over {blocks.numel()} tokens "
        f"({len(blocks)} blocks of {blocks.shape[1]}); statistics take "
        f"{total * arch.layers * 8 / 2**20:.1f} MiB"
        f"{'; one layer at a time' if streamed else ''}",
    )


def warn_if_short(arch: Arch, outputs: Iterable[str], tokens: int) -> None:
    """Say on stderr where so few tokens leave statistics that are singular or mostly noise."""
    forms = {KINDS[kind].form for kind in outputs}
    advised = max(
        TOKENS_A_DIMENSION * arch.head_dim if "blocks" in forms else 0,
        TOKENS_A_DIAGONAL if "diagonal" in forms else 0,
    )
    if tokens < advised:
        LOG.warning(
            f"collect: warning: the calibration is short: {tokens} tokens, {advised} or more "
            f"advised for heads of {arch.head_dim}. Solutions would overfit them, and do "
            "badly on other text. Raise tokens, or give more text.",
        )
