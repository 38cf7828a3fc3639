"""Finds the entry for a name: from the catalogue, a local path, or the hub."""

from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.files import load_yaml

CATALOGUE = Path(__file__).parent / "catalogue.yaml"

# For each section of the catalogue: the word for an entry, and other values that are allowed.
SECTIONS = {
    "models": ("model", "a folder, a .gguf file"),
    "texts": ("text", "a file or folder of text"),
    "quantisations": ("quantisation", "JSON of a recipe"),
}

# Of a name in an error, which may be all of a text by mistake.
LONGEST = 80


def find_entry(name: str, section: str) -> dict[str, Any]:
    """The entry of the catalogue for what a user calls a model, a text or a recipe.

    A local path, a name from the catalogue, or owner/name@revision; raises A3Error for anything
    else.
    """
    _, local = SECTIONS[section]
    catalogue = load_yaml(CATALOGUE)[section]
    if section == "quantisations":
        if name in catalogue:
            return catalogue[name]
        raise A3Error(f"{name!r}: expected {local}, or one of {', '.join(sorted(catalogue))}.")
    if name and is_there(Path(name)):
        # As in every command that reads a text itself, empty records are documents.
        return {"source": {"path": name}} | ({"min_chars": 0} if section == "texts" else {})
    if name in catalogue:
        return catalogue[name]
    repository, _, revision = name.partition("@")
    if repository.count("/") == 1 and revision:
        return {"source": {"hub": repository, "revision": revision}}
    said = name if len(name) <= LONGEST else f"{name[:LONGEST]}…"
    raise A3Error(
        f"{said!r}: expected {local}, one of {', '.join(sorted(catalogue))}, or a hub repository "
        "with its revision (owner/name@revision); found none of them."
    )


def is_there(path: Path) -> bool:
    """Whether the file or folder exists; False for a name that is too long."""
    try:
        return path.exists()
    except OSError:
        return False
