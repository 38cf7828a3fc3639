"""Copies the files that accompany a model's weights: tokenizer, chat templates, licence …"""

import shutil
from pathlib import Path

from a3.models.inputs import files_of
from a3.models.tokenizer import keep_reading

# Text, including the model card, but no weights, pickles or code. Mistral has names such as
# tokenizer.model.v3.
TRAVELS = ("*.json", "*.jinja", "*.txt", "*.model", "*.model.v*", "*.md", "LICENSE*", "NOTICE*")


def bring(source: Path, folder: Path, *without: str) -> None:
    """Copy accompanying files of `source` to `folder`, whose config.json exists or is copied.

    Files named in `without` are not copied. `folder` then tokenises like `source`. Raises A3Error
    as `keep_reading` does.
    """
    for path in files_of(source):
        if path.name not in without and travels(path):
            copy(path, source, folder)
    keep_reading(source, folder)


def copy(path: Path, source: Path, folder: Path) -> None:
    """Copy a file of `source`, or of a folder in it, to the same place in `folder`."""
    target = folder / path.relative_to(source)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)


def travels(path: Path) -> bool:
    """Whether a file is copied to the new folder."""
    text = any(path.match(pattern) for pattern in TRAVELS)
    return text and not path.name.startswith(".") and ".index." not in path.name
