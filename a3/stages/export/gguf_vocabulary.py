"""A byte-level BPE tokenizer of Hugging Face as the metadata of a GGUF file."""

from pathlib import Path

from gguf import GGUFWriter, Keys, TokenType
from transformers import PreTrainedTokenizerBase

from a3.core.errors import A3Error
from a3.models.gguf_keys import template_name
from a3.stages.export.llama import merges_of, require_tokenizer, surrounding


def add_vocabulary(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Write tokens, merges, special tokens and chat templates of a folder's tokenizer.

    `size` is the model's number of tokens; those that the tokenizer lacks are unused, and those
    that it has beyond are left out. Raises A3Error for a tokenizer that is no byte-level BPE, or
    whose rules llama.cpp has no name for.
    """
    tokenizer, content, name = require_tokenizer(folder)
    path = folder / "tokenizer.json"
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
