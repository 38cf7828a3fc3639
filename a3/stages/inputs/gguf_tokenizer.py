"""The tokenizer of a GGUF file, with the rules that the file names and all chat templates."""

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from a3.core.errors import A3Error
from a3.models.gguf import Gguf
from a3.models.gguf_keys import FILE, TEMPLATE, template_name
from a3.models.gguf_rules import NAMES, RULES, Rules, cutter, normalizer
from a3.models.load import load_tokenizer

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5

SPACE = "▁"

IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

# Of tokenizers that are not read here, or of what a runtime does with a model's answer.
OTHER_KEYS = ("normalizer.", "precompiled_charsmap", "remove_extra_whitespaces", "suppress_tokens")


def tokenizer_of(file: Gguf) -> PreTrainedTokenizerBase:
    """The tokenizer of a file, of byte-level BPE or SentencePiece.

    Raises A3Error for another kind, for rules of words that a3 does not know, and where lists and
    numbers of tokens do not fit together.
    """
    for key in file.values:
        # transformers reads some of them itself, and would not say which is wrong.
        if key in FILE:
            file.of_file(key)
        if key.startswith("tokenizer.ggml.") and any(word in key for word in OTHER_KEYS):
            raise refusal(file, f"{key} is set, which a3 does not read")
    kind = file.of_file("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = byte_level(file, rules_of(file))
    elif kind == "llama":
        tokenizer = sentencepiece(file)
    else:
        raise refusal(file, f"tokenizer.ggml.model is {kind!r}, expected gpt2 or llama")
    named = {
        template_name(file.path, key.removeprefix(f"{TEMPLATE}.")): file.of_file(key)
        for key in file.values
        if key.startswith(f"{TEMPLATE}.")
    }
    default = file.of_file(TEMPLATE)
    own = {} if default is None else {"default": default}
    tokenizer.chat_template = named | own if named else default
    return tokenizer


def sentencepiece(file: Gguf) -> PreTrainedTokenizerBase:
    """SentencePiece; vocabulary and merges as transformers reads them from the file alone.

    It would take a tokenizer.json that lies beside the file for the file's own, and has rules of
    its own for texts that begin with a space; those of SentencePiece have one more before them.
    """
    spelled = dict(enumerate(file.needed("tokenizer.ggml.tokens")))
    for kind in IDS:
        special_id(file, kind, spelled)
    for name in ("scores", "token_type"):
        found = file.of_file(f"tokenizer.ggml.{name}", spelled)
        if len(found) != len(spelled):
            raise refusal(
                file,
                f"tokenizer.ggml.{name} has {len(found)} numbers for the {len(spelled)} of "
                "tokenizer.ggml.tokens",
            )
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / file.path.name).symlink_to(file.path.resolve())
        try:
            tokenizer = load_tokenizer(Path(alone), gguf_file=file.path.name)
        except A3Error as error:
            raise A3Error(str(error).replace(alone, str(file.path.parent))) from error
    if not file.architecture.startswith("gemma"):
        spaced = file.of_file("tokenizer.ggml.add_space_prefix", True)
        prefix = [normalizers.Prepend(SPACE)] if spaced else []
        strip = [decoders.Strip(" ", 1, 0)] if spaced else []
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
        backend.pre_tokenizer = None
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        backend.decoder = decoders.Sequence(steps)
    return tokenizer


def refusal(file: Gguf, why: str) -> A3Error:
    """The error for a tokenizer that cannot be made."""
    return A3Error(f"{file.path}: {why}. Name the folder in Hugging Face's layout instead.")


def rules_of(file: Gguf) -> Rules:
    """The rules of words that a file names; raises A3Error for none and for others."""
    name = file.of_file("tokenizer.ggml.pre")
    if name not in NAMES:
        raise refusal(
            file,
            f"tokenizer.ggml.pre is {'missing' if name is None else repr(name)}: a3 does not know "
            f"how it cuts text into words. It knows {', '.join(RULES)} and names of the same rules",
        )
    return NAMES[name]


def byte_level(file: Gguf, rules: Rules) -> PreTrainedTokenizerFast:
    """Byte-level BPE; tokens that a file says are unused are left out."""
    tokens, merges = file.needed("tokenizer.ggml.tokens"), file.needed("tokenizer.ggml.merges")
    types = file.of_file("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(types) != len(tokens):
        raise refusal(
            file,
            f"tokenizer.ggml.token_type has {len(types)} numbers for the {len(tokens)} of "
            "tokenizer.ggml.tokens",
        )
    spelled = {
        number: token
        for number, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ != UNUSED
    }
    vocabulary = {token: number for number, token in spelled.items()}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if len(vocabulary) != len(spelled) or any(len(pair) != 2 for pair in pairs):
        raise refusal(
            file,
            "one of tokenizer.ggml.tokens stands twice, or one of tokenizer.ggml.merges is not of "
            "two tokens",
        )
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=rules.whole))
    # What the library says of tokens that merges make and the vocabulary lacks is of any type.
    except Exception as error:
        raise refusal(file, f"its merges do not fit its tokens ({error})") from error
    if cut := normalizer(rules):
        tokenizer.normalizer = cut
    tokenizer.pre_tokenizer = cutter(rules)
    tokenizer.decoder = decoders.ByteLevel()
    for special, of in ((True, CONTROL), (False, USER_DEFINED)):
        added = [spelled[number] for number, type_ in enumerate(types) if type_ == of]
        marked = [AddedToken(token, normalized=False, special=special) for token in added]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(marked)
    ids = {kind: special_id(file, kind, spelled) for kind in IDS}
    named = {f"{kind}_token": spelled[number] for kind, number in ids.items() if number is not None}
    if around := surrounding(file, ids, rules):
        content = json.loads(tokenizer.to_str())
        content["post_processor"] = processor(
            {kind: spelled[n] for kind, n in around.items()}, around
        )
        tokenizer = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=file.own("context_length"),
        clean_up_tokenization_spaces=False,
        **({"bos_token": None, "eos_token": None} | named),
    )


def special_id(file: Gguf, kind: str, spelled: dict[int, str]) -> int | None:
    """The number of a special token; raises A3Error for one that is not in the vocabulary."""
    key = f"tokenizer.ggml.{IDS[kind]}_token_id"
    number = file.of_file(key)
    if number is not None and number not in spelled:
        raise refusal(file, f"{key} is {number}, and tokenizer.ggml.tokens has {len(spelled)}")
    return number


def surrounding(file: Gguf, ids: dict[str, int | None], rules: Rules) -> dict[str, int]:
    """The tokens that go with each text, BOS before and EOS after it, by their kind."""
    default = {"bos": rules.bos, "eos": False}
    found = {}
    for kind, usual in default.items():
        if file.of_file(f"tokenizer.ggml.add_{kind}_token", usual):
            number = ids[kind]
            if number is None:
                raise refusal(file, f"{kind.upper()} goes with each text, and no token is it")
            found[kind] = number
    return found


def processor(tokens: dict[str, str], numbers: dict[str, int]) -> dict[str, Any]:
    """What puts tokens around each text, as a tokenizer.json has it."""
    sequences = []
    for which, text in enumerate("AB"):
        special = {
            kind: [{"SpecialToken": {"id": token, "type_id": which}}]
            for kind, token in tokens.items()
        }
        middle = [{"Sequence": {"id": text, "type_id": which}}]
        sequences.append([*special.get("bos", []), *middle, *special.get("eos", [])])
    return {
        "type": "TemplateProcessing",
        "single": sequences[0],
        "pair": [*sequences[0], *sequences[1]],
        "special_tokens": {
            token: {"id": token, "ids": [numbers[kind]], "tokens": [token]}
            for kind, token in tokens.items()
        },
    }
