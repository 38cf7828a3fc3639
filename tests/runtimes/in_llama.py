"""Run in the environment of llama.cpp: scores tokens, continues a chat, measures the KV cache.

python in_llama.py model.gguf asked.json answers.npz
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np

F32 = 0


def main(model, asked, out):
    """`asked` has tokens, text to tokenise, messages of a chat; the answers are arrays."""
    with open(asked) as stream:  # noqa: PTH123
        said = json.load(stream)
    answers = {}
    # A cache of float32, so that only the arithmetic differs, and llama.cpp's own of float16.
    for kind, types in (("f32", {"type_k": F32, "type_v": F32}), ("f16", {})):
        llama = llama_cpp.Llama(
            model, n_ctx=1024, n_batch=512, logits_all=True, verbose=False, n_threads=2, **types
        )
        llama.eval(said["tokens"])
        answers[f"logits_{kind}"] = llama.scores[: len(said["tokens"])].copy()
        size = llama_cpp.llama_state_seq_get_size(llama._ctx.ctx, ctypes.c_int32(0))
        answers[f"cache_{kind}"] = size
    answers["ids"] = llama.tokenize(said["text"].encode(), add_bos=False, special=True)
    reply = llama.create_chat_completion(said["messages"], max_tokens=24, temperature=0.0)
    answers["reply"] = reply["choices"][0]["message"]["content"]
    np.savez(out, **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
