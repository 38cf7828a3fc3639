"""a3 card: results of `a3 eval ppl` into the model card of a compressed folder."""

from collections.abc import Sequence
from pathlib import Path

from a3.errors import A3Error
from a3.files import SEAL, read_record, sha256, write_record
from a3.models.checkpoint import CARD
from a3.results import PERPLEXITY_PROTOCOL, Record, same_protocol
from a3.stages.card import write_card

# What of a result the card says.
SAID = (*PERPLEXITY_PROTOCOL, "text", "perplexity", "perplexity_stderr")


def add_perplexity(folder: Path, dense: Sequence[Path], compressed: Sequence[Path]) -> None:
    """Put results of `a3 eval ppl`, dense and compressed of each text, into a folder's card.

    They replace those that were there. Raises A3Error where a result is of other weights, or two of
    one text were taken by different protocols.
    """
    if len(dense) != len(compressed):
        raise A3Error(
            f"card: {len(dense)} dense results, {len(compressed)} compressed ones; expected one of "
            "each for every text."
        )
    path = folder / "approx.json"
    record = read_record(path)
    weights = {"dense": record["base"]["weights_sha256"], "compressed": record["weights_sha256"]}
    pairs = []
    for both in zip(dense, compressed, strict=True):
        read = dict(zip(weights, map(Record.read, both), strict=True))
        for kind, one in read.items():
            require_weights(one, weights[kind], kind)
        same_protocol(read["dense"], read["compressed"], PERPLEXITY_PROTOCOL)
        pairs.append({kind: {key: one[key] for key in SAID} for kind, one in read.items()})
    record["perplexity"] = pairs
    write_card(folder, record)
    record["files"][CARD] = sha256(folder / CARD)
    write_record(path, {key: value for key, value in record.items() if key != SEAL})


def require_weights(record: Record, expected: str, kind: str) -> None:
    """Raise A3Error unless a result was taken from these weights."""
    if (found := record["checkpoint_sha256"]) != expected:
        raise A3Error(
            f"{record.path}: checkpoint_sha256 is {found}, but the {kind} model's weights are "
            f"{expected}: the result is of another model. Name one of this model."
        )
