"""The files that models and texts are made from, where these are local: what has to be looked at.

Not their folders: the time of a folder changes when files come and go, not when they are written.
Read by the Snakefile at every start, so nothing heavy is imported here.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from a3.core.files import HIDDEN_SEAL, RECORDS, sha256
from a3.texts.files import FILE_TYPES, inner, walk

# Mistral has names such as tokenizer.model.v3.
MODEL_FILES = [
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.model.v*"),
    *("README.md", "LICENSE*", "NOTICE*"),
]

# Folders hold other formats of the same weights; consolidated files repeat the shards.
NOT_MODEL_FILES = ["*/*", "consolidated*"]

# Where transformers has chat templates that have names.
TEMPLATES = "additional_chat_templates"

# Left by stages, where the source is one of their folders.
LEFT = (*RECORDS, "source.json", "timing.json", HIDDEN_SEAL)

# Of larger files only so many pieces, evenly spread, are read to tell whether they changed.
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


def model_inputs(path: Path) -> list[Path]:
    """The files of a local model: those of a folder that a3 reads, or the one file (GGUF)."""
    found = files_of(path) if path.is_dir() else []
    return [file for file in found if is_model_file(file)] or [path]


def text_inputs(path: Path) -> list[Path]:
    """The files of a local text: those in a folder of types that are read, or the one."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(walk(path)) if inner(file.name)[1] in FILE_TYPES]


INPUTS = {"models": model_inputs, "texts": text_inputs}


def local_inputs(section: str, source: Mapping[str, object]) -> list[Path]:
    """The files that an entry of `models` or `texts` is made from; none unless they are local."""
    return INPUTS[section](Path(str(source["path"]))) if "path" in source else []


def hash_inputs(section: str, source: Mapping[str, object]) -> dict[str, str]:
    """SHA-256 of each local input by its path below the source; of a file, by its name."""
    return {name_in(source, path): sha256(path) for path in local_inputs(section, source)}


def name_in(source: Mapping[str, object], path: Path) -> str:
    """The path of an input below its source, or the name of the source's one file."""
    top = Path(str(source["path"]))
    return path.name if path == top else path.relative_to(top).as_posix()


def marks(paths: Iterable[Path]) -> dict[str, str]:
    """What tells whether files have changed, whatever their times are, of those that are there.

    Times alone do not tell: another model's files, moved or linked here, may be older than the
    results. Of files too large to be read at every start, some pieces are.
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
