"""The questions of the tests, asked of a runtime in its own environment, which has numpy alone.

A runtime is a class: `start()` empties the cache, `read(ids)` returns the logits (tokens,
vocabulary) of tokens that follow what was read, `held()` the bytes of its cache, and `version` is
its name with a version.
"""

import json
import sys
import time

import numpy as np


def main(runtime):
    """python in_….py FOLDER asked.json answers.npz"""
    folder, asked, out = sys.argv[1:]
    with open(asked) as stream:  # noqa: PTH123
        said = json.load(stream)
    np.savez(out, **answers(runtime(folder), said))


def answers(model, said):
    """Logits of `tokens`, read at once and in two calls, `greedy` tokens after `prompt` of them."""
    tokens, prompt = said["tokens"], said["tokens"][: said["prompt"]]
    model.start()
    model.read(tokens[:8])  # some runtimes compile at the first call
    model.start()
    start = time.perf_counter()
    at_once = model.read(tokens)
    read = time.perf_counter() - start
    held = model.held()
    model.start()
    half = len(tokens) // 2
    in_two = np.concatenate([model.read(tokens[:half]), model.read(tokens[half:])])
    model.start()
    made = [int(model.read(prompt)[-1].argmax())]
    start = time.perf_counter()
    while len(made) < said["greedy"]:
        made.append(int(model.read(made[-1:])[-1].argmax()))
    decoded = time.perf_counter() - start
    return {
        "version": np.array(model.version),
        "logits": at_once,
        "in_two": np.abs(in_two - at_once).max(),
        "greedy": np.array(made),
        "held": np.array(held),
        "speeds": np.array([len(tokens) / read, (len(made) - 1) / decoded]),
    }
