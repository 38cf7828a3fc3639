"""A graph of a3 export onnx, fed token by token: what its runtimes share."""

import numpy as np


class Cached:
    """Keeps the cache; the runtime's own class has `inputs` by name, `start` and `results`."""

    def read(self, ids):
        """Logits of tokens that follow."""
        end = self.length + len(ids)
        feed = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.length, end)[None],
        }
        feed = {name: value for name, value in feed.items() if name in self.inputs}
        logits, *past = self.results(feed | self.past)
        self.past = dict(zip(self.past, past, strict=True))
        self.length = end
        return logits[0]

    def held(self):
        """Bytes of the cache."""
        return sum(value.nbytes for value in self.past.values())
