"""a3: training-free low-rank compression of transformer language models.

After `import a3`, `transformers.AutoModelForCausalLM` can load compressed folders. The import takes
milliseconds: transformers and torch are imported only when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import a3.models.registry  # noqa: F401
from a3.core.errors import A3Error

if TYPE_CHECKING:
    from a3.api import allocate, approximate, collect, compress, evaluate, export, heal, load

__all__ = [
    "A3Error",
    "allocate",
    "approximate",
    "collect",
    "compress",
    "evaluate",
    "export",
    "heal",
    "load",
]


def __getattr__(name: str) -> Any:
    """The functions of a3.api, which is imported when the first of them is used."""
    if name in __all__:
        return getattr(import_module("a3.api"), name)
    raise AttributeError(f"module 'a3' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Names that tab completion offers in an interactive Python shell."""
    return sorted(__all__)
