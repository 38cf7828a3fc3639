"""What gathering the kept RoPE pairs costs: ways to do it, interleaved in one process.

    python benchmarks/rope.py

Rotates queries and keys of 30 layers in SmolLM2-135M's shapes (9 query heads, 3 groups, 26 of 32
pairs, other pairs in every group of every layer) from the family's tables of cos and sin.
"""

import statistics
import time

import torch

from a3.models.attention_a3 import gather, rotate

LAYERS, GROUPS, HEADS, PAIRS, KEPT = 30, 3, 9, 32, 26


def forms(length):
    """Name to function, each the rotations of one forward pass."""
    index = torch.stack(
        [torch.randperm(PAIRS)[:KEPT].sort().values for _ in range(LAYERS * GROUPS)]
    ).view(LAYERS, GROUPS, KEPT)
    tables = [torch.randn(1, length, 2 * PAIRS) for _ in range(2)]
    q = torch.randn(1, GROUPS, HEADS // GROUPS, length, 2 * KEPT)
    k = torch.randn(1, GROUPS, length, 2 * KEPT)

    def turn(cos, sin):
        rotate(q, cos[:, :, None], sin[:, :, None])
        rotate(k, cos, sin)

    def indexed():
        for pairs in index:
            turn(*(table[..., pairs].transpose(1, 2) for table in tables))

    def selected():
        for pairs in index:
            turn(*(gather(table, pairs) for table in tables))

    def of_all_layers():
        every = index.flatten()
        shape = (LAYERS, GROUPS, KEPT)
        found = [
            table.index_select(-1, every).unflatten(-1, shape).permute(2, 0, 3, 1, 4)
            for table in tables
        ]
        for layer in range(LAYERS):
            turn(found[0][layer], found[1][layer])

    def once():
        found = [gather(table, index[0]) for table in tables]
        for _ in range(LAYERS):
            turn(*found)

    return {
        "table[..., pairs] in each layer": indexed,
        "index_select in each layer": selected,
        "of all layers at once": of_all_layers,
        "once, where layers keep the same pairs": once,
    }


def main():
    torch.manual_seed(0)
    for length, repeats in ((1, 200), (256, 30), (1024, 15)):
        ways = forms(length)
        seconds = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
        print(f"{length} tokens: ms a forward pass, least and median of {repeats}")
        for name, samples in seconds.items():
            least, median = min(samples), statistics.median(samples)
            print(f"  {name}: {1e3 * least:.2f}, {1e3 * median:.2f}")


if __name__ == "__main__":
    main()
