"""A made-up frontier, as `a3 frontier` records one."""

FULL = {"qk": 16, "ov": 16, "mlp": 96}
DENSE = {"parameters": 1_000_000, "cached_numbers": 500, "flops": 2_000_000, "bytes": 4_000_000}
MODES = {"qk": "fisher~", "ov": "joint~", "mlp": "obs~"}
RATIOS = [number / 40 for number in range(21)]
LAYERS = 6
BLOCKS = {"tokens": 4096, "block_length": 64, "seed": 3}
MADE = {"code": "0123456789abcdef", "libraries": {"torch": "2.13.0"}}


def frontier_record(weights, modes=MODES, layers=LAYERS):
    """Ratios up to 0.5: twice the ratio squared is predicted, half as much more measured."""
    points = [point(ratio, modes, layers) for ratio in RATIOS]
    return {
        "modes": modes,
        "dense": {"amounts": DENSE, "ranks": {one: FULL[one] for one in modes}},
        "points": points,
        "measured": [measured(ratio, 1.5) for ratio in (0.1, 0.3, 0.5)],
        "checks": [measured(0.2, 1.6) | {"corrected": 1.5 * 0.08}],
        "blocks": 16,
        "weights_sha256": weights,
        "provenance": {
            "stage": "frontier",
            **MADE,
            "statistics": {
                # Gradients are of a quarter of the blocks.
                "pair_gradient": {"stage": "gradients", **MADE, **BLOCKS, "tokens": 1024},
                "q_blocks": {"stage": "collect", **MADE, **BLOCKS},
            },
        },
    }


def point(ratio, modes, layers):
    """Later layers lose more, and keep less."""
    predicted = 2 * ratio**2
    parts = [predicted * (layer + 1) / sum(range(1, layers + 1)) for layer in range(layers)]
    kept = [1 - ratio * (layer + 1) / layers for layer in range(layers)]
    return {
        "ratio": ratio,
        "amounts": {key: round(amount * (1 - ratio)) for key, amount in DENSE.items()},
        "predicted": predicted,
        "corrected": 1.5 * predicted,
        "ranks": {one: [round(FULL[one] * share) for share in kept] for one in modes},
        "parts": {one: [part / len(modes) for part in parts] for one in modes},
    }


def measured(ratio, factor):
    """What was measured at a ratio."""
    predicted = 2 * ratio**2
    found = {"increase": factor * predicted, "stderr": 0.1 * predicted}
    return {"ratio": ratio, "predicted": predicted, "blocks": 16, **found}
