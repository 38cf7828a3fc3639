"""Claims about the real model, SmolLM2-135M: identity at full rank, the live KV cache.

The model comes through the workflow's own rules, into the results folder that `make run` uses.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from a3.solutions.modes import choose, kinds_needed
from a3.solutions.plan import Plan
from a3.stages.approx.approximate import approximate
from a3.stages.collect.collect import collect
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "results" / "models" / "smollm2-135m"
TEXT = ROOT / "results" / "texts" / "wiki-articles" / "docs.jsonl"
MODES = {"qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w"}


@pytest.fixture(scope="module")
def rxx(tmp_path_factory):
    """Statistics of 512 tokens: fewer than the 576 dimensions of the hidden states."""
    targets = [str(path.relative_to(ROOT)) for path in (MODEL / "arch.json", TEXT)]
    profile = ["--profile", "workflow/profiles/default", "--cores", "2"]
    subprocess.run([sys.executable, "-m", "snakemake", *profile, *targets], cwd=ROOT, check=True)
    folder = tmp_path_factory.mktemp("rxx")
    outputs = {
        kind: folder / f"{kind}.safetensors"
        for kind in kinds_needed(choose(MODES | {"ratio": "0"}))
    }
    settings = {"tokens": 512, "block_length": 256, "seed": 0, "bos": True}
    collect(MODEL, TEXT, outputs, **settings, dtype="float32", device="cpu")
    return folder


@pytest.fixture(scope="module")
def block():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return token_blocks(load_documents(TEXT), tokenizer, 128, 128, seed=1, bos=True)


@torch.inference_mode()
def run(folder, block):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model(block)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    return out.logits, cache


def test_full_rank_reproduces_the_dense_logits(rxx, block, tmp_path, record_property):
    approximate(MODEL, rxx, Plan(choose(MODES | {"ratio": "0"})), tmp_path / "full")
    dense, _ = run(MODEL, block)
    full, _ = run(tmp_path / "full", block)
    worst = (dense - full).abs().max().item()
    record_property("largest_logit_difference", worst)
    print(f"largest logit difference {worst:.2g} of a range of {dense.max() - dense.min():.3g}")
    assert worst < 1e-3
    assert worst > 0, "ratio 0 has to go through the solver"


def test_the_live_cache_is_as_small_as_reported(rxx, block, tmp_path):
    approximate(MODEL, rxx, Plan(choose(MODES | {"ratio": "0.4"})), tmp_path / "small")
    said = json.loads((tmp_path / "small" / "approx.json").read_text())["size"]
    for folder, kind in ((MODEL, "dense"), (tmp_path / "small", "compressed")):
        assert run(folder, block)[1] == block.numel() * said[kind]["kv_bytes_per_token"]
    assert said["compressed"]["kv_bytes_per_token"] == 30 * 3 * (38 + 38) * 4
    assert torch.isfinite(run(tmp_path / "small", block)[0]).all()
