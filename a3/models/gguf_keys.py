"""The expected value of each key in a GGUF header; no key is read without this check."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from a3.core.errors import A3Error

TEMPLATE = "tokenizer.chat_template"

# Each named template becomes a file with that name.
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class Expected:
    """What a value has to be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def integer(value: Any) -> bool:
    """Whether a value is an integer and not a bool."""
    return type(value) is int


def finite(value: Any) -> bool:
    """Whether a value is a finite number and not a bool."""
    return type(value) in (int, float) and isfinite(value)


def text(value: Any) -> bool:
    """Whether a value is text."""
    return isinstance(value, str)


def list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A test of a list by that of each item."""
    return lambda value: isinstance(value, list) and all(map(holds, value))


# llama.cpp reads them in 32 bits.
MOST = 2**32 - 1

COUNT = Expected(
    "a whole number above 0, of 32 bits", lambda value: integer(value) and 0 < value <= MOST
)
WHOLE = Expected(
    "a whole number, 0 or above, of 32 bits", lambda value: integer(value) and 0 <= value <= MOST
)
POSITIVE = Expected("a finite number above 0", lambda value: finite(value) and value > 0)
NOT_NEGATIVE = Expected("a finite number, 0 or above", lambda value: finite(value) and value >= 0)
BOOL = Expected("true or false", lambda value: isinstance(value, bool))
TEXT = Expected("text", text)
TEXTS = Expected("a list of text", list_of(text))
INTEGERS = Expected("a list of whole numbers", list_of(integer))
NUMBERS = Expected("a list of finite numbers", list_of(finite))

# Of the file and its tokenizer.
FILE = {
    "general.architecture": TEXT,
    "general.type": TEXT,
    "general.alignment": COUNT,
    "split.count": WHOLE,
    "split.no": WHOLE,
    "tokenizer.ggml.model": TEXT,
    "tokenizer.ggml.pre": TEXT,
    "tokenizer.ggml.tokens": TEXTS,
    "tokenizer.ggml.merges": TEXTS,
    "tokenizer.ggml.scores": NUMBERS,
    "tokenizer.ggml.token_type": INTEGERS,
    "tokenizer.ggml.bos_token_id": WHOLE,
    "tokenizer.ggml.eos_token_id": WHOLE,
    "tokenizer.ggml.unknown_token_id": WHOLE,
    "tokenizer.ggml.padding_token_id": WHOLE,
    "tokenizer.ggml.add_bos_token": BOOL,
    "tokenizer.ggml.add_eos_token": BOOL,
    "tokenizer.ggml.add_space_prefix": BOOL,
    "tokenizer.chat_templates": TEXTS,
    TEMPLATE: TEXT,
}

# Of its architecture, by names without it.
OWN = {
    "vocab_size": COUNT,
    "context_length": COUNT,
    "embedding_length": COUNT,
    "block_count": COUNT,
    "feed_forward_length": COUNT,
    "attention.head_count": COUNT,
    "attention.head_count_kv": COUNT,
    "attention.key_length": COUNT,
    "attention.value_length": COUNT,
    "attention.causal": BOOL,
    # llama.cpp reads 0 as the default.
    "attention.scale": NOT_NEGATIVE,
    "attention.layer_norm_epsilon": POSITIVE,
    "attention.layer_norm_rms_epsilon": POSITIVE,
    "attention.sliding_window": WHOLE,
    "attn_logit_softcapping": POSITIVE,
    "final_logit_softcapping": NOT_NEGATIVE,
    "expert_count": WHOLE,
    "expert_used_count": WHOLE,
    "expert_feed_forward_length": COUNT,
    "rope.dimension_count": COUNT,
    "rope.freq_base": POSITIVE,
    "rope.freq_base_swa": POSITIVE,
    "rope.scaling.type": TEXT,
    # llama.cpp reads 0 as no scaling.
    "rope.scaling.factor": NOT_NEGATIVE,
    "rope.scale_linear": NOT_NEGATIVE,
    "rope.scaling.attn_factor": POSITIVE,
    "rope.scaling.original_context_length": COUNT,
    "rope.scaling.finetuned": BOOL,
    "rope.scaling.yarn_beta_fast": POSITIVE,
    "rope.scaling.yarn_beta_slow": POSITIVE,
    "nextn_predict_layers": WHOLE,
    "use_parallel_residual": BOOL,
}


def checked(path: Path, key: str, value: Any, expected: Expected) -> Any:
    """A value of a key; raises A3Error if it is not as expected."""
    if not expected.holds(value):
        raise A3Error(
            f"{path}: {key} is {repr(value)[:60]}, expected {expected.words}. Fetch the file "
            "again, or name the folder in Hugging Face's layout instead."
        )
    return value


def template_name(path: Path, name: str) -> str:
    """The name of a chat template; raises A3Error for one that could not be a file's name."""
    if not NAME.fullmatch(name):
        raise A3Error(
            f"{path}: the chat template {name!r} cannot be the name of a file; expected letters, "
            "digits, '_', '-' and '.', no '.' first. Give it another name."
        )
    return name
