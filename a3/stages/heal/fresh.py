"""The blocks of a text that no statistic of a compressed model has seen."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from a3.core.errors import A3Error
from a3.core.files import sha256
from a3.texts.blocks import token_blocks
from a3.texts.reading import Document, load_documents, text_sha256, write_documents

# The first fresh blocks are never trained on: the loss before and after is measured on them.
HELD_OUT = 4


@dataclass(frozen=True)
class FreshText:
    """A text, cut into blocks in the order of the calibration's seed, without its first blocks.

    `skipped` blocks are left out, which the calibration has seen; 0 if it used another text.
    """

    path: Path
    documents: list[Document]
    tokenizer: PreTrainedTokenizerBase
    block_length: int
    bos: bool
    seed: int
    skipped: int

    def held_out(self) -> Tensor:
        """The blocks (HELD_OUT, L) on which the loss is measured; A3Error for a text too short."""
        return self._blocks(1)[:HELD_OUT]

    def training(self, count: int) -> Tensor:
        """The next blocks (N, L): `count` of them, or all that the text has.

        More give the same blocks first. Raises A3Error if there is none.
        """
        return self._blocks(count)[HELD_OUT:]

    def _blocks(self, count: int) -> Tensor:
        first = self.skipped + HELD_OUT
        blocks = token_blocks(
            self.documents,
            self.tokenizer,
            self.block_length,
            (first + count) * self.block_length,
            self.seed,
            self.bos,
        )
        if len(blocks) <= first:
            raise A3Error(
                f"{self.path}: {len(blocks)} blocks of {self.block_length} tokens, expected more "
                f"than {first}: {self.skipped} that the calibration has seen, {HELD_OUT} to "
                "measure on, and some to train on. Take more text, or a smaller block_length."
            )
        return blocks[self.skipped :]


def fresh_text(
    path: Path,
    statistics: dict[str, dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    bos: bool,
) -> FreshText:
    """What a calibration left of a text; `statistics` are the records of its Rxx by kind.

    The calibration is of this text if its hash is that of the file, or that of the documents in it
    as `a3 compress` writes them.
    """
    documents = load_documents(path)
    # Gradients are of some of the blocks only.
    used = max(statistics.values(), key=lambda one: one["tokens"], default=None)
    seed, skipped = 0, 0
    if used is not None:
        seed = used["seed"]
        if used["text_sha256"] in (text_sha256(path), sha256_as_written(documents)):
            seen = used["tokens"] // used["block_length"] * (used["block_length"] - used["bos"])
            skipped = -(-seen // (block_length - bos))
    return FreshText(path, documents, tokenizer, block_length, bos, seed, skipped)


def sha256_as_written(documents: list[Document]) -> str:
    """The hash of the file that stage text writes of these documents."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "docs.jsonl")
        write_documents(path, documents)
        return sha256(path)
