"""Documents on disk (one JSON a line, or a plain text file) and the token blocks cut from them."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from a3.errors import A3Error
from a3.files import whole_file

SEPARATOR = "\n\n"
# Generous for English (4 to 5 characters a token), so that one pass mostly gives enough tokens.
CHARACTERS_PER_TOKEN = 6
# The last tokens of a text cut short may differ from those of the whole text: so many are not used.
MARGIN = 64


@dataclass(frozen=True)
class Document:
    """One article, page or speech; `title` may be empty."""

    title: str
    text: str


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write one JSON object a line, with the keys title and text, whole or not at all."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for document in documents:
            stream.write(json.dumps(asdict(document), ensure_ascii=False, sort_keys=True) + "\n")


def load_documents(path: Path) -> list[Document]:
    """Documents of a .jsonl file (fields text and, optionally, title), or a text file as one.

    Raises A3Error when the file is missing, empty, not UTF-8 or (with its line) not such JSON.
    """
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [Document(path.stem, text)]
    return parse_lines(text, str(path))


def parse_lines(text: str, name: str) -> list[Document]:
    """Documents of the text of a .jsonl file called `name`."""
    # Not splitlines: JSON leaves other line separators, such as U+2028, inside strings.
    lines = enumerate(text.split("\n"), 1)
    return [parse(line, f"{name}: line {i}") for i, line in lines if line.strip()]


def parse(line: str, where: str) -> Document:
    """One line of a .jsonl file; raises A3Error that says where it is."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise A3Error(f"{where}: not JSON ({error}). Write one JSON object a line.") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise A3Error(f"{where}: found {found}, expected an object whose text is a string.")
    document = Document(str(fields.get("title", "")), fields["text"])
    try:
        f"{document.title}{document.text}".encode()
    except UnicodeEncodeError as error:
        raise A3Error(f"{where}: half a surrogate pair ({error}). Correct the line.") from error
    return document


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; A3Error when missing, empty or other."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise A3Error(f"{path}: no such file. Build it, or correct the path.") from None
    except IsADirectoryError:
        raise A3Error(f"{path}: a folder, expected a text or .jsonl file. Name a file.") from None
    return decode(content, str(path))


def decode(content: bytes, name: str) -> str:
    """The text of a file called `name`; raises A3Error when it is empty or not UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise A3Error(
            f"{name}: byte {error.start} is not UTF-8 ({error.reason}). Convert the file to UTF-8."
        ) from error
    if not text.strip():
        raise A3Error(f"{name}: the file holds no text. Choose another, or build it again.")
    return text


def token_blocks(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    tokens: int,
    seed: int | None,
    bos: bool,
) -> torch.LongTensor:
    """Cut the documents, joined by an empty line, into (tokens // block_length, block_length).

    In the given order, or permuted by `seed`; without overlap; where `bos`, each block starts with
    BOS, which takes one place. Only as much text is tokenised as is needed, and more tokens give
    the same blocks first. A text with fewer blocks gives what it has.
    Raises A3Error when there is not one full block, or no BOS where one is asked for.
    """
    wanted, length = tokens // block_length, block_length - bos
    if wanted < 1 or length < 1:
        raise A3Error(
            f"tokens {tokens}, block_length {block_length}: expected at least one block, of two "
            f"tokens or more. Raise tokens or lower block_length."
        )
    if bos and tokenizer.bos_token_id is None:
        raise A3Error("bos: the tokenizer has no BOS token. Set bos to false.")
    texts = [document.text for document in documents]
    if seed is not None:
        random.Random(seed).shuffle(texts)
    ids = token_ids(texts, tokenizer, wanted * length)
    count = min(wanted, len(ids) // length)
    if count == 0:
        raise A3Error(
            f"text too short for one block: found {len(ids)} tokens, needed {length}. Use more "
            f"text or a smaller block_length."
        )
    blocks = torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)
    if bos:
        first = torch.full((count, 1), tokenizer.bos_token_id, dtype=torch.long)
        blocks = torch.cat([first, blocks], dim=1)
    return blocks


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, needed: int) -> list[int]:
    """At least `needed` token ids of the joined texts, or all there are; no special tokens."""
    joined = SEPARATOR.join(texts)
    characters = CHARACTERS_PER_TOKEN * (needed + MARGIN)
    while True:
        part = joined[:characters]
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if len(part) == len(joined) or len(ids) >= needed + MARGIN:
            return ids
        characters *= 2
