"""Stage collect: computes Rxx files from passes of the model over the calibration blocks."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from a3.core.errors import A3Error
from a3.core.files import SEAL, read_record, write_record
from a3.core.progress import LOG
from a3.core.provenance import provenance
from a3.core.shards import share
from a3.models.arch import model_hashes, modules_of
from a3.models.checkpoint import check_small, model_source
from a3.models.compressed import dense_or_compressed
from a3.models.layerwise import fits, layerwise
from a3.models.load import load_tokenizer, require_positions
from a3.models.shape import Arch, CompressedArch
from a3.models.tokenizer import require_rows
from a3.rxx.container import Accumulator
from a3.rxx.kinds import (
    EXPERT_KINDS,
    GRADIENT_BLOCKS,
    KINDS,
    SAMPLED_FORMS,
    is_of_experts,
    states_disk,
    stored_bytes,
)
from a3.stages.collect.hooks import SITES
from a3.stages.collect.passes import Passes, run_passes
from a3.stages.collect.state import state_in
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents, text_sha256

# An h × h block has full rank from h tokens on. With N tokens, its relative error in the worst
# direction is about 2 sqrt(h / N): about one half with ten tokens per dimension.
TOKENS_A_DIMENSION = 10

# The relative error of a mean square is about sqrt(2 / N): 9 % at the limit used for experts.
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
    state: Path | None = None,
) -> None:
    """Sum the statistics of each kind in `outputs` over `tokens` calibration tokens.

    Blocks have `block_length` tokens without padding, start with BOS if `bos`, and are run one by
    one, as in evaluation. Gradients by activations use only one block in GRADIENT_BLOCKS, because
    they cost three times as much and need less precision. `shard` "0of4" uses only the first
    quarter of the blocks. With `stream`, or if the weights do not fit in the available memory, only
    one layer at a time is in memory. Writes one safetensors file per kind, and its seconds to
    `<kind>.timing.json`. After a kill, a call with the same arguments goes on in the folder
    `state`, which is removed at the end. Raises A3Error for an unknown kind, a text too short for
    one block a shard, blocks longer than the model has positions, sums that are not finite, or a
    `state` begun with other arguments.
    """
    require_known(outputs)
    arch = dense_or_compressed(model_folder)
    require_kinds(arch, outputs)
    check_small(model_folder)
    cut: dict[str, Any] = {"block_length": block_length, "seed": seed, "bos": bos}
    blocks = calibration_blocks(model_folder, text, tokens=tokens, **cut)
    warn_if_short(arch, outputs, blocks.numel())
    blocks, sampled = of_shard(blocks, shard)
    require_sampled(outputs, blocks, sampled, shard)
    if stream is None:
        stream = not fits(arch.size["parameters"], dtype)
    record = provenance(
        __name__,
        *modules_of(model_folder),
        **model_hashes(model_folder, arch),
        model=model_source(model_folder),
        text=text_source(text),
        text_sha256=text_sha256(text),
        dtype=dtype,
        **cut,
        **({} if shard is None else {"shard": shard}),
    )
    announce(arch, outputs, blocks, dtype, stream)
    settings = record | {"kinds": sorted(outputs), "tokens": blocks.numel(), "device": device}
    with state_in(state, settings) as kept:
        passes = passes_of(arch, outputs, kept.sums)
        model = layerwise(model_folder, arch, dtype, device, stream)
        run_passes(model, arch, passes, blocks.to(device), sampled, kept)
        timing = {"seconds": kept.seconds, "tokens_per_second": blocks.numel() / kept.seconds}
        save(outputs, passes.forward | passes.fisher, record | {"tokens": blocks.numel()}, timing)
        drawn = {"tokens": len(sampled) * block_length} | weighed(arch)
        save(outputs, passes.gradients, record | drawn, timing)


def weighed(arch: Arch) -> dict[str, bool]:
    """What the record of gradients says where norms weigh them, whose sums look alike."""
    return {"normed": True} if arch.norms_output("ov") else {}


def passes_of(arch: Arch, kinds: Iterable[str], sums: Path | None) -> Passes:
    """An empty accumulator for each of the kinds; finished layers go to the folder `sums`, or to
    files that are gone with the process."""
    passes = Passes()
    for kind in kinds:
        form = KINDS[kind].form
        if form in SAMPLED_FORMS:
            own = passes.gradients
        else:
            own = passes.fisher if form == "fisher" else passes.forward
        own[kind] = Accumulator(kind, arch.heads_of(KINDS[kind].site), sums)
    return passes


def save(
    outputs: dict[str, Path],
    accumulators: dict[str, Accumulator],
    record: dict[str, Any],
    timing: dict[str, float],
) -> None:
    """Write the file of each statistic, and the seconds beside it."""
    for kind, accumulator in accumulators.items():
        accumulator.save(outputs[kind], record)
        write_record(outputs[kind].with_suffix(".timing.json"), timing)


def calibration_blocks(
    model_folder: Path, text: Path, *, block_length: int, tokens: int, seed: int, bos: bool
) -> Tensor:
    """All blocks (N, L) of a calibration; A3Error for a text that is too short or blocks that are
    too long.
    """
    require_positions(model_folder, block_length)
    tokenizer = load_tokenizer(model_folder)
    documents = load_documents(text)
    blocks = token_blocks(
        documents, tokenizer, block_length=block_length, tokens=tokens, seed=seed, bos=bos
    )
    require_rows(model_folder, tokenizer, blocks)
    return blocks


def of_shard(blocks: Tensor, shard: str | None) -> tuple[Tensor, list[int]]:
    """The blocks (N, L) of a shard (or all), and which of them are used for gradients.

    The blocks used for gradients do not depend on the number of shards.
    """
    run_of = range(len(blocks)) if shard is None else share(len(blocks), shard, "blocks")
    sampled = [number - run_of.start for number in run_of if number % GRADIENT_BLOCKS == 0]
    return blocks[run_of.start : run_of.stop], sampled


def require_known(kinds: Iterable[str]) -> None:
    """Raise A3Error for an unknown kind."""
    for kind in kinds:
        if kind not in KINDS:
            raise A3Error(f"statistic {kind!r} is not known. Kinds: {', '.join(KINDS)}.")


def require_sampled(
    kinds: Iterable[str], blocks: Tensor, sampled: list[int], shard: str | None
) -> None:
    """Raise A3Error if a shard has no block that is used for gradients."""
    if not sampled and any(KINDS[kind].form in SAMPLED_FORMS for kind in kinds):
        raise A3Error(
            f"shard {shard}: gradients use one block in {GRADIENT_BLOCKS}, and none "
            f"of its {len(blocks)} blocks is one of them. Collect in fewer shards."
        )


def text_source(text: Path) -> str:
    """The text's source from the record beside it; the file's name if there is no record.

    A file with the record's name but without a seal is the user's, or the text itself.
    """
    record = text.with_suffix(".json")
    if text.suffix != ".jsonl" or not record.is_file() or SEAL.encode() not in record.read_bytes():
        return text.name
    return read_record(record).get("source", text.name)


def require_kinds(arch: Arch, kinds: Iterable[str]) -> None:
    """Raise A3Error for statistics that a mixture of experts or a compressed model lacks."""
    for kind in kinds:
        site, form = KINDS[kind].site, KINDS[kind].form
        if form == "factors" and not arch.rope_layout:
            raise A3Error(
                f"statistic {kind!r} requires RoPE, which {arch.family} does not use. Remove it."
            )
        of_experts = is_of_experts(KINDS[kind], vars(arch))
        if isinstance(arch, CompressedArch) and (site not in SITES or of_experts):
            raise A3Error(
                f"statistic {kind!r}: a compressed model has only statistics of inputs, with "
                "which it is quantised, and none of experts. Collect it on the dense model."
            )
        if site in ("experts", "router") and not arch.experts:
            raise A3Error(
                f"statistic {kind!r}: of a mixture of experts, which {arch.family} is not. Remove "
                "it."
            )
        if site == "router" and not arch.routes:
            raise A3Error(
                f"statistic {kind!r}: a3 does not know which tensor routes tokens in "
                f"{arch.family}. Remove it."
            )
        of_mlp = site in ("mlp", "mlp_input", "down", "down_input")
        if arch.experts and of_mlp and kind not in EXPERT_KINDS:
            raise A3Error(
                f"statistic {kind!r}: not available for a mixture of experts, each of which has "
                f"its own MLP. Use one of {', '.join(EXPERT_KINDS)}."
            )


def announce(
    arch: Arch, outputs: dict[str, Path], blocks: Tensor, dtype: str, streamed: bool
) -> None:
    """Print the estimated cost before the run starts."""
    total = sum(stored_bytes(vars(arch), kind) for kind in outputs)
    files = states_disk(vars(arch), blocks.numel(), dtype, outputs)
    LOG.info(
        f"collect: {', '.join(outputs)} over {blocks.numel()} tokens "
        f"({len(blocks)} blocks of {blocks.shape[1]}); statistics take "
        f"{total / 2**20:.1f} MiB, hidden states {files / 2**30:.2f} GiB on disk "
        f"until the end{'; one layer at a time' if streamed else ''}",
    )


def warn_if_short(arch: Arch, outputs: Iterable[str], tokens: int) -> None:
    """Warn on stderr if there are so few tokens that statistics are singular or mostly noise."""
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
