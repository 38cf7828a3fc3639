"""How byte-level BPE splits text into words, for llama.cpp's names (`tokenizer.ggml.pre`).

llama.cpp has built-in rules for each name. The rules here come from the tokenizer.json that a name
stands for, and were compared with llama.cpp on texts in many scripts. There are two differences:
llama.cpp does not compose characters, and for `tekken` and `gpt-4o` it distinguishes upper and
lower case only in ASCII.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

GPT2, BYTES, DIGITS = "bytes with GPT-2's words", "bytes", "single digits"

SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"

SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES

UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")

SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES

PUNCTUATED = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES
)

NO_STOPS = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class Rules:
    """What cuts words, whether words of the vocabulary are taken without merges, whether text is
    composed (NFC) before, which llama.cpp never does, and whether BOS comes first by default."""

    steps: tuple[str, ...]
    whole: bool = False
    composed: bool = False
    bos: bool = False


LLAMA3 = (rf"{SUFFIX}|{WORD}|\p{{N}}{{1,3}}|{OTHERS}", BYTES)

QWEN2 = (rf"{SUFFIX}|{WORD}|\p{{N}}|{OTHERS}", BYTES)

QWEN35 = (
    rf"{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}",
    BYTES,
)

TEKKEN = (rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{SLASHED}", BYTES)

GPT4O = (rf"{CASED[0]}{SUFFIX}?|{CASED[1]}{SUFFIX}?|\p{{N}}{{1,3}}|{SLASHED}", BYTES)

DEEPSEEK3 = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", PUNCTUATED, BYTES)

SEED = (
    rf"{SUFFIX}|{WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",
    BYTES,
)

# If several names have equal rules, exports write the first one.
RULES = {
    "gpt-2": Rules((GPT2,)),
    "olmo": Rules((GPT2,), composed=True),
    "smollm": Rules((DIGITS, GPT2)),
    "command-r": Rules((DIGITS, GPT2), composed=True),
    "llama-bpe": Rules(LLAMA3, whole=True, bos=True),
    "smaug-bpe": Rules(LLAMA3),
    "qwen2": Rules(QWEN2, composed=True),
    "deepseek-r1-qwen": Rules(QWEN2),
    "qwen35": Rules(QWEN35, composed=True),
    "tekken": Rules(TEKKEN, whole=True, bos=True),
    "gpt-4o": Rules(GPT4O),
    "deepseek-v3": Rules(DEEPSEEK3),
    "bloom": Rules((NO_STOPS, BYTES)),
    "viking": Rules((NO_STOPS, r"\p{N}", BYTES)),
    "seed-coder": Rules(SEED),
}

# Other names of the same rules.
SAME = {
    "gpt-2": ("phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "jais", "trillion"),
    "olmo": ("mpt", "modern-bert"),
    "smollm": ("starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "llama-bpe": (
        *("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        "jina-v5-nano",
    ),
    "smaug-bpe": ("dbrx", "glm4", "chatglm-bpe"),
    "qwen2": ("f2llmv2",),
    "deepseek-r1-qwen": ("hunyuan", "solar-open", "grok-2", "kormo", "megrez", "stablelm2"),
    "gpt-4o": ("llama4", "kanana2", "talkie", "minimax-m2"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm", "hy_v4"),
    "bloom": ("gpt3-finnish", "poro-chat"),
}

NAMES = RULES | {other: RULES[name] for name, others in SAME.items() for other in others}


def normalizer(rules: Rules) -> Normalizer | None:
    """The normalisation of text before it is split; None if there is none."""
    return normalizers.NFC() if rules.composed else None


def cutter(rules: Rules) -> PreTokenizer:
    """What cuts text into words, spelled in bytes."""
    return pre_tokenizers.Sequence([built(step) for step in rules.steps])


def built(step: str) -> PreTokenizer:
    """One rule."""
    if step in (GPT2, BYTES):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == GPT2)
    if step == DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(step), behavior="isolated")


def steps_in(rules: dict[str, Any] | None) -> tuple[Any, ...]:
    """The rules of a tokenizer.json in the notation of RULES; unknown rules are unchanged."""
    if rules is None:
        return ()
    if rules["type"] == "Sequence":
        return tuple(step for each in rules["pretokenizers"] for step in steps_in(each))
    return (step_of(rules),)


def step_of(step: dict[str, Any]) -> Any:
    """A rule in the notation of RULES; an unknown rule is unchanged."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return GPT2 if step.get("use_regex", True) else BYTES
    if step["type"] == "Digits" and step["individual_digits"]:
        return DIGITS
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", step)
    return step
