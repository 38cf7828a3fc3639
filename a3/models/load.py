"""Strict loading: missing tensors are errors, and code that comes with a model never runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from a3.core.dtypes import WIDTHS
from a3.core.errors import A3Error
from a3.core.files import read_json
from a3.core.memory import require_memory
from a3.models.built import empty_model, position_key, with_trunk
from a3.models.checkpoint import Checkpoint
from a3.models.families import BACKBONES, FAMILIES, family_of
from a3.models.readable import end_tokens, refuse_adapter
from a3.models.stored import in_memory
from a3.models.wrappers import auto_class, text_of, wrapper_in

# Keys of config.json about how a model runs; a3 decides these itself.
PLAIN = {
    "_attn_implementation": None,
    "_experts_implementation": None,
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
}


def load_config(folder: Path, **options: Any) -> PreTrainedConfig:
    """The config of a folder; raises A3Error if it cannot be read."""
    return loaded(AutoConfig, folder, **options)


def load_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; raises A3Error if it cannot be read."""
    # Otherwise the class would depend on whether mistral-common is installed.
    return loaded(AutoTokenizer, folder, mistral_format=False, **options)


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The model of a dense or compressed folder; every recorded file is checked against its hash.

    The model generates greedily. `generate` would read options that its caller omits from
    generation_config.json, so only the end-of-text tokens of that file are kept. Raises A3Error if
    the weights do not fit in the available memory, a file has changed, transformers cannot read it,
    or a tensor is missing.
    """
    checkpoint = Checkpoint(folder)
    needed = count_parameters(folder) * WIDTHS[dtype]
    require_memory(needed, f"{folder}: in {dtype} it", "Take a dtype of fewer bytes")
    checkpoint.verify_all()
    greedy = GenerationConfig(eos_token_id=end_tokens(folder))
    return load_whole(folder, dtype=getattr(torch, dtype), generation_config=greedy).eval()


def load_whole(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a model without missing tensors; raises A3Error as `load_model` does.

    transformers only warns about a missing tensor, and initialises it at random.
    """
    # If peft is installed, transformers would load the adapter's base model instead of this one.
    refuse_adapter(folder)
    # Without weights, tensors of another shape cost nothing; the error below names them.
    meta = options.get("device_map") == "meta"
    wanted = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": meta}
    try:
        model, info = loaded(auto_in(folder), folder, **options | PLAIN | wanted)
    except A3Error:
        if not meta:
            load_whole(folder, device_map="meta")
        raise
    other_shape = [name for name, *_ in info["mismatched_keys"]]
    if lost := sorted(map(str, [*info["missing_keys"], *other_shape])):
        instead = ". Fetch or build it again."
        if info["missing_keys"]:
            instead = Checkpoint(folder).instead(min(info["missing_keys"]))
        raise A3Error(
            f"{folder}: no tensor of the expected shape for "
            f"{', '.join(lost[:4])}{' …' if len(lost) > 4 else ''}{instead}"
        )
    return with_trunk(model)


def auto_in(folder: Path) -> Any:
    """The auto class that loads the model of a folder, dense or compressed."""
    return auto_class(wrapper_in(read_json(folder / "config.json")))


def number_of_parameters(model: nn.Module) -> int:
    """Weights of a model; one that several modules share counts once, and buffers do not."""
    return sum(weight.numel() for weight in model.parameters())


def count_parameters(folder: Path) -> int:
    """Parameters of the model, dense or compressed, that transformers loads from a folder.

    Raises A3Error for a config from which transformers cannot build a model.
    """
    config = load_config(folder)
    with readable(folder, "AutoModelForCausalLM"):
        model = empty_model(config)
    return parameters_of(Checkpoint(folder, model.base_model_prefix), model)


def parameters_of(checkpoint: Checkpoint, model: PreTrainedModel) -> int:
    """Parameters of a model, which may be empty, with the weights of a checkpoint.

    This is not the count of all numbers in its files: masks, frequencies and layers beyond the
    config's are not parameters, and a stored copy of a tied head counts as the embedding. A head
    that differs from the embedding counts separately, whatever the config says.
    """
    untied = [
        target
        for target, source in model.all_tied_weights_keys.items()
        if {target, source} <= set(checkpoint.names()) and not checkpoint.equal(target, source)
    ]
    return number_of_parameters(model) + sum(model.get_parameter(name).numel() for name in untied)


def tensors_of_model(folder: Path) -> frozenset[str]:
    """Names of the tensors that transformers loads for the model of a dense folder.

    They are those in memory, and what a `Checkpoint` calls stored ones that are only a part of one.
    """
    return _tensors_by_config(folder, (folder / "config.json").read_bytes())


@lru_cache(maxsize=16)
def _tensors_by_config(folder: Path, config: bytes) -> frozenset[str]:
    """`tensors_of_model`, once in a process for a config's content: every shard asks for it."""
    model = empty_model(load_config(folder))
    inside = model.state_dict()
    stored = tuple(revert_weight_conversion(model, inside))
    return frozenset(inside) | frozenset(in_memory(folder, stored).names.values())


def require_positions(folder: Path, tokens: int, said: str = "block_length") -> None:
    """Raise A3Error if a model, dense or compressed, has fewer positions than `tokens`.

    `said` is the user's name for this number.
    """
    config = load_config(folder)
    text = text_of(config)
    name = config.a3["family"] if hasattr(config, "a3") else text.model_type
    if hasattr(config, "a3") and config.a3["structure"]:
        key = config.a3["structure"]["positions"]
    elif name in FAMILIES | BACKBONES:
        key = family_of(name, None).positions
    else:
        key = position_key(empty_model(config), config.get_text_config())
    if key is not None and tokens > getattr(text, key):
        raise A3Error(
            f"{folder / 'config.json'}: {key} is {getattr(text, key)}, and {said} is {tokens}: "
            f"the model has too few positions. Lower {said} to "
            f"{getattr(text, key)}."
        )


def loaded(of: Any, folder: Path, **options: Any) -> Any:
    """`from_pretrained` of an auto class; every failure, also remote code, raises A3Error."""
    with readable(folder / options.get("gguf_file", ""), of.__name__):
        # Without trust_remote_code=False, transformers would ask at the terminal.
        return of.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)


@contextmanager
def readable(path: Path, reader: str) -> Iterator[None]:
    """Raise A3Error for every failure while transformers' `reader` reads `path`."""
    try:
        yield
    # The libraries raise exceptions of any type for files that they cannot read.
    except Exception as error:
        raise A3Error(
            f"{path}: {reader} of transformers cannot read "
            f"it ({type(error).__name__}: {str(error).strip()}). Fetch or build it again. "
            "a3 runs no code that comes with a model: it has to be of a family that transformers "
            "has."
        ) from error
