"""Compression and quantisation together: perplexity and bytes of models, loaded in 8 and 4 bits.

    python benchmarks/quantised.py dense small --text test.jsonl

Each folder is loaded by transformers with bitsandbytes (LLM.int8(), NF4), on the CPU too, and
scored on the same blocks. Needs benchmarks/requirements.txt.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import a3  # noqa: F401
from a3.models.load import load_tokenizer
from a3.stages.evaluate.perplexity import block_losses
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

SCHEMES = {
    "as stored": None,
    "int8": {"load_in_8bit": True},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="dense and compressed folders")
    parser.add_argument("--text", type=Path, required=True, help=".txt or .jsonl")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--block-length", type=int, default=512)
    options = parser.parse_args()

    tokenizer = load_tokenizer(options.models[0])
    blocks = token_blocks(
        load_documents(options.text), tokenizer, options.block_length, options.tokens, None, True
    )
    print("| model | weights | MB | perplexity |\n|---|---|---|---|")
    for folder in options.models:
        for name, scheme in SCHEMES.items():
            quantised = (
                {} if scheme is None else {"quantization_config": BitsAndBytesConfig(**scheme)}
            )
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, **quantised
            ).eval()
            losses = block_losses(model, blocks)
            size, perplexity = model.get_memory_footprint() / 1e6, losses.mean().exp()
            error = perplexity * losses.std() / len(losses) ** 0.5
            print(
                f"| {folder.name} | {name} | {size:.1f} | {perplexity:.2f} ± {error:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
