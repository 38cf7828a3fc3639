"""Checks which models and tokenizers llama.cpp supports; others are refused with the reason.

llama.cpp has built-in rules for splitting text into words, which a file selects by name. A file
with a wrong name loads, but tokenises differently. So the name is derived from the rules in
tokenizer.json, and rules without a name are refused.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from a3.core.errors import A3Error
from a3.models.gguf_rules import RULES, Rules, steps_in
from a3.models.load import load_tokenizer
from a3.models.stock import Stock

NFC = {"type": "NFC"}

# What a token of the vocabulary takes of the text beside it; llama.cpp takes the token alone.
GREEDY = ("lstrip", "rstrip", "single_word")


def require_llama(model: Stock) -> None:
    """Raise A3Error for what llama.cpp's `llama` and `deci` do otherwise than the family."""
    config, found = model.config, []
    if config.hidden_act != "silu":
        found.append(f"its activation is {config.hidden_act}")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        found.append(f"its attention has a window of {window} positions")
    if found:
        raise A3Error(
            f"{model.folder}: llama.cpp's architectures llama and deci do not fit: "
            f"{'; '.join(found)}. a3 export hf makes a checkpoint for other runtimes."
        )


def content_of(tokenizer: PreTrainedTokenizerBase, path: Path) -> dict[str, Any]:
    """What a tokenizer does, as a tokenizer.json says it; of some families that is another one
    than the file's. Raises A3Error for a tokenizer that has none."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise A3Error(
            f"{path}: its tokenizer is a {type(tokenizer).__name__}, expected a fast "
            "one (tokenizer.json)."
        )
    return json.loads(tokenizer.backend_tokenizer.to_str())


def require_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerBase, dict[str, Any], str]:
    """A folder's tokenizer, its content and llama.cpp's name for its rules.

    Raises A3Error, without writing anything, for a tokenizer that llama.cpp would read otherwise.
    """
    tokenizer, path = load_tokenizer(folder), folder / "tokenizer.json"
    content = content_of(tokenizer, path)
    name = rules_of(content, path)
    merges_of(content, path)
    surrounding(tokenizer, path)
    return tokenizer, content, name


def rules_of(tokenizer: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for the rules of a tokenizer.json; raises A3Error if there is none."""
    kind = tokenizer["model"]["type"]
    if kind != "BPE" or tokenizer["model"].get("byte_fallback"):
        raise A3Error(
            f"{path}: its model is {kind}, expected byte-level BPE, the one kind that a3 writes "
            "to GGUF files. Convert the folder of a3 export hf with llama.cpp's own script."
        )
    for token in tokenizer.get("added_tokens", []):
        if how := [key for key in GREEDY if token.get(key)]:
            raise A3Error(
                f"{path}: its token {token['content']!r} is read with {' and '.join(how)}, which "
                "llama.cpp would not do. Use a runtime that reads tokenizer.json."
            )
    normal = tokenizer.get("normalizer")
    if normal == {"type": "Sequence", "normalizers": []}:
        normal = None
    # llama.cpp leaves characters as they are, of which most text has the composed ones.
    found = (
        steps_in(tokenizer.get("pre_tokenizer")),
        bool(tokenizer["model"].get("ignore_merges")),
        normal == NFC,
    )
    for name, rules in RULES.items():
        if normal in (None, NFC) and found == as_found(rules):
            return name
    raise A3Error(
        f"{path}: its pre_tokenizer is {json.dumps(tokenizer.get('pre_tokenizer'))}, its "
        f"normalizer {json.dumps(normal)}; expected those of {', '.join(RULES)}: llama.cpp would "
        "tokenise text differently. Convert the folder of a3 export hf with llama.cpp's own script."
    )


def as_found(rules: Rules) -> tuple[tuple[Any, ...], bool, bool]:
    """Rules as a tokenizer.json has them."""
    return rules.steps, rules.whole, rules.composed


def surrounding(tokenizer: PreTrainedTokenizerBase, path: Path) -> tuple[bool, bool]:
    """Whether BOS goes before, and EOS after each text; A3Error if other tokens do."""
    inner, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    for bos, eos in product((False, True), repeat=2):
        if whole == [tokenizer.bos_token_id] * bos + inner + [tokenizer.eos_token_id] * eos:
            return bos, eos
    raise A3Error(
        f"{path}: it puts other tokens than BOS and EOS around a text ({whole} around {inner}), "
        "which llama.cpp would not do. Use a runtime that reads tokenizer.json."
    )


def merges_of(content: dict[str, Any], path: Path) -> list[str]:
    """The merges of a tokenizer.json as llama.cpp reads them; A3Error for one with a space."""
    pairs = [
        merge.split(" ") if isinstance(merge, str) else merge
        for merge in content["model"]["merges"]
    ]
    if bad := next((pair for pair in pairs if len(pair) != 2 or " " in "".join(pair)), None):
        raise A3Error(
            f"{path}: {bad} is not a merge of two byte-level tokens. "
            "Convert the folder with llama.cpp's own script."
        )
    return [" ".join(pair) for pair in pairs]
