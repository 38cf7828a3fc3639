"""What runtimes make of a3's exports, as far as somebody tried: right, a refusal, or wrong text.

One row a case; of each runtime the first row that fits a model applies. Versions are those that
were tried, in November 2026, on exports of SmolLM2 and of tiny models (docs/export.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from a3.core.files import read_json
from a3.models.arch import is_compressed
from a3.models.stock import Stock

# Which export a runtime reads.
HF, GGUF, ONNX = "hf", "gguf", "onnx"

RIGHT, REFUSES, WRONG, UNTESTED = "right", "refuses", "wrong text", "untested"


@dataclass(frozen=True)
class Facts:
    """What decides what a runtime makes of an export.

    `rope` is the type of its RoPE. `usual` says whether heads have hidden size / heads dimensions,
    `by_layer` whether sizes of MLPs differ between layers, and `older_keys` whether config.json
    has the keys of transformers 4 for RoPE beside those of 5.
    """

    head_dim: int
    rope: str
    usual: bool
    by_layer: bool
    older_keys: bool = True

    @property
    def factors(self) -> bool:
        """Whether each frequency has a divisor of its own: in GGUF files a tensor."""
        return self.rope not in ("default", "linear")


@dataclass(frozen=True)
class Case:
    """Models of which a runtime makes the same, in words and as a test, and why, if not right."""

    words: str
    holds: Callable[[Facts], bool]
    why: str = ""


@dataclass(frozen=True)
class Seen:
    """A runtime of a version, which export it reads, and what it makes of the models of a case.

    `on` says on which models that was tried, where these are few.
    """

    runtime: str
    reads: str
    verdict: str
    case: Case
    on: str = ""

    @property
    def why(self) -> str:
        """The reason, of a refusal or wrong text."""
        return self.case.why if self.verdict in (REFUSES, WRONG) else ""


ALL = Case("all others", lambda facts: True)

ACCEPTED = Case("all families that `a3 export onnx` accepts", lambda facts: True)

LLAMA = "tried on the family llama alone"

NEWER_KEYS = Case(
    "`rope_parameters` alone in config.json",
    lambda facts: not facts.older_keys,
    "it reads rope_theta and rope_scaling alone, and takes its own base for others",
)

UNUSUAL = Case(
    "another head size than hidden size / heads",
    lambda facts: not facts.usual,
    "it takes hidden size / heads as the head size",
)

LONGROPE = Case("`longrope`", lambda facts: facts.rope == "longrope", "it has no longrope")

SCALED = Case(
    "`linear`, `longrope` and other scalings",
    lambda facts: facts.rope not in ("default", "llama3"),
    "its builder drops every scaling of RoPE but llama3",
)

UNEVEN = Case(
    "heads of no multiple of 16",
    lambda facts: facts.head_dim % 16 != 0,
    "its kernels take heads of multiples of 16, and fail at the first token",
)

# Head sizes that vLLM's attention for CPUs has, tried by all multiples of 16 up to 256, and 512.
KERNELS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

OTHER_HEADS = Case(
    f"heads of another size than {', '.join(map(str, KERNELS))}",
    lambda facts: facts.head_dim not in KERNELS,
    "its attention for CPUs has no kernel for them, and fails at the first token",
)

FACTORS = Case(
    "frequencies with factors (`rope_freqs.weight`)",
    lambda facts: facts.factors and not facts.by_layer,
    "it ignores rope_freqs.weight",
)

SEEN = (
    Seen("transformers 5.23", HF, RIGHT, ALL),
    Seen("transformers 4.57", HF, WRONG, NEWER_KEYS),
    Seen("transformers 4.57", HF, RIGHT, ALL),
    Seen("OpenVINO 2026.4 (optimum-intel 2.2)", HF, RIGHT, ALL),
    Seen("ExecuTorch 1.5 (torch.export)", HF, RIGHT, ALL, LLAMA),
    Seen("MLX 0.32", HF, WRONG, NEWER_KEYS),
    Seen("MLX 0.32", HF, RIGHT, ALL, LLAMA),
    Seen("onnxruntime-genai 0.18", HF, WRONG, SCALED),
    Seen("onnxruntime-genai 0.18", HF, REFUSES, UNEVEN),
    Seen("onnxruntime-genai 0.18", HF, RIGHT, ALL, LLAMA),
    Seen("optimum-onnx ORTModel", HF, REFUSES, UNUSUAL),
    Seen("optimum-onnx ORTModel", HF, UNTESTED, ALL),
    Seen("CTranslate2 4.8", HF, REFUSES, LONGROPE),
    Seen("CTranslate2 4.8", HF, REFUSES, UNUSUAL),
    Seen("CTranslate2 4.8", HF, RIGHT, ALL, LLAMA),
    Seen("mistral.rs 0.9", HF, REFUSES, LONGROPE),
    Seen("mistral.rs 0.9", HF, UNTESTED, ALL),
    Seen("vLLM 0.32 on CPUs", HF, REFUSES, OTHER_HEADS),
    Seen("vLLM 0.32 on CPUs", HF, RIGHT, ALL, LLAMA),
    Seen("vLLM on GPUs", HF, UNTESTED, ALL),
    Seen("TGI", HF, UNTESTED, ALL),
    Seen("llama.cpp (xllamacpp 2026.10)", GGUF, RIGHT, ALL),
    Seen("OpenVINO GenAI 2026.4", GGUF, WRONG, FACTORS),
    Seen("OpenVINO GenAI 2026.4", GGUF, UNTESTED, ALL),
    Seen("gpt4all 2.8", GGUF, REFUSES, UNUSUAL),
    Seen("gpt4all 2.8", GGUF, UNTESTED, ALL),
    Seen("ctransformers 0.2", GGUF, REFUSES, UNUSUAL),
    Seen("ctransformers 0.2", GGUF, UNTESTED, ALL),
    Seen("Ollama", GGUF, UNTESTED, ALL),
    Seen("LM Studio", GGUF, UNTESTED, ALL),
    Seen("onnxruntime 1.32", ONNX, RIGHT, ACCEPTED),
    Seen("transformers.js 4.3", ONNX, RIGHT, ACCEPTED, LLAMA),
    Seen("OpenVINO 2026.4", ONNX, RIGHT, ACCEPTED, LLAMA),
)


def facts_of(model: Stock) -> Facts:
    """The facts of a folder, dense or compressed, that has exports."""
    config = model.config
    return Facts(
        head_dim=model.head_dim,
        rope=config.rope_parameters["rope_type"],
        usual=model.head_dim * config.num_attention_heads == config.hidden_size,
        by_layer=len(set(model.mlp_ranks)) > 1,
        older_keys=is_compressed(model.folder) or has_older_keys(model.folder),
    )


def has_older_keys(folder: Path) -> bool:
    """Whether config.json of a dense folder says RoPE as transformers 4 does, all of it."""
    content = read_json(folder / "config.json")
    rope = content.get("rope_parameters") or {}
    scaled = rope.get("rope_type", "default") != "default"
    return "rope_theta" in content and ("rope_scaling" in content or not scaled)


def verdicts(facts: Facts, reads: str) -> list[Seen]:
    """What each runtime that reads this export makes of a model."""
    found: dict[str, Seen] = {}
    for one in SEEN:
        if one.reads == reads and one.case.holds(facts):
            found.setdefault(one.runtime, one)
    return list(found.values())


def said_of(facts: Facts, reads: str) -> list[str]:
    """The verdicts in words, one a line, the runtimes of one verdict and reason together."""
    lines: dict[tuple[str, str], list[str]] = {}
    for one in verdicts(facts, reads):
        name = f"{one.runtime} ({one.on})" if one.on else one.runtime
        lines.setdefault((one.verdict, one.why), []).append(name)
    order = (RIGHT, WRONG, REFUSES, UNTESTED)
    return [
        f"{verdict}: {', '.join(names)}{f' ({why})' if why else ''}"
        for (verdict, why), names in sorted(lines.items(), key=lambda item: order.index(item[0][0]))
    ]


def said_of_graphs() -> list[str]:
    """As `said_of`, of ONNX graphs, which say all sizes and frequencies: no fact decides.

    Whether the export accepts a family is known only once it was tried.
    """
    found = said_of(Facts(head_dim=0, rope="", usual=False, by_layer=True), ONNX)
    return [f"where it accepts the family, {text}" for text in found]


def warnings_of(facts: Facts, reads: str) -> list[str]:
    """Of each runtime that would give wrong text without a message."""
    return [
        f"{one.runtime} gives wrong text without a message: {one.why}"
        for one in verdicts(facts, reads)
        if one.verdict == WRONG
    ]
