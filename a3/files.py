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

import yaml

from a3.errors import A3Error

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The key of a record under which the hash of all its other keys stands.
SEAL = "sha256"
# Files of fewer bytes are hashed anew each time.
SMALL = 2**20
# Hash by device, inode, size and time of change.
_hashes: dict[tuple[int, int, int, int], str] = {}


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

    Of several writers at once, the last to be done wins, whole. Raises A3Error when the disk is
    full, the folder cannot be written or `path` is a file; nothing is left behind.
    """
    if path.is_symlink() or path.is_file():
        raise A3Error(f"{path}: a file or link, expected a folder or nothing. Name another place.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise A3Error(f"{path}: cannot write: {error.strerror}. Free or choose a place.") from error
    try:
        yield temporary
        for made in (temporary, *temporary.iterdir()):
            permit(made)
        replace_folder(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_error(error):
            raise A3Error(f"{path}: cannot write: {error}. Free some space.") from error
        raise


def replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`, again and again while other writers put their own there."""
    while True:
        try:
            new.replace(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # A folder is in the way. Renamed, it is nobody else's: no writer deletes another's files.
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            path.replace(aside)
        except FileNotFoundError:
            pass  # another writer was quicker
        finally:
            shutil.rmtree(aside)


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
    # Beside what is not JSON or UTF-8: numbers of thousands of digits, and endless nesting.
    except (ValueError, RecursionError) as error:
        raise A3Error(f"{path}: not valid JSON ({error}). Delete it and build it again.") from error
    except OSError as error:
        raise A3Error(f"{path}: cannot be read ({error.strerror}). Correct the path.") from error


def load_yaml(path: Path) -> Any:
    """Parse a YAML file; raises A3Error that names the file and the line."""
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise A3Error(f"{path}: no such file.") from None
    # Not UTF-8 and dates that there are not are of type ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise A3Error(f"{path}: not valid YAML: {error}") from error


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record with its seal as `write_json` does."""
    write_json(path, seal(record))


def read_record(path: Path) -> dict[str, Any]:
    """Read a sealed record; raises A3Error that names the file as `read_json` and `unseal` do."""
    return unseal(read_json(path), path)


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the hash of its content under SEAL."""
    return record | {SEAL: content_hash(record)}


def unseal(record: Any, path: Path) -> dict[str, Any]:
    """The record, seal included; raises A3Error where it is not the one that was written."""
    if not isinstance(record, dict) or SEAL not in record:
        found = f"no {SEAL}" if isinstance(record, dict) else type(record).__name__
        raise A3Error(
            f"{path}: found {found}, expected a JSON object with its hash under {SEAL}: written "
            "by another version of a3, or by something else. Delete it and build it again."
        )
    expected = content_hash({key: value for key, value in record.items() if key != SEAL})
    if record[SEAL] != expected:
        raise A3Error(
            f"{path}: changed since it was written: its {SEAL} is {record[SEAL]!r}, its content's "
            f"{expected}. Delete it and build it again."
        )
    return record


def content_hash(record: dict[str, Any]) -> str:
    """Hex SHA-256 of a record as JSON, however it is spaced on disk."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content; of a large one only once while it stays as it is."""
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if stat.st_size < SMALL or key not in _hashes:
        with path.open("rb") as stream:
            _hashes[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _hashes[key]
