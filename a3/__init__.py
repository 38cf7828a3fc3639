"""a3: training-free low-rank compression of transformer language models.

`import a3` lets `transformers.AutoModelForCausalLM` load compressed folders, and costs
milliseconds: nothing of transformers or torch is imported before it is used.
"""

import sys
from types import ModuleType

import wrapt


@wrapt.when_imported("peft.utils.constants")
def _adapt(constants: ModuleType) -> None:
    # Whoever imports it later finds peft there.
    if modeling := sys.modules.get("a3.models.modeling_a3"):
        modeling.adapt_by_default(constants)


import a3.models.registry  # noqa: F401
