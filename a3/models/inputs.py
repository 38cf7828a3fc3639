"""The local files from which models and texts are made, and how to tell whether they changed.

Files are listed, not their folders: a folder's time changes when files are added or removed, not
when they are written. The Snakefile imports this at every start, so it imports nothing heavy.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from a3.core.files import HIDDEN_SEAL, RECORDS, sha256
from a3.texts.files import FILE_TYPES, inner, walk

# Mistral has names such as tokenizer.model.v3.
MODEL_FILES = [
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.model.v*"),
    *("README.md", "LICENSE*", "NOTICE*"),
]

# Folders hold other formats of the same weights; consolidated files repeat the shards.
NOT_MODEL_FILES = ["*/*", "consolidated*"]

# Folder in which transformers stores named chat templates.
TEMPLATES = "additional_chat_templates"

# Files of stages, if the source is a folder that a stage wrote.
LEFT = (*RECORDS, "source.json", "timing.json", HIDDEN_SEAL)

# For larger files only this many evenly spaced pieces are read to detect changes.
LARGE, PIECES, PIECE = 64 * 2**20, 64, 2**16


def is_model_file(path: Path) -> bool:
    """Whether a file of a folder belongs to the model as a3 reads it."""
    return (
        path.is_file()
        and any(path.match(pattern) for pattern in MODEL_FILES)
        and not any(Path(path.name).match(pattern) for pattern in NOT_MODEL_FILES)
        and path.name not in LEFT
    )


def files_of(folder: Path) -> list[Path]:
    """Files of a model's folder, and chat templates in their folder, but of no other folder."""
    paths = [*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*.jinja")]
    return [path for path in sorted(paths) if path.is_file()]


def wheels_in(source: Mapping[str, Any]) -> list[dict[str, str]]:
    """The wheels that an entry's source reads, in the order of the parts of a joined file."""
    if "wheels" in source:
        return source["wheels"]["parts"]
    return [source["wheel"]] if "wheel" in source else []


def wheel_name(wheel: Mapping[str, str]) -> str:
    """The file name that a3 gives a wheel, whatever its publisher calls it."""
    return f"{wheel['name']}-{wheel['version']}.whl"


def model_inputs(path: Path) -> list[Path]:
    """The files of a local model: those of a folder that a3 reads, or the one file (GGUF)."""
    found = files_of(path) if path.is_dir() else []
    return [file for file in found if is_model_file(file)] or [path]


def text_inputs(path: Path) -> list[Path]:
    """The files of a local text: the readable files of a folder, or the single file."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(walk(path)) if inner(file.name)[1] in FILE_TYPES]


INPUTS = {"models": model_inputs, "texts": text_inputs}


def local_inputs(section: str, source: Mapping[str, object]) -> list[Path]:
    """The local files from which an entry of `models` or `texts` is made; else empty."""
    return INPUTS[section](Path(str(source["path"]))) if "path" in source else []


def hash_inputs(section: str, source: Mapping[str, object]) -> dict[str, str]:
    """SHA-256 of each local input by its path below the source; of a file, by its name."""
    return {name_in(source, path): sha256(path) for path in local_inputs(section, source)}


def name_in(source: Mapping[str, object], path: Path) -> str:
    """The path of an input below its source, or the name of the source's one file."""
    top = Path(str(source["path"]))
    return path.name if path == top else path.relative_to(top).as_posix()


def marks(paths: Iterable[Path]) -> dict[str, str]:
    """Hashes that show whether the existing files have changed, independent of their times.

    Times are not enough: files of another model that were moved or linked here may be older than
    the results. Of files that are too large to read at every start, only some pieces are read.
    """
    return {str(path): mark(path) for path in paths if path.is_file()}


def mark(path: Path) -> str:
    """A hash (16 hex digits) of a file's content; of a large one, of its size and some pieces."""
    size = path.stat().st_size
    if size <= LARGE:
        return sha256(path)[:16]
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for piece in range(PIECES):
            stream.seek(piece * (size - PIECE) // (PIECES - 1))
            digest.update(stream.read(PIECE))
    return digest.hexdigest()[:16]
