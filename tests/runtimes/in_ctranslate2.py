"""Run where CTranslate2 is: reads a folder that its converter made, in float32.

Its interface has no cache: what was read is read again with what follows.
"""

import ctranslate2
import numpy as np
from answering import main


class Converted:
    """A converted model."""

    version = f"CTranslate2 {ctranslate2.__version__}"

    def __init__(self, folder):
        options = {"device": "cpu", "compute_type": "float32", "intra_threads": 2}
        self.model = ctranslate2.Generator(folder, **options)

    def start(self):
        """Forget what was read."""
        self.ids = []

    def read(self, ids):
        """Logits of tokens that follow."""
        self.ids += ids
        return np.array(self.model.forward_batch([self.ids]))[0][-len(ids) :]

    def held(self):
        """Bytes of the cache: not known."""
        return 0


if __name__ == "__main__":
    main(Converted)
