"""Loading what transformers reads itself, so that nothing it forgives goes unseen."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from a3.errors import A3Error
from a3.models.checkpoint import Checkpoint


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The model of a dense or compressed folder, every recorded file of it held to its hash.

    Raises A3Error where a file changed, transformers cannot read it, or a tensor is missing.
    """
    Checkpoint(folder).verify_all()
    return load_whole(folder, folder, dtype=getattr(torch, dtype))


def load_whole(name: Path, folder: Path, **options: Any) -> PreTrainedModel:
    """`from_pretrained`, but an A3Error that starts with `name` for all that goes wrong.

    transformers only warns of a tensor that is missing, and makes one up at random.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **options
        )
    # What transformers says of files that it cannot read is of any type.
    except Exception as error:
        raise A3Error(
            f"{name}: cannot be read as a model ({type(error).__name__}: {error}). Fetch or build "
            "it again."
        ) from error
    if lost := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise A3Error(
            f"{name}: no tensor of the expected shape for {', '.join(lost[:4])}"
            f"{' …' if len(lost) > 4 else ''}. Fetch or build it again."
        )
    return model
