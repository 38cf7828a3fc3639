"""`a3 compress` side by side: today's build, another commit's, and SVD-LLM's public code.

    a3 model smollm2-135m --wheels wheels -o dense
    a3 text wiki-articles --wheels wheels -o docs.jsonl
    python benchmarks/compress.py dense --text docs.jsonl --before daac38b --svd-llm SVD-LLM

Each compresses the same model by the same ratio with the same text and number of tokens, one after
the other in processes of their own: wall seconds, CPU seconds and peak memory. `--before` is a
commit of this repository; `--svd-llm` is a clone of github.com/AIoT-MLSys-Lab/SVD-LLM (Wang et al.
2024, arXiv 2403.07378), whose `profle_svdllm` and `whitening` run here on the CPU in float32. Then
the perplexity of both builds' models on `--score`, with the paired standard error of their
difference.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

BLOCK = 1024

Word: TypeAlias = str | int | Path

# Runs in SVD-LLM's folder. The modules for other models import names that transformers has no more.
PEER = """
import sys, types
import torch
for name in ("component.svd_mistral", "component.svd_opt", "evaluater"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["component.svd_mistral"].SVD_MistralAttention = None
sys.modules["component.svd_mistral"].SVD_MistralMLP = None
sys.modules["component.svd_opt"].SVDOPTDecoderLayer = None
import component
from SVDLLM import profle_svdllm, whitening
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.float32).eval()
blocks = torch.load({blocks!r})
loader = [
    {{"input_ids": block[None], "attention_mask": torch.ones_like(block)[None]}} for block in blocks
]
metric = profle_svdllm("llama", model, loader, "cpu")
whitening("llama", model, metric, 1 - {ratio}, "cpu")
torch.save(model.state_dict(), {out!r})
"""


def run(
    name: str, command: Sequence[str | int | Path], tree: Path, threads: int
) -> tuple[float, ...]:
    """Wall seconds, CPU seconds and peak GiB of a command with the code in `tree`."""
    limits = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    child = subprocess.Popen(
        list(map(str, command)), cwd=tree, env=os.environ | limits | {"PYTHONPATH": str(tree)}
    )
    _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{name}: failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(getattr(after, k) - getattr(before, k) for k in ("ru_utime", "ru_stime"))
    peak = used.ru_maxrss / 2**20
    print(f"{name}: {wall:.1f} s, {cpu:.1f} CPU seconds, {peak:.2f} GiB", flush=True)
    return wall, cpu, peak


def losses(folder: Path, text: Path, tree: Path, out: Path) -> list[float]:
    """Nats a token of each block of a text."""
    command = [sys.executable, "-m", "a3", "eval", "ppl", folder, "--text", text, "-o", out]
    subprocess.run(
        list(map(str, [*command, "--block-length", BLOCK, "--threads", 2])),
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        check=True,
    )
    return json.loads(out.read_text())["block_nll"]


def checked_out(commit: str, folder: Path) -> Path:
    """The repository at a commit, in a new folder."""
    folder.mkdir()
    root = Path(__file__).parent.parent
    packed = subprocess.run(
        ["git", "-C", str(root), "archive", commit], check=True, capture_output=True
    )
    subprocess.run(["tar", "x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


def peer(folder: Path, model: Path, text: Path, ratio: str, tokens: int, work: Path) -> list:
    """The command that runs SVD-LLM's code on the blocks that a3 would use."""
    import torch

    from a3.stages.collect.collect import calibration_blocks

    blocks = calibration_blocks(model, text, block_length=BLOCK, tokens=tokens, seed=0, bos=True)
    torch.save(blocks, work / "blocks.pt")
    said = {"model": str(model), "blocks": str(work / "blocks.pt"), "ratio": ratio}
    return [sys.executable, "-c", PEER.format(**said, out=str(work / "svd-llm.pt"))]


def compare(scored: dict[str, list[float]]) -> None:
    """Print perplexities, and the differences from the first with their paired errors."""
    first, *_ = scored.values()
    for build, found in scored.items():
        differences = [new - old for old, new in zip(first, found, strict=True)]
        mean = statistics.mean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        perplexity = math.exp(statistics.mean(found))
        print(f"{build}: perplexity {perplexity:.3f}, {mean:+.5f} ± {error:.5f} nats")


def main() -> None:
    """Compress with each, and compare."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", type=Path)
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--score", type=Path, help="text for the perplexity; none by default")
    options.add_argument("--before", help="a commit to compare with")
    options.add_argument("--svd-llm", type=Path, help="clone of SVD-LLM")
    options.add_argument("--preset", default="a3-plus")
    options.add_argument("--ratio", default="0.2")
    options.add_argument("--tokens", type=int, default=32768)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    chosen = options.parse_args()
    model, text = chosen.model.resolve(), chosen.text.resolve()
    here = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        trees = {f"today {dtype}": (here, dtype) for dtype in chosen.dtypes}
        if chosen.before:
            trees = {"before": (checked_out(chosen.before, work / "tree"), "float32")} | trees
        took = {}
        for build, (tree, dtype) in trees.items():
            command = [sys.executable, "-m", "a3", "compress", model, "--text", text]
            command += ["--preset", chosen.preset, "--ratio", chosen.ratio, "-o", work / build]
            command += ["--tokens", chosen.tokens, "--block-length", BLOCK, "--dtype", dtype]
            took[build] = run(build, [*command, "--threads", chosen.threads], tree, chosen.threads)
        if chosen.svd_llm:
            command = peer(chosen.svd_llm, model, text, chosen.ratio, chosen.tokens, work)
            took["SVD-LLM"] = run("SVD-LLM", command, chosen.svd_llm.resolve(), chosen.threads)
        for build, other in took.items():
            for dtype in chosen.dtypes:
                each = zip(other, took[f"today {dtype}"], strict=True)
                ratios = ", ".join(f"{one / own:.2f}" for one, own in each)
                print(f"{build} / today {dtype}: {ratios}")
        if chosen.score:
            score = chosen.score.resolve()
            compare(
                {
                    build: losses(work / build, score, tree, work / f"{build}.json")
                    for build, (tree, _) in trees.items()
                }
            )


if __name__ == "__main__":
    main()
