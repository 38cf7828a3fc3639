"""Converts RoPE of a GGUF file to transformers' parameters, with the same angles.

llama.cpp divides the frequencies by a list of factors, which is a tensor in the file, and by
`rope.scaling.factor`. For YaRN a file has only the factor; for LongRoPE it has one list for short
texts and one for long ones.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from a3.core.errors import A3Error
from a3.models.gguf import Gguf

FACTORS = "rope_freqs.weight"

SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"

TENSORS = (FACTORS, SHORT, LONG)

# Keys of an architecture that `rope_parameters` reads.
KEYS = (
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)

# YaRN's values that llama.cpp uses for most architectures, independent of the file.
BETAS = {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}

TYPES = ("none", "linear", "yarn", "longrope")

# Llama 3's parameters; files hold only the resulting factors.
LOW, HIGH = 1.0, 4.0

ORIGINAL = [2**k for k in range(5, 18)]


def rope_parameters(file: Gguf, rotated: int) -> dict[str, Any]:
    """RoPE parameters that rotate `rotated` dimensions of a head as llama.cpp does.

    Raises A3Error for factors of another size, and for scalings that llama.cpp's code of the
    architecture does not combine.
    """
    kind, theta = file.own("rope.scaling.type", "linear"), file.own("rope.freq_base", 10000.0)
    factor = file.own("rope.scaling.factor", file.own("rope.scale_linear", 0.0)) or 1.0
    found = [name for name in TENSORS if name in file.tensors]
    wanted = [SHORT, LONG] if kind == "longrope" else [FACTORS]
    if kind not in TYPES or (found and found != wanted) or (kind == "yarn" and found):
        raise A3Error(
            f"{file.path}: rope.scaling.type is {kind!r}, with {', '.join(found) or 'no factors'}: "
            "a3 does not support such RoPE. Name the folder in Hugging Face's layout instead."
        )
    lists = [factors(file, name, rotated) for name in found]
    base = {"rope_theta": float(theta)}
    original = file.own("rope.scaling.original_context_length", file.needed("context_length"))
    scale = float(file.own("rope.scaling.attn_factor", 1.0))
    if kind == "yarn":
        return base | yarn(file, factor, original, scale)
    if kind == "none":
        factor = 1.0
    lists = [factor * one for one in lists or [torch.ones(rotated // 2, dtype=torch.float64)]]
    if len(lists) == 1 and scale == 1:
        return base | simplest(lists[0], base["rope_theta"], original)
    return base | longrope(lists[0], lists[-1], original, scale)


def factors(file: Gguf, name: str, rotated: int) -> Tensor:
    """A list of factors, (rotated / 2,) float64."""
    value = file.tensor(name).double()
    if value.shape != (rotated // 2,) or (value <= 0).any():
        raise A3Error(
            f"{file.path}: {name} has the shape {tuple(value.shape)} or numbers that are not above "
            f"0, expected {rotated // 2} that are. Fetch it again."
        )
    return value


def yarn(file: Gguf, factor: float, original: int, scale: float) -> dict[str, Any]:
    """YaRN; llama.cpp's own factor on queries and keys is multiplied by that of the file."""
    found = {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": original,
        "beta_fast": BETAS["rope.scaling.yarn_beta_fast"],
        "beta_slow": BETAS["rope.scaling.yarn_beta_slow"],
    }
    if scale != 1:
        own = 0.1 * float(torch.tensor(factor).log()) + 1 if factor > 1 else 1.0
        found["attention_factor"] = own * scale
    return found


def simplest(divisors: Tensor, theta: float, length: int) -> dict[str, Any]:
    """The simplest known RoPE type with frequencies divided by `divisors`, (rotated / 2,)."""
    rotated = 2 * len(divisors)
    if same(divisors, torch.ones_like(divisors)):
        return {"rope_type": "default"}
    if same(divisors, divisors[:1].expand_as(divisors)):
        return {"rope_type": "linear", "factor": float(divisors[0])}
    plain = theta ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    for original in ORIGINAL:
        found = {
            "rope_type": "llama3",
            "factor": float(divisors[-1]),
            "low_freq_factor": LOW,
            "high_freq_factor": HIGH,
            "original_max_position_embeddings": original,
        }
        config = LlamaConfig(
            head_dim=rotated,
            max_position_embeddings=2 * ORIGINAL[-1],
            rope_parameters={"rope_theta": theta} | found,
        )
        frequencies = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
        if same(plain / frequencies.double(), divisors):
            return found
    return longrope(divisors, divisors, length, 1.0)


def longrope(short: Tensor, long: Tensor, original: int, scale: float) -> dict[str, Any]:
    """A list of factors for texts up to `original` tokens, one for longer ones."""
    return {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "factor": 1.0,
        "attention_factor": scale,
        "original_max_position_embeddings": original,
    }


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two lists of factors are equal up to float32 rounding."""
    return torch.allclose(one, other, rtol=2e-6, atol=0)
