"""Selects the files of a text by their names, and the type of each.

This is a separate module because the Snakefile and the records of models only list files. So a
change of the readers does not make them stale.
"""

import bz2
import gzip
import lzma
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath

from a3.core.errors import A3Error
from a3.core.progress import LOG

# By suffix, letter case aside. A file without one is prose.
FILE_TYPES = {
    **{".txt": "text", ".md": "text"},
    **{".jsonl": "json", ".ndjson": "json", ".json": "json"},
    **{".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"},
}

UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}

READABLE = f"{', '.join(FILE_TYPES)}, plain or packed ({', '.join(UNPACK)})"


def inner(name: str) -> tuple[str, str, str]:
    """(stem, suffix, packing) of a file's name: ("a", ".csv", ".gz") of a.CSV.gz."""
    path, packing = PurePath(name), ""
    if path.suffix.lower() in UNPACK:
        path, packing = path.with_suffix(""), path.suffix.lower()
    return path.stem, path.suffix.lower(), packing


def text_files(path: Path, types: Iterable[str] = FILE_TYPES.values()) -> list[Path]:
    """The files that a text is read from: itself, or those in a folder of these `types`, sorted.

    Folders in it too; links are followed. Hidden files and other types are left out; of the latter
    it is said. Raises A3Error if there is none, and for a name that is not UTF-8.
    """
    if not path.is_dir():
        return [require_name(path)]
    files = sorted(walk(path))
    kept = [file for file in files if FILE_TYPES.get(inner(file.name)[1]) in tuple(types)]
    other = [file.relative_to(path).as_posix() for file in files if file not in set(kept)]
    names = ", ".join(other[:3]) + (", …" if len(other) > 3 else "")
    if not kept:
        raise A3Error(
            f"{path}: no text in this folder; it has {names or 'no files'}. Expected files that "
            f"end in {READABLE}."
        )
    if other:
        LOG.warning(f"{path}: left out {len(other)} files of other types: {names}")
    return [require_name(file) for file in kept]


def require_name(path: Path) -> Path:
    """The path; raises A3Error if its name is not UTF-8: it is a title, and records hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise A3Error(f"{path}: its name is not UTF-8 ({error.reason}). Rename it.") from None
    return path


def walk(path: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones; a folder that links lead back to, once."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real not in seen:
            yield from (Path(folder, name) for name in names if not name.startswith("."))
        seen.add(real)


def unreadable(error: OSError) -> None:
    """Raise A3Error for a file or folder that cannot be read."""
    raise A3Error(f"{error.filename}: cannot be read ({error.strerror}). Correct it.") from error
