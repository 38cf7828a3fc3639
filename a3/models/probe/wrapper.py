"""Tries models of several modalities: their language model compressed in place, the rest kept.

A tiny random model of a type is compressed at random and compared with the dense one, as in
a3.models.probe.trial, by its own code and without images: a language model gets an image as inputs
of its first layer (or of several), and does not know it from text.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from a3.core.errors import A3Error
from a3.models.probe.tiny import tiny_config, tiny_content, tiny_model
from a3.models.probe.trial import Trial
from a3.models.quiet import quiet
from a3.models.shape import Arch
from a3.models.wrappers import REFUSED_WRAPPERS, WRAPPERS


class WrapperTrial(Trial):
    """A trial of a model whose structure is that of its language model's type.

    `describe` is that of a3.models.arch.
    """

    describe: Callable[[Path], Arch]

    def arch(self, structure: dict[str, Any]) -> Arch:
        """As in Trial; nothing is proposed."""
        return self.describe(self.folder / "dense")


def wrapper_row(model_type: str, describe: Callable[[Path], Arch]) -> dict[str, str]:
    """The row of a type in the table of models of several modalities.

    `text` is the type of the language model in the default config, "" where there is none; `why`
    says why a3 does not support it, "" if it does. Raises A3Error if a tiny model refutes that.
    """
    try:
        text = CONFIG_MAPPING[model_type]().get_text_config().model_type
    # Defaults of some types contradict each other.
    except Exception:
        text = ""
    if model_type in WRAPPERS and (said := refuted(model_type, describe)):
        raise A3Error(f"a tiny {model_type}: {said}. Refuse it in a3/models/wrappers.py.")
    why = "" if model_type in WRAPPERS else REFUSED_WRAPPERS[model_type]
    return {"text": "" if text == model_type else text, "why": why}


def refuted(model_type: str, describe: Callable[[Path], Arch]) -> str | None:
    """What a compressed tiny wrapper of the default config does otherwise; None if nothing."""
    with torch.random.fork_rng(devices=[]), quiet(), tempfile.TemporaryDirectory() as folder:
        config = tiny_config(model_type, tiny_content(model_type))
        trial = WrapperTrial(tiny_model(config), config, Path(folder), positions=False)
        trial.describe = describe
        return trial.refutes({})
