"""Model folders by transformers: a3 never runs code that comes with a model, nor unpickles."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from a3.errors import A3Error
from a3.models.families import FAMILIES


def load_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder; raises A3Error as `loaded` does."""
    return loaded(AutoConfig.from_pretrained, folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; raises A3Error as `loaded` does."""
    return loaded(AutoTokenizer.from_pretrained, folder)


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The model of a folder, in a dtype, ready to run; raises A3Error as `loaded` does."""
    options = {"dtype": getattr(torch, dtype), "use_safetensors": True}
    return loaded(AutoModelForCausalLM.from_pretrained, folder, **options).eval()


def require_positions(folder: Path, block_length: int) -> None:
    """Raise A3Error where blocks are longer than the model, dense or compressed, has positions."""
    config = load_config(folder)
    name = config.a3["family"] if hasattr(config, "a3") else config.model_type
    key = FAMILIES[name].positions if name in FAMILIES else None
    if key is not None and block_length > getattr(config, key):
        raise A3Error(
            f"{folder / 'config.json'}: {key} is {getattr(config, key)}, and block_length is "
            f"{block_length}: the model has no positions for so many tokens. Lower block_length "
            f"to {getattr(config, key)}."
        )


def loaded(load: Callable, folder: Path, **options: Any) -> Any:
    """What transformers loads from a folder; A3Error where that is refused, as for remote code."""
    # Left out, trust_remote_code makes transformers ask at the terminal.
    try:
        return load(folder, trust_remote_code=False, local_files_only=True, **options)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise A3Error(
            f"{folder}: transformers cannot load it: {reason} a3 runs no code that comes with a "
            "model (trust_remote_code stays off). Take a model of a family that transformers has."
        ) from error
