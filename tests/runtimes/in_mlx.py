"""Run where MLX is: reads the folder of a3 export hf, on the CPU, in float32."""

from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from answering import main
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


class Folder:
    """A folder in mlx-lm."""

    version = f"MLX {version('mlx')}"

    def __init__(self, folder):
        mx.set_default_device(mx.cpu)
        self.model, _ = load_model(Path(folder))
        self.model.update(tree_map(lambda x: x.astype(mx.float32), self.model.parameters()))

    def start(self):
        """Empty the cache."""
        self.cache = make_prompt_cache(self.model)

    def read(self, ids):
        """Logits of tokens that follow."""
        logits = self.model(mx.array([ids]), cache=self.cache)
        return np.array(logits[0].astype(mx.float32))

    def held(self):
        """Bytes of the cache of what was read, without what is laid by."""
        return sum(
            x[..., : layer.offset, :].nbytes for layer in self.cache for x in layer.state[:2]
        )


if __name__ == "__main__":
    main(Folder)
