"""SmolLM2, its texts, and what several tests do with them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import a3  # noqa: F401
from a3.texts.blocks import scored_blocks
from a3.texts.reading import load_documents

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "results/models/smollm2-135m"
TEXTS = ROOT / "results/texts"
# The statistics of a3-plus and a3-stock.
KINDS = (
    *("q_blocks", "k_blocks", "pair_gradient", "o_proj_input", "attention_gradient"),
    *("down_input", "mlp_gradient"),
)


def a3_(*words, path=None):
    """Run a command of a3, with the libraries of the folder `path`, too."""
    command = [sys.executable, "-m", "a3", *map(str, words)]
    env = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    subprocess.run(command, cwd=ROOT, env=env, check=True)


def scored(tokens):
    """(1, tokens) of the test text."""
    documents = load_documents(TEXTS / "wikipedia-summaries/test.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return scored_blocks(documents, tokenizer, tokens, tokens, True, "empty-line")[0]


@torch.inference_mode()
def logits_of(folder, ids):
    """Logits (tokens, vocabulary) by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([ids])).logits[0].numpy()


def perplexity(logits, block):
    """Of the tokens of a block (1, tokens)."""
    loss = torch.nn.functional.cross_entropy(torch.tensor(logits[:-1]), block[0, 1:])
    return math.exp(loss)


def row(model, found, logits, block, greedy):
    """A row of the table: what a runtime `found`, beside what transformers made of the block."""
    config = json.loads((MODEL / "config.json").read_text())
    dense = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    same = sum(int(a) == int(b) for a, b in zip(list(found["greedy"]), greedy, strict=True))
    return {
        "model": model,
        "runtime": str(found["version"]),
        "difference": float(abs(found["logits"] - logits).max()),
        "perplexity": [perplexity(found["logits"], block), perplexity(logits, block)],
        "same": same,
        "speeds": [float(speed) for speed in found["speeds"]],
        "cache": [int(found["held"]) // block.numel(), 2 * 4 * dense],
    }


def continued(folder, block, prompt, count):
    """The `count` likeliest tokens after the first `prompt` ones of a block, by transformers."""
    return greedy(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), block, prompt, count
    )


def greedy(model, block, prompt, count):
    """As `continued`, of a model in memory."""
    made = model.generate(
        block[:, :prompt], max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return made[0, prompt:].tolist()
