"""a3: training-free low-rank compression of transformer language models.

`import a3` lets `transformers.AutoModelForCausalLM` load compressed folders, and costs
milliseconds: nothing of transformers or torch is imported before it is used.
"""

import a3.models.registry  # noqa: F401
