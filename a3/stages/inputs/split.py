"""Removes documents that calibration has seen from a text, and splits the rest by hash."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from a3.core.errors import A3Error
from a3.core.files import sha256, write_record
from a3.core.provenance import provenance
from a3.texts.overlap import REASONS, exclusions, same
from a3.texts.reading import Document, load_documents, text_sha256, write_documents

# What a document may serve: three are for evaluation.
SPLITS = ("dev", "test", "harness", "calibration")

EVALUATED = SPLITS[:3]

WORD = re.compile(r"\w+")


def exclude_and_split(
    docs_path: Path,
    exclude_paths: Sequence[Path],
    shares: dict[str, float] | None,
    out_dir: Path,
) -> None:
    """Write each split's .jsonl and split.json (counts, hashes) into `out_dir`.

    A document is left out when it occurs in the excluded texts, as `exclusions` says. The others
    are split by a hash of title and text, so that a document's split depends on nothing else; of
    the same text several times (title, case, spaces aside) the least hash counts, so that no two
    splits hold it. Of the splits for evaluation, documents that occur in the calibration split are
    left out too, but not for their titles: within one text these need not tell documents apart.
    Without shares all go to test.
    Raises A3Error for unknown or wrong shares, or when nothing is left.
    """
    shares = check_shares(shares or {"test": 1.0})
    found = load_documents(docs_path)
    excluded = [document for path in exclude_paths for document in load_documents(path)]
    reasons = exclusions(found, excluded)
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    kept = [d for d, reason in zip(found, reasons, strict=True) if reason is None]
    for document, place in zip(kept, split_places(kept), strict=True):
        splits[choose_split(place, shares)].append(document)
    seen = [replace(document, title="") for document in splits["calibration"]]
    for split in EVALUATED:
        own = exclusions(splits[split], seen)
        reasons += own
        splits[split] = [d for d, reason in zip(splits[split], own, strict=True) if reason is None]
    if not any(splits.values()):
        raise A3Error(
            f"{docs_path}: all {len(found)} documents occur in the calibration texts. Evaluate on "
            f"another text, or take that one out of exclude."
        )
    for split, chosen in splits.items():
        write_documents(out_dir / f"{split}.jsonl", chosen)
    write_record(
        out_dir / "split.json",
        {
            "documents": {"found": len(found)} | {split: len(splits[split]) for split in SPLITS},
            "excluded": {reason: reasons.count(reason) for reason in REASONS},
            "inputs": {
                f"{path.parent.name}/{path.name}": text_sha256(path)
                for path in (docs_path, *exclude_paths)
            },
            "shares": shares,
            "files": {f"{split}.jsonl": sha256(out_dir / f"{split}.jsonl") for split in SPLITS},
            "provenance": provenance(__name__),
        },
    )


def check_shares(shares: dict[str, float]) -> dict[str, float]:
    """The shares, in the order of SPLITS; raises A3Error for an unknown split or a wrong sum."""
    unknown = sorted(set(shares) - set(SPLITS))
    wrong = [share for share in shares.values() if not 0 <= share <= 1]
    if unknown or wrong or abs(sum(shares.values()) - 1) > 1e-6:
        raise A3Error(
            f"split {shares}: expected shares of {', '.join(SPLITS)} between 0 and 1 whose sum is "
            f"1. Correct split."
        )
    return {split: float(shares.get(split, 0)) for split in SPLITS}


def choose_split(place: float, shares: dict[str, float]) -> str:
    """The split whose interval of [0, 1) holds `place`."""
    total = 0.0
    for split, share in shares.items():
        total += share
        if place < total:
            return split
    # The shares' sum may fall short of 1 by a rounding error.
    return max(shares, key=lambda split: shares[split])


def split_places(documents: Sequence[Document]) -> list[float]:
    """A hash in [0, 1) of each document, one for all of the same text, unless that is empty."""
    texts = [same(document.text) or f"\0{document.title}" for document in documents]
    places: dict[str, float] = {}
    for text, document in zip(texts, documents, strict=True):
        hashed = hashlib.sha256(f"{document.title}\0{document.text}".encode()).digest()
        place = int.from_bytes(hashed[:8], "big") / 2**64
        places[text] = min(place, places.get(text, place))
    return [places[text] for text in texts]
