"""A byte-level BPE tokenizer of Hugging Face as the metadata of a GGUF file.

llama.cpp knows a tokenizer's way of cutting text into words by a name, and has it built in; a file
whose name is wrong loads and reads text otherwise. So the name is found by the rules in
tokenizer.json, and rules that have none are refused.
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerBase

from a3.errors import A3Error
from a3.files import read_json
from a3.models.load import load_tokenizer

CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name, and the rules that it stands for: what cuts words, and whether words that are in
# the vocabulary are taken without merges.
RULES: dict[str, tuple[list[Any], bool]] = {
    "gpt-2": (["bytes with GPT-2's words"], False),
    "smollm": (["single digits", "bytes with GPT-2's words"], False),
    "llama-bpe": ([CONTRACTED + r"\p{N}{1,3}" + REST, "bytes"], True),
    "qwen2": ([CONTRACTED + r"\p{N}" + REST, "bytes"], False),
}


def add_vocabulary(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Write tokens, merges, special tokens and chat template of a folder's tokenizer.

    `size` is the model's number of tokens; those that the tokenizer lacks are unused. Raises
    A3Error for a tokenizer that is no byte-level BPE, or whose rules llama.cpp has no name for.
    """
    tokenizer, path = load_tokenizer(folder), folder / "tokenizer.json"
    name = rules_of(read_json(path), path)
    tokens, types = entries(tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=True, n_vocab=size)
    # What the tokenizer says is what its template and generation use.
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            special.special_token_ids[kind] = number
    first, last = tokenizer("a").input_ids[0], tokenizer("a").input_ids[-1]
    special.add_special_token = {
        "bos": first == tokenizer.bos_token_id,
        "eos": last == tokenizer.eos_token_id,
    }
    special.chat_template = tokenizer.chat_template
    special.add_to_gguf(writer, quiet=True)
    writer.add_add_space_prefix(False)


def entries(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str], list[int]]:
    """Each token as llama.cpp stores it, and its type."""
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(size):
        if number in added:
            types.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL if number in by_number else TokenType.UNUSED)
        tokens.append(by_number.get(number, f"[PAD{number}]"))
    return tokens, types


def rules_of(tokenizer: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for the rules of a tokenizer.json; raises A3Error where there is none."""
    kind = tokenizer["model"]["type"]
    if kind != "BPE" or tokenizer["model"].get("byte_fallback"):
        raise A3Error(
            f"{path}: its model is {kind}, expected byte-level BPE: GGUF files are written of no "
            "other tokenizer. Convert the folder of a3 export hf with llama.cpp's own script."
        )
    steps = [step_of(step) for step in steps_in(tokenizer.get("pre_tokenizer"))]
    whole = bool(tokenizer["model"].get("ignore_merges"))
    normal = tokenizer.get("normalizer")
    # Qwen's; llama.cpp leaves characters as they are, of which most text has the composed ones.
    known = normal is None or normal == {"type": "NFC"}
    for name, rules in RULES.items():
        if known and (steps, whole) == rules:
            return name
    raise A3Error(
        f"{path}: its words are cut by {json.dumps(tokenizer.get('pre_tokenizer'))} after "
        f"{json.dumps(normal)}; expected the rules of {', '.join(RULES)}: llama.cpp would read "
        "text otherwise. Convert the folder of a3 export hf with llama.cpp's own script."
    )


def steps_in(rules: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rules one by one."""
    if rules is None:
        return []
    return rules["pretokenizers"] if rules["type"] == "Sequence" else [rules]


def step_of(step: dict[str, Any]) -> Any:
    """A rule as RULES spells it, or as it is where there is no such one."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes with GPT-2's words" if step.get("use_regex", True) else "bytes"
    if step["type"] == "Digits" and step["individual_digits"]:
        return "single digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", step)
    return step
