"""Run by llama_cpp.py where llama.cpp is: seconds of prompts and of tokens, files in turn.

python in_llama.py asked.json answers.json
"""

import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/runtimes"))

import numpy as np
from real_llama import LIB, Model


class Timed(Model):
    """A GGUF file in llama.cpp, which computes the logits of the last token of a call only."""

    def seconds(self, ids, new):
        """Of a prompt in one call, and of `new` tokens one by one after it."""
        # A cache of float16 and no flash attention, as real_llama has them.
        context = self.context("f16", flash=False, size=len(ids) + new)
        start = time.perf_counter()
        self.last(context, ids, 0)
        read = time.perf_counter()
        for place in range(len(ids), len(ids) + new):
            self.last(context, ids[:1], place)
        done = time.perf_counter()
        LIB.llama_free(context)
        return read - start, done - read

    def last(self, context, ids, start):
        """Read tokens that stand from `start` on."""
        batch = LIB.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, number in enumerate(ids):
            batch.token[i], batch.pos[i] = number, start + i
            batch.logits[i] = i == len(ids) - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert LIB.llama_decode(context, batch) == 0
        LIB.llama_get_logits(context)  # waits until they are there
        LIB.llama_batch_free(batch)


def main(asked, out):
    """Every repeat has all files, in another order each time; the first repeat warms up."""
    said = json.loads(Path(asked).read_text())
    draw = np.random.default_rng(0)
    models = {path: Timed(path) for path in said["files"]}
    found = {path: [] for path in models}
    for repeat in range(said["repeats"] + 1):
        for path in draw.permutation(said["files"]):
            model = models[str(path)]
            ids = draw.integers(10, model.tokens, said["prompt"]).tolist()
            times = model.seconds(ids, said["new"])
            if repeat:
                found[str(path)].append(times)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
