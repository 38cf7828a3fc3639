"""Adds perplexities, or a licence, to a compressed model's card."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a3.artifacts.card import base_card, is_own_card, record_again, write_card
from a3.artifacts.protocols import PERPLEXITY_PROTOCOL, same_protocol, texts_scored
from a3.core.errors import A3Error
from a3.core.records import Record
from a3.models.arch import is_compressed
from a3.models.checkpoint import CARD, Checkpoint, check_file, recorded_files
from a3.models.compressed import compressed_record

# Fields of a result that the card shows.
SAID = (*PERPLEXITY_PROTOCOL, "text", "perplexity", "perplexity_stderr")

# Short names of licences, as the hub writes them.
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def add_perplexity(folder: Path, dense: Sequence[Path], compressed: Sequence[Path]) -> None:
    """Add results of `a3 eval ppl`, dense and compressed for each text, to a folder's card.

    They replace earlier ones. Raises A3Error if a result belongs to other weights, if the two
    results of a text have different protocols, or if a3 did not write README.md.
    """
    if len(dense) != len(compressed):
        raise A3Error(
            f"card: {len(dense)} dense results, {len(compressed)} compressed ones; expected one of "
            "each for every text."
        )
    record = open_card(folder)
    weights = {"dense": record["base"]["weights_sha256"], "compressed": record["weights_sha256"]}
    pairs = []
    for both in zip(dense, compressed, strict=True):
        read = dict(zip(weights, map(Record.read, both), strict=True))
        for kind, one in read.items():
            # If transformers saved the model again, the dense weights are not known.
            if weights[kind] is not None:
                require_weights(one, weights[kind], kind)
        texts = {kind: texts_scored(one) for kind, one in read.items()}
        require_as_many(read, texts)
        for before, after in zip(*texts.values(), strict=True):
            same_protocol(before, after, PERPLEXITY_PROTOCOL)
            pair = dict(zip(weights, (before, after), strict=True))
            pairs.append({kind: {key: one[key] for key in SAID} for kind, one in pair.items()})
    write_again(folder, record | {"perplexity": pairs})


def add_licence(folder: Path, licence: str) -> None:
    """Name the licence in a folder's card, by the hub's short name; it replaces an earlier one.

    Raises A3Error for a name of other characters, and if a3 did not write README.md.
    """
    if not LICENCE.fullmatch(licence):
        raise A3Error(
            f"licence {licence!r}: expected a short name such as apache-2.0, mit or other. Take "
            "the one that the base model's page names."
        )
    record = open_card(folder)
    write_again(folder, record | {"base_card": base_card(record) | {"license": licence}})


def open_card(folder: Path) -> dict[str, Any]:
    """The record of a compressed folder, whose card and files have not changed.

    Raises A3Error for other folders.
    """
    if not is_compressed(folder):
        raise A3Error(f"{folder}: a dense model. Name a compressed folder, whose card a3 writes.")
    if recorded := recorded_files(folder) if (folder / CARD).exists() else {}:
        instead = "It would be overwritten: move it elsewhere first."
        check_file(folder / CARD, recorded.get(CARD, ""), instead)
    Checkpoint(folder).verify_all()
    return compressed_record(folder)


def write_again(folder: Path, record: dict[str, Any]) -> None:
    """Write card and record of a folder from a changed record; the card alone, if it has none."""
    if "files" not in record:
        require_own_card(folder)
        write_card(folder, record)
        return
    record_again(folder, record)


def require_as_many(read: dict[str, Record], texts: dict[str, list[Record]]) -> None:
    """Raise A3Error if the dense and the compressed result are of different numbers of texts."""
    if len({len(found) for found in texts.values()}) > 1:
        said = ", ".join(f"{read[kind].path} of {len(found)}" for kind, found in texts.items())
        raise A3Error(f"{said} texts; expected the same ones. Name results of the same texts.")


def require_own_card(folder: Path) -> None:
    """Raise A3Error if README.md is not as a3 wrote it; for folders without a record of it."""
    if (folder / CARD).exists() and not is_own_card(folder / CARD):
        raise A3Error(
            f"{folder / CARD}: a3 did not write this card, or it was changed since. Move it, "
            "and add it later."
        )


def require_weights(record: Record, expected: str, kind: str) -> None:
    """Raise A3Error unless a result was taken from these weights."""
    if (found := record["checkpoint_sha256"]) != expected:
        raise A3Error(
            f"{record.path}: checkpoint_sha256 is {found}, but the {kind} model's weights are "
            f"{expected}: the result is of another model. Name one of this model."
        )
