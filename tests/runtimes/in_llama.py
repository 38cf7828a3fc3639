"""Run where llama.cpp is: scores tokens, tokenises texts, continues a chat, measures the KV cache.

python in_llama.py model.gguf asked.json answers.npz
"""

import json
import sys
import time
from importlib.metadata import version

import numpy as np
import xllamacpp
from real_llama import Model


def main(path, asked, out):
    """`asked` has tokens, caches, texts and messages of a chat or none; the answers are arrays."""
    with open(asked) as stream:  # noqa: PTH123
        said = json.load(stream)
    model, answers = Model(path), {}
    for cache in said["caches"]:
        how = {"size": said.get("size", 1024), "calls": said.get("calls", 1)}
        start = time.perf_counter()
        logits, held = model.logits(said["tokens"], cache, **how)
        read = len(said["tokens"]) / (time.perf_counter() - start)
        answers[f"logits_{cache}"], answers[f"cache_{cache}"] = logits, held
    if count := said.get("greedy"):
        start = time.perf_counter()
        answers["greedy"] = np.array(model.greedy(said["tokens"][: said["prompt"]], count))
        answers["speeds"] = np.array([read, count / (time.perf_counter() - start)])
        answers["version"] = np.array(f"llama.cpp (xllamacpp {version('xllamacpp')})")
    surround = said.get("surround", False)
    ids = [model.tokenize(text, surround=surround) for text in said["texts"]]
    answers["ids"] = np.array([number for one in ids for number in [*one, -1]], np.int64)
    model.close()
    if said.get("messages"):
        answers["reply"] = reply(path, said["messages"])
    np.savez(out, **answers)


def reply(path, messages):
    """The likeliest answer in a chat, by llama.cpp's own reading of the chat template."""
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_gpu_layers, params.n_parallel = 1024, 0, 1
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)
    request = {"messages": messages, "max_tokens": 24, "temperature": 0.0}
    answer = server.handle_chat_completions(request)
    return answer["choices"][0]["message"]["content"]


if __name__ == "__main__":
    main(*sys.argv[1:])
