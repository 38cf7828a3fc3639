"""Registers compressed models with transformers when transformers is first used."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt


class LazyConfig:
    """Placeholder for the config classes of compressed models, which transformers looks up as "a3".

    The real classes derive from the families' classes, and when transformers registers configs,
    most of its own modules are only partly imported.
    """

    model_type = "a3"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """`PreTrainedConfig.from_dict` of the class for the family that the dictionary names."""
        dense = dense_type(config_dict["a3"])
        config = import_module("a3.models.modeling_a3").classes(dense)["AutoConfig"]
        return config.from_dict(config_dict, **kwargs)


def dense_type(a3: dict[str, Any]) -> str:
    """model_type of the dense model, of the entry of a compressed model's config."""
    return a3.get("wrapper") or a3["family"]


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register(auto: ModuleType) -> None:
    auto.AutoConfig.register(LazyConfig.model_type, LazyConfig)


@wrapt.when_imported("peft.utils.constants")
def _adapt(constants: ModuleType) -> None:
    # A later import of peft finds it here.
    if modeling := sys.modules.get("a3.models.modeling_a3"):
        modeling.adapt_by_default(constants)
