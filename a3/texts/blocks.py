"""The token blocks that are cut from documents, and the order of documents."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from a3.core.errors import A3Error
from a3.texts.reading import Document

# What stands between two documents, by the name that protocols have for it.
JOINS = {"empty-line": "\n\n", "space": " ", "nothing": ""}

# BOS once, before the whole text, where the tokenizer itself begins a text with it.
ONCE = "once"

ALL = "all"

# Generous for English (4 to 5 characters a token), so that one pass mostly gives enough tokens.
CHARACTERS_PER_TOKEN = 6

# The last tokens of a text cut short may differ from those of the whole text: so many are not used.
MARGIN = 64


def interleave(
    members: Mapping[str, Sequence[Document]], shares: Mapping[str, float]
) -> list[Document]:
    """Documents of all members, each member's in its order, so that a prefix has about the shares.

    Shares are of characters. The member that is furthest behind its share comes next; where it has
    no more documents the mixture ends, so that its last documents keep to the shares too.
    """
    mixed: list[Document] = []
    used, places = dict.fromkeys(members, 0), dict.fromkeys(members, 0)
    while True:
        member = min(members, key=lambda name: used[name] / shares[name])
        if places[member] == len(members[member]):
            return mixed
        document = members[member][places[member]]
        mixed.append(document)
        places[member] += 1
        used[member] += len(document.text)


def permuted(documents: Sequence[Document], seed: int) -> list[Document]:
    """Documents in an order drawn by `seed`; those of a mixture keep to its shares."""
    members: dict[str, list[Document]] = {}
    for document in documents:
        members.setdefault(document.member, []).append(document)
    for found in members.values():
        random.Random(seed).shuffle(found)
    if len(members) == 1:
        return members.popitem()[1]
    shares = {member: max(1, sum(len(d.text) for d in found)) for member, found in members.items()}
    return interleave(members, shares)


def token_blocks(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    tokens: int,
    seed: int | None,
    bos: bool,
) -> torch.Tensor:
    """Cut the documents, joined by an empty line, into (tokens // block_length, block_length).

    In the given order, or permuted by `seed`; without overlap; where `bos`, each block starts with
    BOS, which takes one place. Only as much text is tokenised as is needed, and more tokens give
    the same blocks first. A text with fewer blocks gives what it has.
    Raises A3Error when there is not one full block, or no BOS where one is asked for.
    """
    check_blocks(tokenizer, block_length, tokens, bos)
    if seed is not None:
        documents = permuted(documents, seed)
    needed = tokens // block_length * (block_length - bos)
    text = "\n\n".join(document.text for document in documents)
    _, encoded = encode(text, tokenizer, needed)
    return cut(encoded["input_ids"][:needed], block_length, bos, tokenizer.bos_token_id)


def scored_blocks(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    tokens: int | str,
    bos: bool | str,
    join: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token blocks as in `token_blocks`, in the given order, and each token's bytes; both (N, L).

    `tokens` may be "all", `join` is a key of JOINS, and `bos` may be "once": BOS before the whole
    text, where the tokenizer itself begins a text so. A token's bytes are the UTF-8 bytes of the
    text from the end of the token before it to its own end, so that those of all tokens are those
    of the text; BOS has none, and of tokens that share a character the first has all its bytes.
    Raises A3Error as `token_blocks` does, and for a tokenizer that does not say where tokens end.
    """
    check_blocks(tokenizer, block_length, None if tokens == ALL else int(tokens), bos)
    if not tokenizer.is_fast:
        raise A3Error(
            "the tokenizer is slow and gives no offsets of tokens. Add its tokenizer.json."
        )
    needed = None
    if tokens != ALL:
        needed = int(tokens) // block_length * (block_length - (bos is True))
    text = JOINS[join].join(document.text for document in documents)
    prefix, encoded = encode(text, tokenizer, needed, return_offsets_mapping=True)
    ids, sizes = encoded["input_ids"], byte_sizes(prefix, encoded["offset_mapping"])
    if bos == ONCE and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        ids, sizes = [tokenizer.bos_token_id, *ids], [0, *sizes]
    each = bos is True
    return (
        cut(ids[:needed], block_length, each, tokenizer.bos_token_id),
        cut(sizes[:needed], block_length, each, 0),
    )


def check_blocks(
    tokenizer: PreTrainedTokenizerBase, block_length: int, tokens: int | None, bos: bool | str
) -> None:
    """Raise A3Error if no block can be cut, or there is no BOS for each block."""
    if block_length - (bos is True) < 1 or (tokens is not None and tokens < block_length):
        raise A3Error(
            f"tokens {tokens}, block_length {block_length}: expected at least one block, of two "
            f"tokens or more. Raise tokens or lower block_length."
        )
    if bos is True and tokenizer.bos_token_id is None:
        raise A3Error("bos: the tokenizer has no BOS token. Set bos to false.")


def encode(
    text: str, tokenizer: PreTrainedTokenizerBase, needed: int | None, **options: Any
) -> tuple[str, Any]:
    """As much of the text as gives `needed` tokens (None: all), and its encoding; none special."""
    characters = len(text) if needed is None else CHARACTERS_PER_TOKEN * (needed + MARGIN)
    while True:
        prefix = text[:characters]
        encoded = tokenizer(prefix, add_special_tokens=False, verbose=False, **options)
        if len(prefix) == len(text) or len(encoded["input_ids"]) >= (needed or 0) + MARGIN:
            return prefix, encoded
        characters *= 2


def cut(values: Sequence[int], block_length: int, each: bool, first: int) -> torch.Tensor:
    """Whole rows of `block_length` values; where `each`, `first` takes the first place of each.

    Raises A3Error when there is not one.
    """
    length = block_length - each
    count = len(values) // length
    if count == 0:
        raise A3Error(
            f"text too short for one block: found {len(values)} tokens, needed {length}. Use more "
            f"text or a smaller block_length."
        )
    blocks = torch.tensor(values[: count * length], dtype=torch.long).view(count, length)
    if each:
        column = torch.full((count, 1), first, dtype=torch.long)
        blocks = torch.cat([column, blocks], dim=1)
    return blocks


def byte_sizes(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """UTF-8 bytes from the end of the token before to each token's end, in characters of `text`.

    Tokenizers may leave spaces out of offsets; here they count with the token after them.
    """
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code > 0x7F) + (code > 0x7FF).astype(int) + (code > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(widths)])
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], int))
    return np.diff(before[ends], prepend=0).tolist()
