"""Stage collect: model and text to Rxx files, in one pass over the calibration blocks."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from a3.documents import load_documents, token_blocks
from a3.errors import A3Error
from a3.files import sha256, write_json
from a3.models.arch import Arch, load_arch
from a3.provenance import provenance
from a3.statistics import KINDS, Accumulator


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
) -> None:
    """Sum the statistics of each kind in `outputs` over `tokens` calibration tokens.

    Blocks of `block_length` tokens without padding, BOS first where `bos`, each run alone, as at
    evaluation. Writes one safetensors file a kind, and its seconds in `<kind>.timing.json`.
    Raises A3Error for an unknown kind, a text too short, or sums that are not finite.
    """
    for kind in outputs:
        if kind not in KINDS:
            raise A3Error(f"statistic {kind!r} is not known. Kinds: {', '.join(KINDS)}.")
    arch = load_arch(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    blocks = token_blocks(
        load_documents(text),
        tokenizer,
        block_length=block_length,
        tokens=tokens,
        seed=seed,
        bos=bos,
    )
    announce(arch, outputs, blocks)
    trunk = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).base_model
    accumulators = {kind: Accumulator(kind, arch.heads) for kind in outputs}
    start = time.perf_counter()
    run(trunk.to(device).eval(), arch, accumulators, blocks.to(device))
    seconds = time.perf_counter() - start
    record = provenance(
        __name__,
        weights_sha256=arch.weights_sha256,
        text_sha256=sha256(text),
        tokens=blocks.numel(),
        block_length=block_length,
        seed=seed,
        bos=bos,
        dtype=dtype,
    )
    for kind, path in outputs.items():
        accumulators[kind].save(path, record)
        timing = {"seconds": seconds, "tokens_per_second": blocks.numel() / seconds}
        write_json(path.with_suffix(".timing.json"), timing)


def announce(arch: Arch, outputs: dict[str, Path], blocks: Tensor) -> None:
    """Say what the run will cost before it starts."""
    width = {"attn_input": arch.hidden_size, "down_input": arch.intermediate_size}
    total = 0
    for kind in (KINDS[name] for name in outputs):
        w = width.get(kind.site, arch.heads * arch.head_dim)
        total += {"full": w * w, "blocks": w * arch.head_dim, "diagonal": w}[kind.form] + w
    print(
        f"collect: {', '.join(outputs)} over {blocks.numel()} tokens "
        f"({len(blocks)} blocks of {blocks.shape[1]}); statistics take "
        f"{total * arch.layers * 8 / 2**20:.0f} MiB"
    )


def run(trunk: nn.Module, arch: Arch, accumulators: dict[str, Accumulator], blocks: Tensor) -> None:
    """Push every block (blocks (N, L)) through the trunk with the statistics hooked on."""
    handles = [
        trunk.get_submodule(module).register_forward_pre_hook(hook)
        for module, hook in hooks(arch, accumulators)
    ]
    try:
        with torch.inference_mode(), tqdm(total=blocks.numel(), unit="tok", desc="collect") as bar:
            for block in blocks:
                trunk(block[None], use_cache=False)
                bar.update(block.numel())
    finally:
        for handle in handles:
            handle.remove()


def hooks(
    arch: Arch, accumulators: dict[str, Accumulator]
) -> list[tuple[str, Callable[[nn.Module, tuple[Any, ...]], None]]]:
    """One pre-hook for each site of each layer that some kind looks at: (module name, hook)."""
    by_site: dict[str, list[Accumulator]] = {}
    for kind, accumulator in accumulators.items():
        by_site.setdefault(KINDS[kind].site, []).append(accumulator)

    def hook_of(layer: int, wanted: list[Accumulator]) -> Callable:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].flatten(0, -2).double()
            for accumulator in wanted:
                accumulator.add(layer, x)

        return hook

    adapter = arch.adapter
    return [
        (adapter.module(layer, adapter.sites[site]), hook_of(layer, wanted))
        for site, wanted in by_site.items()
        for layer in range(arch.layers)
    ]
