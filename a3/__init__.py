"""a3: training-free low-rank compression of transformer language models.

`import a3` lets `transformers.AutoModelForCausalLM` load compressed folders, and costs
milliseconds: nothing of transformers or torch is imported before it is used.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt


class LazyConfig:
    """Stands for the compressed models' configuration until transformers first asks for one.

    The real classes derive from the families', and at the moment when transformers registers
    configurations most of its own modules are still half imported.
    """

    model_type = "a3-llama"

    @staticmethod
    def _real() -> Any:
        return import_module("a3.models.compressed").A3LlamaConfig

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An instance of the real class."""
        return cls._real()(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """`PreTrainedConfig.from_dict` of the real class."""
        return cls._real().from_dict(*args, **kwargs)


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register(auto: ModuleType) -> None:
    auto.AutoConfig.register(LazyConfig.model_type, LazyConfig)
