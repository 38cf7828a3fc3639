"""Files that appear whole or not at all, and their content hashes."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from a3.errors import A3Error

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` only when the block succeeds.

    The name is unique to the process, so that two writers never share a half-written file.
    Raises A3Error when the disk is full or the folder cannot be written; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise A3Error(f"{path}: cannot write: {error.strerror}. Free or choose a place.") from error
    temporary = Path(name)
    try:
        yield temporary
        permit(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_error(error):
            raise A3Error(f"{path}: cannot write: {error}. Free some space.") from error
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it replaces `path` only when the block succeeds.

    Raises A3Error when the disk is full or the folder cannot be written; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise A3Error(f"{path}: cannot write: {error.strerror}. Free or choose a place.") from error
    try:
        yield temporary
        for made in (temporary, *temporary.iterdir()):
            permit(made)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_error(error):
            raise A3Error(f"{path}: cannot write: {error}. Free some space.") from error
        raise


def permit(path: Path) -> None:
    """Give a file or folder the usual permissions: those of temporary files are private."""
    umask = os.umask(0)
    os.umask(umask)
    if not path.is_symlink():
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def is_disk_error(error: BaseException) -> bool:
    """Whether `error` says that the disk is full or a quota is used up.

    safetensors reports it in an exception of its own, with the code in its text.
    """
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    code = (
        re.search(r"os error (\d+)", str(error)) if "Safetensor" in type(error).__name__ else None
    )
    return code is not None and int(code[1]) in DISK_ERRORS


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises A3Error that names the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise A3Error(f"{path}: no such file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise A3Error(f"{path}: not valid JSON ({error}). Delete it and build it again.") from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
