"""A model whose weights exceed the memory limit: a3-plus from collect to perplexity under it.

    python benchmarks/stream.py --layers 48 --limit 1.0

Makes a random Llama-shaped model (d = 768, n = 2048, bfloat16) in a temporary folder, then runs
`a3 collect`, `allocate`, `approx` and `eval ppl` in a control group whose memory is `--limit` GiB,
less than the weights in float32, and reports time and peak memory. The limit counts everything:
libraries, weights, sums, activations and the page cache of all files, which the system gives up
when it needs room. `beyond cache` is what it cannot give up, sampled every 20 ms. Then the resident
passes: under the limit, which kills or refuses them, and without; their statistics and perplexities
have to be the same. Needs root and control groups, version 1.
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
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from a3.core.files import read_record
from a3.solutions.modes import choose
from a3.solutions.plan import Plan

SHAPES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 65536,
}
PLUS = {"qk": "fisher~", "ov": "joint~", "mlp": "obs~", "ratio": "0.2"}
KINDS = Plan(choose(PLUS)).kinds()
PRESET = ["--preset", "a3-plus", "--ratio", PLUS["ratio"]]


def make(folder: Path, layers: int, shapes_of: dict[str, int]) -> int:
    """Write config, one file of weights a layer, and a byte tokenizer; the bytes in float32."""
    config = LlamaConfig(**shapes_of, num_hidden_layers=layers, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    d, n, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
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
            shapes = {
                f"{name}.weight": (vocabulary, d) for name in ("model.embed_tokens", "lm_head")
            }
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
    known = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(known, []))
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
    folder = Path("/sys/fs/cgroup/memory", own.lstrip("/"), f"a3-stream-{os.getpid()}")
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(int(limit * 2**30)))
        yield folder
    finally:
        folder.rmdir()


def run(name: str, arguments: list[str], limit: float) -> None:
    """Run one a3 command in `limit` GiB and print what it took."""
    with group(limit) as folder:
        start = time.perf_counter()
        join = lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
        child = subprocess.Popen(
            [sys.executable, "-m", "a3", *arguments],
            preexec_fn=join,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        held = 0
        while child.poll() is None:
            lines = (folder / "memory.stat").read_text().splitlines()
            held = max(held, int(dict(line.split() for line in lines)["rss"]))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if child.returncode:
            said = child.stderr.read().strip().splitlines()[-1:]
            print(f"{name}: status {child.returncode} after {seconds:.0f} s {said}", flush=True)
            return
        peak = int((folder / "memory.max_usage_in_bytes").read_text()) / 2**30
        print(
            f"{name}: {seconds:.0f} s, at most {peak:.2f} GiB, {held / 2**30:.2f} beyond cache",
            flush=True,
        )


def main() -> None:
    """Make, limit, measure, compare."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--layers", type=int, default=48)
    options.add_argument("--limit", type=float, default=1.0, help="GiB")
    options.add_argument("--tokens", type=int, default=1024)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        size = make(folder / "model", chosen.layers, SHAPES)
        print(f"weights {size / 2**30:.2f} GiB in float32, limit {chosen.limit} GiB")
        (folder / "text.txt").write_text("A river moves towards an ocean or a lake. " * 1000)
        compare(folder, chosen.limit, chosen.tokens)


def compare(folder: Path, limit: float, tokens: int) -> None:
    """All stages under the limit, and the resident passes with and without it."""
    model, small, rxx = (str(folder / name) for name in ("model", "small", "rxx"))
    one = ["--threads", "1"]
    blocks = ["--text", str(folder / "text.txt"), "--tokens", str(tokens), "--block-length", "256"]
    blocks += one

    def collect(where: str) -> list[str]:
        outputs = [str(folder / where / f"{kind}.safetensors") for kind in KINDS]
        return ["collect", model, *blocks, "-o", *outputs]

    def score(of: str, out: str) -> list[str]:
        return ["eval", "ppl", of, *blocks, "-o", str(folder / f"{out}.json")]

    ranks = str(folder / "ranks.json")
    solving = ["--rxx", rxx, *PRESET, *one]
    run("collect", collect("rxx"), limit)
    run("allocate", ["allocate", model, *solving, "-o", ranks], limit)
    run("approx", ["approx", model, *solving, "--allocation", ranks, "-o", small], limit)
    run("perplexity, dense", score(model, "dense"), limit)
    run("perplexity, compressed", score(small, "small"), limit)
    resident = ["--no-stream"]
    run("collect, resident", [*collect("whole"), *resident], limit)
    run("perplexity, resident", [*score(model, "dense-whole"), *resident], limit)
    run("collect, resident, without limit", [*collect("whole"), *resident], 1000)
    for name, of in (("dense", model), ("small", small)):
        run(f"perplexity, {name}, without limit", [*score(of, f"{name}-whole"), *resident], 1000)
    for kind in KINDS:
        a, b = ((folder / where / f"{kind}.safetensors").read_bytes() for where in ("rxx", "whole"))
        print(f"{kind}: {'the same bytes' if a == b else 'different'}")
    for name in ("dense", "small"):
        a, b = (read_record(folder / f"{end}.json") for end in (name, f"{name}-whole"))
        same = a["block_nll"] == b["block_nll"]
        print(f"perplexity, {name}: {a['perplexity']:.2f}, {'the same' if same else 'different'}")


if __name__ == "__main__":
    main()
