"""LoRA on a compressed model: perplexity on other text before and after a short training.

    python benchmarks/lora.py small --train docs.jsonl --test test.jsonl --steps 100

Trains adapters of every projection (peft) on calibration text in random blocks, and scores the same
blocks of the test text before and after, float32. Needs benchmarks/requirements.txt.
"""

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from a3.models.load import load_model, load_tokenizer
from a3.stages.evaluate.perplexity import block_losses
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

MODULES = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def train(model, blocks, steps, batch, rate):
    """Steps of AdamW on batches of blocks in random order, the rate falling to 0 by a cosine."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.randperm(len(blocks))
    model.train()
    for step in range(steps):
        ids = blocks[order[torch.arange(step * batch, (step + 1) * batch) % len(blocks)]]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="dense or compressed folder")
    parser.add_argument("--train", type=Path, required=True, help=".txt or .jsonl")
    parser.add_argument("--test", type=Path, required=True, help=".txt or .jsonl, other text")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--score-tokens", type=int, default=4096)
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer, length = load_tokenizer(options.model), options.block_length
    needed = options.steps * options.batch * length
    blocks = token_blocks(
        load_documents(options.train), tokenizer, length, needed, seed=0, bos=True
    )
    test = token_blocks(
        load_documents(options.test), tokenizer, length, options.score_tokens, seed=None, bos=True
    )
    model = load_model(options.model, "float32")
    before = block_losses(model, test)
    lora = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=MODULES, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, lora)
    adapted.print_trainable_parameters()
    start = time.perf_counter()
    train(adapted, blocks, options.steps, options.batch, options.rate)
    seconds = time.perf_counter() - start
    after = block_losses(adapted, test)
    difference = after - before
    error = difference.std() / len(difference) ** 0.5
    print(f"{blocks.numel()} training tokens ({len(blocks)} blocks of {length}), {seconds:.0f} s")
    print(
        f"perplexity on {test.numel()} other tokens: {before.mean().exp():.2f} before, "
        f"{after.mean().exp():.2f} after; nll {difference.mean():+.3f} ± {error:.3f}"
    )


if __name__ == "__main__":
    main()
