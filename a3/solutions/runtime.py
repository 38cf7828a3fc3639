"""What `--for` promises a runtime: sizes that its kernels take, and modes that its code can run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from a3.core.errors import A3Error

# Whose code runs the model: llama.cpp's, the family's own in transformers, that of a3's plugin for
# vLLM, or transformers with a3, which runs every compressed model.
LLAMA_CPP, FAMILY, PLUGIN, ANY = "llama.cpp", "family", "plugin", "any"


@dataclass(frozen=True)
class Runtime:
    """What a runtime, or a type of weights in it, asks of a compressed model's sizes.

    The size of a head is a multiple of `heads`; the inputs and the outputs of each matrix whose
    size changes are multiples of `inputs` and `outputs`. Components in `uniform` have one size in
    all layers. `preset` has modes that the runtime can run, and `code` says whose code runs it;
    `words` say what it is. With `whole`, heads that stay as they are have to be multiples, too.
    """

    words: str
    preset: str
    code: str = ANY
    heads: int = 1
    inputs: int = 1
    outputs: int = 1
    uniform: tuple[str, ...] = ()
    whole: bool = False

    @property
    def one_size(self) -> bool:
        """Whether all heads have one size, QK's and OV's, and keep the same RoPE pairs."""
        return self.code in (LLAMA_CPP, FAMILY)

    @property
    def plain(self) -> bool:
        """Whether it runs a family's matrices only: no factors, no bias that the family lacks."""
        return self.code != ANY

    def step(self, component: str, heads: int, kv_heads: int) -> int:
        """Of what a rank of a component has to be a multiple, in a model of these heads."""
        if component == "mlp":
            return math.lcm(self.inputs, self.outputs)
        # All heads side by side are the outputs of q, k and v, and the inputs of o.
        steps = [self.heads, *(part(self.outputs, of) for of in (heads, kv_heads))]
        return math.lcm(*steps, part(self.inputs, heads) if component == "ov" else 1)

    @property
    def inner(self) -> int:
        """Of what the rank of two factors has to be a multiple: outputs of one, inputs of both."""
        return math.lcm(self.inputs, self.outputs)


RUNTIMES: Mapping[str, Runtime] = {
    "llama.cpp": Runtime(
        "llama.cpp, Ollama, LM Studio (a3 export gguf), any type of weights",
        "a3-stock",
        LLAMA_CPP,
        # Of no multiple of 32 they run, but slower than larger ones (docs/export.md).
        heads=32,
        inputs=32,
    ),
    "llama.cpp-quantised-cache": Runtime(
        "the same, with -ctk q8_0 -ctv q8_0 and the like",
        "a3-stock",
        LLAMA_CPP,
        heads=32,
        inputs=32,
        whole=True,
    ),
    "hf": Runtime(
        "an ordinary checkpoint (a3 export hf): one size in all layers",
        "a3-stock",
        FAMILY,
        heads=4,
        uniform=("mlp",),
    ),
    "vllm": Runtime("vLLM with a3's plugin", "a3-plus", PLUGIN, heads=16, inputs=8, outputs=8),
    "gpu": Runtime("transformers on a GPU", "a3-plus", heads=8, inputs=8, outputs=8),
    "nf4": Runtime("bitsandbytes NF4", "a3-plus", inputs=64, outputs=32),
    "int4": Runtime(
        "4 bits in groups of 128 (GPTQ, AWQ, torchao, Marlin)",
        "a3-plus",
        inputs=128,
        outputs=64,
    ),
}


def part(multiple: int, of: int) -> int:
    """The least n > 0 such that n · of is a multiple."""
    return multiple // math.gcd(multiple, of)


def beside(rank: int, step: int, full: int) -> list[int]:
    """The multiples of a step that are next to a rank, below (none for 0) and above, where the full
    size, which stays as it is, follows the last one.
    """
    below = rank // step * step
    return [*([below] if below else []), min(below + step, full)]


def runtime_named(name: str) -> Runtime:
    """A runtime by the name that --for takes; raises A3Error for others."""
    if name not in RUNTIMES:
        raise A3Error(f"runtime is {name!r}; expected one of {', '.join(RUNTIMES)}.")
    return RUNTIMES[name]
