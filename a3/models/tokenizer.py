"""Keeps a folder's tokenisation: AutoTokenizer reads the same files differently by config.json."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from a3.core.errors import A3Error
from a3.core.files import read_json
from a3.models.load import load_config, load_tokenizer
from a3.models.readable import PROCESSORS
from a3.models.registry import LazyConfig
from a3.models.wrappers import text_of

# A tokenizer needs one of these files, which define its tokens.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)

CONFIG = "tokenizer_config.json"

# All files that save_pretrained of any tokenizer class may write.
FILES = (
    *VOCABULARIES,
    CONFIG,
    *("merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)

# Keys of CONFIG that a compressed folder replaces; under KEPT it stores the dense folder's values.
REPLACED = ("tokenizer_class", "auto_map")

KEPT = "a3"

# The class that uses tokenizer.json unchanged, by its names in transformers 5 and 4.
PLAIN = {"TokenizersBackend": "PreTrainedTokenizerFast"}

# Besides the rules, these settings determine special tokens, prompts, padding and decoding.
ATTRIBUTES = (
    "special_tokens_map",
    "extra_special_tokens",
    "all_special_ids",
    "add_bos_token",
    "add_eos_token",
    "split_special_tokens",
    "chat_template",
    "response_template",
    "padding_side",
    "truncation_side",
    "pad_token_type_id",
    "model_max_length",
    "model_input_names",
    "clean_up_tokenization_spaces",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def tokenizer_files(folder: Path) -> list[str]:
    """Names of a folder's files that determine its tokenisation."""
    more = sorted(folder.glob("additional_chat_templates/*.jinja"))
    names = [name for name in FILES if (folder / name).is_file()]
    return names + [path.relative_to(folder).as_posix() for path in more]


def keep_reading(source: Path, folder: Path) -> None:
    """Make AutoTokenizer read `folder`, a copy of all files of `source`, exactly like `source`.

    transformers chooses a tokenizer's class by model_type and tokenizer_class together, and has no
    class for a compressed model's model_type. So a compressed folder names the class that the dense
    folder gets, and stores the replaced values, which an export restores. Raises A3Error if either
    folder cannot be read, or if they tokenise differently.
    """
    if not has_tokenizer(source):
        return
    of, to = (read_json(each / "config.json")["model_type"] for each in (source, folder))
    compressed = to == LazyConfig.model_type
    if of == to and not compressed:
        return  # the same files are read in the same way for the same family
    tokenizer = load_tokenizer(source)
    path = folder / CONFIG
    given = read_json(path) if path.exists() else {}
    config = naming(given, type(tokenizer).__name__) if compressed else restored(given)
    if compressed:
        config |= processor_of(source, of)
    if config != given:
        path.write_text(json.dumps(config, indent=2) + "\n")
    found = differences(tokenizer, load_tokenizer(folder))
    if "rules" in found and tokenizer.is_fast:
        # transformers may correct Mistral's tokenizers on loading, but only for Mistral's
        # model_type.
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        found = differences(tokenizer, load_tokenizer(folder))
    if found:
        raise A3Error(
            f"{source}: AutoTokenizer would read its tokenizer differently in {folder}: other "
            f"{', '.join(found)}. Save the tokenizer again there "
            "(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)), and run it again."
        )


def naming(given: dict[str, Any], wanted: str) -> dict[str, Any]:
    """A tokenizer_config.json that names the class `wanted` and no code (which is not copied)."""
    wanted = PLAIN.get(wanted, wanted)
    named = (given.get("tokenizer_class") or "").removesuffix("Fast")
    if named == wanted.removesuffix("Fast") and "auto_map" not in given:
        return given
    kept = given.get(KEPT, {key: given[key] for key in REPLACED if key in given})
    rest = {key: value for key, value in given.items() if key not in REPLACED}
    return rest | {"tokenizer_class": wanted, KEPT: kept}


def processor_of(source: Path, model_type: str) -> dict[str, str]:
    """The key that names the processor's class, where no file of `source` has it.

    AutoProcessor would then look for one of `model_type`, and find only a tokenizer of the
    compressed folder's.
    """
    files = [source / name for name in (*PROCESSORS, CONFIG) if (source / name).is_file()]
    named = any("processor_class" in read_json(path) for path in files)
    found = PROCESSOR_MAPPING_NAMES.get(model_type)
    return (
        {} if named or found is None or files == [source / CONFIG] else {"processor_class": found}
    )


def restored(given: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json with the dense folder's values, which `naming` had replaced."""
    if KEPT not in given:
        return given
    rest = {key: value for key, value in given.items() if key not in (KEPT, *REPLACED)}
    return rest | given[KEPT]


def differences(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """Names of the properties in which two tokenizers differ."""
    first, second = reading(one), reading(other)
    return [name for name in first if first[name] != second[name]]


def reading(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that determines a tokenizer's ids, special tokens, prompts and decoded text."""
    said = {name: getattr(tokenizer, name, None) for name in ATTRIBUTES}
    fast = tokenizer.is_fast
    rules = tokenizer.backend_tokenizer.to_str() if fast else tokenizer.get_vocab()
    return {"class": type(tokenizer).__name__, "rules": rules} | said


def require_rows(folder: Path, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> None:
    """Raise A3Error, which names them, if token ids (any shape) have no embedding row."""
    rows = text_of(load_config(folder)).vocab_size
    if ids.numel() and ids.max() >= rows:
        beyond = ids[ids >= rows].unique().tolist()
        raise A3Error(
            f"{folder}: the text has tokens that the model has no embedding of: "
            f"{spelt(tokenizer, beyond)}; the embedding has {rows} rows, for ids 0 to {rows - 1}. "
            "Take the tokenizer that belongs to the weights, or text without these tokens, or "
            "train a model with more rows (resize_token_embeddings in transformers)."
        )


def hold_to_rows(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `model` check all its input with `require_rows`, if such tokens can occur.

    If the padding token has no row, EOS replaces it; padding is masked, so the token does not
    matter.
    """
    rows = text_of(load_config(folder)).vocab_size
    if len(tokenizer) <= rows:
        return
    if (tokenizer.pad_token_id or 0) >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, given: require_rows(folder, tokenizer, given[0])
    )


def spelt(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The first tokens and their ids, for a message."""
    said = [f"{tokenizer.convert_ids_to_tokens(one)!r} (id {one})" for one in ids[:4]]
    return ", ".join(said) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
