"""Strict loading: missing tensors are errors, and no code of a model is run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from a3.core.dtypes import WIDTHS
from a3.core.errors import A3Error
from a3.core.memory import require_memory
from a3.models.built import empty_model
from a3.models.checkpoint import Checkpoint
from a3.models.families import FAMILIES
from a3.models.readable import end_tokens, refuse_adapter

# What a config.json may say of how a model is run, and a3 decides.
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
    # Else the class would depend on whether mistral-common is installed.
    return loaded(AutoTokenizer, folder, mistral_format=False, **options)


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The model of a dense or compressed folder, every recorded file of it held to its hash.

    It generates greedily: `generate` would take every option that its caller leaves out from
    generation_config.json, so nothing of that file is kept but the end of a text.
    Raises A3Error if its weights do not fit the memory at hand, a file changed, transformers
    cannot read it, or a tensor is missing.
    """
    checkpoint = Checkpoint(folder)
    needed = count_parameters(folder) * WIDTHS[dtype]
    require_memory(needed, f"{folder}: in {dtype} it", "Take a dtype of fewer bytes")
    checkpoint.verify_all()
    greedy = GenerationConfig(eos_token_id=end_tokens(folder))
    return load_whole(folder, dtype=getattr(torch, dtype), generation_config=greedy).eval()


def load_whole(folder: Path, **options: Any) -> PreTrainedModel:
    """A model of which no tensor is missing; raises A3Error as `load_model` does.

    transformers only warns of a tensor that is missing, and makes one up at random.
    """
    # Where peft is installed, transformers would load the adapter's model in place of this one.
    refuse_adapter(folder)
    # Without weights, tensors of another shape cost nothing and are named below.
    meta = options.get("device_map") == "meta"
    wanted = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": meta}
    try:
        model, info = loaded(AutoModelForCausalLM, folder, **options | PLAIN | wanted)
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
    return model


def number_of_parameters(model: nn.Module) -> int:
    """Weights of a model; one that several modules share counts once, and buffers do not."""
    return sum(weight.numel() for weight in model.parameters())


def count_parameters(folder: Path) -> int:
    """Parameters of the model, dense or compressed, that transformers loads from a folder.

    Raises A3Error for a config of which transformers makes no model.
    """
    config = load_config(folder)
    with readable(folder, "AutoModelForCausalLM"):
        model = empty_model(config)
    return parameters_of(Checkpoint(folder, model.base_model_prefix), model)


def parameters_of(checkpoint: Checkpoint, model: PreTrainedModel) -> int:
    """Parameters of a model, which may be empty, with the weights of a checkpoint.

    Not all numbers that its files hold: masks, frequencies and layers beyond those of the config
    are no parameters, and a tied head that is stored once more is the embedding still. One that
    differs from the embedding is a head of its own, whatever the config says.
    """
    untied = [
        target
        for target, source in model.all_tied_weights_keys.items()
        if {target, source} <= set(checkpoint.names()) and not checkpoint.equal(target, source)
    ]
    return number_of_parameters(model) + sum(model.get_parameter(name).numel() for name in untied)


def tensors_of_model(folder: Path) -> frozenset[str]:
    """Names of the tensors that transformers loads for the model of a dense folder.

    Those that they have in memory, and those in files of families that call them otherwise there.
    """
    model = empty_model(load_config(folder))
    inside = model.state_dict()
    return frozenset(inside) | frozenset(revert_weight_conversion(model, inside))


def require_positions(folder: Path, tokens: int, said: str = "block_length") -> None:
    """Raise A3Error if a model, dense or compressed, has positions for fewer `tokens`.

    `said` is what the user calls their number.
    """
    config = load_config(folder)
    name = config.a3["family"] if hasattr(config, "a3") else config.model_type
    key = FAMILIES[name].positions if name in FAMILIES else None
    if key is not None and tokens > getattr(config, key):
        raise A3Error(
            f"{folder / 'config.json'}: {key} is {getattr(config, key)}, and {said} is {tokens}: "
            f"the model has too few positions. Lower {said} to "
            f"{getattr(config, key)}."
        )


def loaded(of: Any, folder: Path, **options: Any) -> Any:
    """`from_pretrained` of an auto class; A3Error for all that goes wrong, remote code among it."""
    with readable(folder / options.get("gguf_file", ""), of.__name__):
        # Left out, trust_remote_code makes transformers ask at the terminal.
        return of.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)


@contextmanager
def readable(path: Path, reader: str) -> Iterator[None]:
    """Raise A3Error for all that goes wrong where transformers' `reader` reads `path`."""
    try:
        yield
    # What the libraries say of files that they cannot read is of any type.
    except Exception as error:
        raise A3Error(
            f"{path}: {reader} of transformers cannot read "
            f"it ({type(error).__name__}: {str(error).strip()}). Fetch or build it again. "
            "a3 runs no code that comes with a model: it has to be of a family that transformers "
            "has."
        ) from error
