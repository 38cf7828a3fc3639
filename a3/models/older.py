"""RoPE's keys of config.json as transformers 4, and runtimes built on it, look for them.

They ignore `rope_parameters`, the key of transformers 5, and would silently rotate by angles of
their defaults (MLX 0.32, onnxruntime-genai 0.18 and transformers 4.57 do). So a3 writes both.
"""

from typing import Any

# Layer types that have a RoPE of their own; the second one's base has a key of its own.
MAIN, LOCAL = "full_attention", "sliding_attention"


def older_rope(content: dict[str, Any]) -> dict[str, Any]:
    """The older keys of a config.json with `rope_parameters`; empty for a model without RoPE."""
    rope = content.get("rope_parameters") or {}
    local = {"rope_local_base_freq": rope[LOCAL]["rope_theta"]} if LOCAL in rope else {}
    rope = rope.get(MAIN, rope)
    if "rope_theta" not in rope:
        return {}
    partial = {name: rope[name] for name in ("partial_rotary_factor",) if name in rope}
    scaling = {} if rope.get("rope_type", "default") == "default" else {"rope_scaling": rope}
    return {"rope_theta": rope["rope_theta"], **partial, **local, **scaling}
