"""A byte-level BPE tokenizer of Hugging Face as the metadata of a GGUF file."""

from itertools import product
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Keys, TokenType
from transformers import PreTrainedTokenizerBase

from a3.core.errors import A3Error
from a3.models.gguf_keys import template_name
from a3.models.load import load_tokenizer
from a3.stages.export.llama import content_of, rules_of


def add_vocabulary(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Write tokens, merges, special tokens and chat templates of a folder's tokenizer.

    `size` is the model's number of tokens; those that the tokenizer lacks are unused, and those
    that it has beyond are left out. Raises A3Error for a tokenizer that is no byte-level BPE, or
    whose rules llama.cpp has no name for.
    """
    tokenizer, path = load_tokenizer(folder), folder / "tokenizer.json"
    content = content_of(tokenizer, path)
    name = rules_of(content, path)
    tokens, types = entries(tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges_of(content, path))
    # What the tokenizer says is what its template and generation use.
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None and number < size:
            getattr(writer, f"add_{kind}_token_id")(number)
    bos, eos = surrounding(tokenizer, path)
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)
    writer.add_add_space_prefix(False)
    add_templates(writer, tokenizer.chat_template, folder)


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


def add_templates(writer: GGUFWriter, templates: str | dict[str, str] | None, folder: Path) -> None:
    """Write chat templates, one or several by their names; A3Error if one is no
    text, or its name cannot be that of a file."""
    named = dict(templates) if isinstance(templates, dict) else {"default": templates or ""}
    if not all(isinstance(one, str) for pair in named.items() for one in pair):
        raise A3Error(
            f"{folder}: chat_template is {templates!r}, expected text, or texts by their names. "
            "Correct tokenizer_config.json."
        )
    if default := named.pop("default", None):
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE, default)
    if named:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, list(named))
    for name, template in named.items():
        key = Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=template_name(folder, name))
        writer.add_string(key, template)


def entries(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str], list[int]]:
    """Each token as llama.cpp stores it, and its type; unused ones have names of their own."""
    vocabulary = tokenizer.get_vocab()
    by_number = {number: token for token, number in vocabulary.items()}
    added = tokenizer.added_tokens_decoder
    tokens: list[str] = []
    types: list[int] = []
    for number in range(size):
        if number in added:
            types.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL if number in by_number else TokenType.UNUSED)
        unused = f"[PAD{number}]"
        while unused in vocabulary:
            unused = f"[{unused}]"
        tokens.append(by_number.get(number, unused))
    return tokens, types
