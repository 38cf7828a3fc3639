"""A graph of a decoder, fed token by token: what its runtimes share."""

import numpy as np


def feed_of(ids, start):
    """Inputs for tokens from position `start` on, by name."""
    end = start + len(ids)
    return {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, end), np.int64),
        "position_ids": np.arange(start, end)[None],
    }


class Cached:
    """A graph of a3 export onnx with its cache.

    The runtime's own class has `inputs` by name, `start` and `results`.
    """

    def read(self, ids):
        """Logits of tokens that follow."""
        feed = feed_of(ids, self.length)
        feed = {name: value for name, value in feed.items() if name in self.inputs}
        logits, *past = self.results(feed | self.past)
        self.past = dict(zip(self.past, past, strict=True))
        self.length += len(ids)
        return logits[0]

    def held(self):
        """Bytes of the cache."""
        return sum(value.nbytes for value in self.past.values())
