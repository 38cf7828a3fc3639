"""A model whose weights exceed the memory limit, collected and compressed under it.

    python benchmarks/stream.py --layers 30 --limit 2.5

Makes a random Llama-shaped model (d = 2048, n = 5504, bfloat16) in a temporary folder, then runs
`a3 collect` and `a3 approx` in a control group whose memory is `--limit` GiB, less than its weights
in float32, and reports their time and peak memory. Then collects with the model resident, under the
limit, which kills it, and without, and compares the sums. Needs root and control groups, version 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SHAPES = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
KINDS = ("q_blocks", "k_blocks", "v_blocks", "down_diagonal")


def make(folder: Path, layers: int, shapes_of: dict[str, int]) -> int:
    """Write config, one file of weights a layer, and a byte tokenizer; the bytes in float32."""
    config = LlamaConfig(**shapes_of, num_hidden_layers=layers, vocab_size=258, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    d, n = config.hidden_size, config.intermediate_size
    g = config.num_key_value_heads * config.head_dim
    attention = {"q_proj": (d, d), "k_proj": (g, d), "v_proj": (g, d), "o_proj": (d, d)}
    mlp = {"gate_proj": (n, d), "up_proj": (n, d), "down_proj": (d, n)}
    where: dict[str, str] = {}
    total = 0
    for layer in range(layers + 1):
        start = f"model.layers.{layer}."
        shapes = {f"{start}self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{start}mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"{start}{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
        if layer == layers:
            shapes = {"model.embed_tokens.weight": (258, d), "lm_head.weight": (258, d)}
            shapes["model.norm.weight"] = (d,)
        tensors = {
            name: torch.ones(shape) if "norm" in name else torch.randn(shape) / shape[-1] ** 0.5
            for name, shape in shapes.items()
        }
        total += sum(value.numel() * 4 for value in tensors.values())
        file = f"model-{layer + 1:05}-of-{layers + 1:05}.safetensors"
        save_file({name: t.bfloat16() for name, t in tensors.items()}, folder / file)
        where |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return total


@contextmanager
def group(limit: float) -> Iterator[Path]:
    """A control group (version 1) of `limit` GiB, swap included where it is counted."""
    own = next(
        line.split(":")[2]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.split(":")[1] == "memory"
    )
    folder = Path("/sys/fs/cgroup/memory", own.lstrip("/"), "a3-stream")
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(int(limit * 2**30)))
        yield folder
    finally:
        folder.rmdir()


def run(name: str, arguments: list[str], limit: float) -> None:
    """Run one a3 command in `limit` GiB and print what it took; page cache counts as well."""
    with group(limit) as folder:
        start = time.perf_counter()
        join = lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
        done = subprocess.run(
            [sys.executable, "-m", "a3", *arguments],
            preexec_fn=join,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{name}: killed or failed, status {done.returncode}{done.stderr[-300:]}")
            return
        seconds = time.perf_counter() - start
        peak = int((folder / "memory.max_usage_in_bytes").read_text()) / 2**30
        print(f"{name}: {seconds:.0f} s, at most {peak:.2f} GiB in memory", flush=True)


def main() -> None:
    """Make, limit, measure, compare."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--layers", type=int, default=30)
    options.add_argument("--limit", type=float, default=2.5, help="GiB")
    options.add_argument("--tokens", type=int, default=1024)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        size = make(folder / "model", chosen.layers, SHAPES)
        print(f"weights {size / 2**30:.2f} GiB in float32, limit {chosen.limit} GiB")
        (folder / "text.txt").write_text("A river moves towards an ocean or a lake. " * 1000)
        model, text = str(folder / "model"), str(folder / "text.txt")
        blocks = ["--tokens", str(chosen.tokens), "--block-length", "256", "--threads", "1"]

        def collect(where: str) -> list[str]:
            outputs = [str(folder / where / f"{kind}.safetensors") for kind in KINDS]
            return ["collect", model, "--text", text, *blocks, "-o", *outputs]

        small = str(folder / "small")
        rxx = str(folder / "streamed")
        run("collect, streamed", collect("streamed"), chosen.limit)
        run("approx", ["approx", model, "--rxx", rxx, "--ratio", "0.2", "-o", small], chosen.limit)
        run("collect, resident", [*collect("resident"), "--no-stream"], chosen.limit)
        run("collect, resident, without limit", [*collect("resident"), "--no-stream"], 1000)
        for kind in KINDS:
            a, b = (load_file(folder / w / f"{kind}.safetensors") for w in ("streamed", "resident"))
            same = all(torch.equal(a[key], b[key]) for key in b)
            print(f"{kind}: {'the same bytes' if same else 'different'}")


if __name__ == "__main__":
    main()
