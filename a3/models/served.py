"""What a3's plugin for vLLM serves: compressed models whose layers are Llama's (a3/serve)."""

from typing import Any

# RoPE, MLPs gated with SiLU, two norms and no others.
FAMILIES = ("llama", "mistral", "ministral", "qwen2")

# RoPE types whose tables vLLM computes as transformers does, for all lengths at once.
ROPES = ("default", "linear", "llama3", "yarn")


def obstacles(a3: dict[str, Any], rope: str) -> list[str]:
    """Reasons why the plugin cannot run a model; `a3` is the entry of its config.

    `rope` is the type of its RoPE. The list is empty if it can.
    """
    if a3.get("wrapper"):
        return [f"it is in a {a3['wrapper']}"]
    if a3["family"] not in FAMILIES:
        return [f"it is a {a3['family']}, not one of {', '.join(FAMILIES)}"]
    lacking = {
        "some of its matrices are factored": any(a3["factors"]),
        "it simulates low precision": "quantised" in a3,
        "queries and keys have norms": bool(a3["qk_norm"]),
        "some layers have no RoPE": not a3["rope"] or bool(a3["nope_layers"]),
        "its down projections have a bias": a3["down_bias"],
        f"its RoPE is {rope}, not one of {', '.join(ROPES)}": rope not in ROPES,
    }
    return [reason for reason, holds in lacking.items() if holds]
