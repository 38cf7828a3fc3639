"""Atomic writing of files and folders, and their content hashes."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from a3.core.errors import A3Error

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# A record's key for the hash of all its other keys.
SEAL = "sha256"

# Records that list, under "files", the content that a stage wrote to a folder.
RECORDS = ("arch.json", "approx.json", "train.json", "export.json")

# Every folder that a stage made has this copy of its stage and files. Snakemake deletes the
# records, which are outputs, before it repeats a stage.
HIDDEN_SEAL = ".a3.json"

# Smaller files are hashed each time; larger ones use the cache.
SMALL = 2**20

# Hash by device, inode, size, and times of change: of the content, which programs can set, and of
# the inode, which they cannot.
_hashes: dict[tuple[int, int, int, int, int], str] = {}


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` only if the block succeeds.

    The temporary name is unique to the process, so two writers never share a partial file. Raises
    A3Error if the disk is full or the folder cannot be written; no file is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise A3Error(
            f"{path}: cannot write: {error.strerror}. Free some space or choose another path."
        ) from error
    temporary = Path(name)
    try:
        with named({temporary: path}):
            yield temporary
        permit(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_error(error):
            said = str(error).replace(str(temporary), str(path))
            raise A3Error(f"{path}: cannot write: {said}. Free some space.") from error
        raise


class Seal(NamedTuple):
    """Identifies the stage that wrote a folder: the name of the folder's record, and its stage."""

    record: str
    stage: str


@contextmanager
def whole_folder(path: Path, seal: Seal | None = None, of: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it replaces `path` only if the block succeeds.

    An existing folder is replaced only if it is empty, or if it has the `seal` and contains only
    files that its record (or HIDDEN_SEAL, if the record was deleted) names. A folder that is,
    contains or lies in one of the model folders `of` is never replaced. If several writers run at
    once, the folder of the last one to finish stays. Raises A3Error for other folders, if the disk
    is full, and if the folder cannot be written. The message names `path`, not the temporary
    folder. No file is left behind.
    """
    require_apart(path, of, whole=True)
    require_replaceable(path, seal)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise A3Error(
            f"{path}: cannot write: {error.strerror}. Free some space or choose another path."
        ) from error
    try:
        with named({temporary: path}):
            yield temporary
        if seal is not None:
            seal_folder(temporary, seal.record)
        for made in (temporary, *temporary.iterdir()):
            permit(made)
        # Check again: hours may have passed.
        require_replaceable(path, seal)
        replace_folder(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_error(error):
            said = str(error).replace(str(temporary), str(path))
            raise A3Error(f"{path}: cannot write: {said}. Free some space.") from error
        raise


@contextmanager
def hidden_folder(path: Path, known: Mapping[str, Path | str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path` and remove it at the end.

    Error messages use paths that the user knows. For a file named in `known` that is its value, for
    all other files it is `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise A3Error(
            f"{path}: cannot write: {error.strerror}. Free some space or choose another path."
        ) from error
    with made as name:
        work = Path(name)
        with named({work / inside: said for inside, said in known.items()} | {work: path}):
            yield work


@contextmanager
def named(places: Mapping[Path, Path | str]) -> Iterator[None]:
    """Replace temporary paths in error messages by the paths that the user knows."""
    try:
        yield
    except A3Error as error:
        said = str(error)
        for place, known in places.items():
            for spelled in (str(place.resolve()), str(place)):
                said = said.replace(spelled, str(known))
        if said == str(error):
            raise
        raise A3Error(said) from error


def require_apart(path: Path, of: Iterable[Path], whole: bool) -> None:
    """Raise A3Error if writing `path` would change its inputs `of`, or if it is no valid path.

    Links and `..` are resolved. `path` must not be one of `of`, nor lie in a folder of `of`. If
    `path` is a `whole` folder, it must not contain any of `of`, and must not be or contain the
    working folder.
    """
    require_place(path)
    target = path.resolve()
    if whole and (target == Path.cwd() or target in Path.cwd().parents):
        raise A3Error(f"{path}: is or holds the working folder. Name another path.")
    for other in of:
        source = other.resolve()
        if target == source:
            raise A3Error(f"{path}: is an input and would be overwritten. Name another path.")
        if whole and target in source.parents:
            raise A3Error(f"{path}: holds {other}, which is an input. Name another path.")
        if source in target.parents:
            raise A3Error(f"{path}: lies in {other}, which is an input. Name a path outside of it.")
        for link, to in links_in(other):
            if target == to:
                raise A3Error(f"{path}: {link}, an input, links to it. Name another path.")
            if whole and target in to.parents:
                raise A3Error(f"{path}: holds {to}, which {link} links to. Name another path.")


def links_in(source: Path) -> Iterator[tuple[Path, Path]]:
    """Each link in or at `source`, and each path on the way to its target, for chains of links."""
    for link in (source, *source.rglob("*")):
        step, seen = link, set()
        while step.is_symlink() and step not in seen:  # some links form loops
            seen.add(step)
            to = step.parent / step.readlink()
            step = to.parent.resolve() / to.name
            yield link, step


def require_place(path: Path) -> None:
    """Raise A3Error if `path` is not a possible path of a file or folder."""
    try:
        if path.is_symlink():
            raise A3Error(
                f"{path}: is a link; expected a file, a folder or nothing. Name another path."
            )
        resolved = path.resolve()
        # Look at the folder above: `path` itself may just be replaced by another writer.
        if resolved.parent.exists() and not path.parent.exists():
            raise A3Error(f"{path}: leads through a folder that is not there. Write {resolved}.")
        there = next((folder for folder in resolved.parents if folder.exists()), resolved)
        longest = os.pathconf(there, "PC_NAME_MAX")
        # The temporary name is longer than the final one.
        names = [*resolved.relative_to(there).parts[:-1], f".{path.name}.timing.json.12345678"]
        if any(len(os.fsencode(name)) > longest for name in names):
            raise A3Error(f"{path}: the name is too long. Name a shorter one.")
    except (OSError, RuntimeError) as error:  # loops of links raise RuntimeError
        reason = error.strerror if isinstance(error, OSError) else error
        raise A3Error(f"{path}: cannot write: {reason}. Name another path.") from error
    if not there.is_dir():
        raise A3Error(f"{path}: cannot write: {there} is a file. Name another path.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise A3Error(f"{path}: cannot write: {there} may not be written. Name another path.")


def require_replaceable(path: Path, seal: Seal | None) -> None:
    """Raise A3Error unless `path` is free, an empty folder, or a sealed one without other files.

    If another writer of the same stage replaces the folder meanwhile, it is checked again.
    """
    while True:
        before = inode(path)
        try:
            why = None if before is None else why_kept(path, seal)
        except (OSError, A3Error) as error:
            why = f"and cannot be told from another's ({error})"
        if inode(path) == before:
            break
    if why is not None:
        raise A3Error(f"{path}: exists already, {why}. Name another folder, or delete it first.")


def inode(path: Path) -> tuple[int, int] | None:
    """Identifies a folder, so that a replacement is noticed; None if there is no folder."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    # The system reuses inode numbers, so compare the time as well.
    return found.st_ino, found.st_ctime_ns


def why_kept(path: Path, seal: Seal | None) -> str | None:
    """Why a folder may not be replaced; None if it may."""
    if not path.is_dir():
        return "a file or link, expected a folder or nothing"
    found = sorted(path.iterdir())
    if not found:
        return None
    if seal is None:
        return f"and holds {found[0].name}"
    records = [path / name for name in (seal.record, HIDDEN_SEAL) if (path / name).is_file()]
    if not records:
        return f"and was not written by this stage: it holds {found[0].name} and no {seal.record}"
    record = read_record(records[0])
    stage, files = (record.get("provenance") or {}).get("stage"), record.get("files") or {}
    if stage != seal.stage:
        return f"and was written by another stage ({stage})"
    for one in sorted(path.rglob("*")):
        name = one.relative_to(path).as_posix()
        if one.is_dir() and any(named.startswith(f"{name}/") for named in files):
            continue
        if one.is_file() and name in (seal.record, HIDDEN_SEAL, "timing.json"):
            read_record(one)
        elif name not in files or one.is_dir():
            return f"and holds {name}, which {seal.record} does not name"
        # A link has no content of its own, and its target stays.
        elif not one.is_symlink() and sha256(one) != files[name]:
            return f"and {name} in it was changed since it was written"
    return None


def seal_folder(path: Path, record: str) -> None:
    """Copy the stage and files in a folder's record to a hidden file."""
    said = read_record(path / record)
    kept = {"provenance": {"stage": said["provenance"]["stage"]}, "files": said["files"]}
    write_record(path / HIDDEN_SEAL, kept)


def replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`; repeat while other writers put their folder there."""
    while True:
        try:
            new.replace(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # Rename the existing folder first, so that no writer deletes the files of another.
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            path.replace(aside)
        except FileNotFoundError:
            pass  # another writer was quicker
        finally:
            shutil.rmtree(aside)


def permit(path: Path) -> None:
    """Give a file or folder the usual permissions; temporary files are private by default."""
    umask = os.umask(0)
    os.umask(umask)
    if not path.is_symlink():
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def is_disk_error(error: BaseException) -> bool:
    """Whether `error` says that the disk is full or a quota is used up.

    safetensors raises its own exception, with the error code only in the text.
    """
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    code = (
        re.search(r"os error (\d+)", str(error)) if "Safetensor" in type(error).__name__ else None
    )
    return code is not None and int(code[1]) in DISK_ERRORS


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON with sorted keys."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises A3Error that names the file if it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise A3Error(f"{path}: no such file. Correct the path.") from None
    # Raised for bad JSON or UTF-8, numbers of thousands of digits, and very deep nesting.
    except (ValueError, RecursionError) as error:
        raise A3Error(f"{path}: not valid JSON ({error}). Delete it and build it again.") from error
    except OSError as error:
        raise A3Error(f"{path}: cannot be read ({error.strerror}). Correct the path.") from error


def load_yaml(path: Path) -> Any:
    """Parse a YAML file; raises A3Error that names the file and the line."""
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise A3Error(f"{path}: no such file. Correct the path.") from None
    # ValueError is raised for text that is not UTF-8 and for impossible dates.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise A3Error(f"{path}: not valid YAML: {error}") from error


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record with its seal, like `write_json`; raises A3Error if `path` is not allowed."""
    if path.exists() and SEAL not in (read_json(path) if is_json(path) else {}):
        raise A3Error(f"{path}: exists already, and is not a record of a3. Name another path.")
    write_json(path, seal(record))


def is_json(path: Path) -> bool:
    """Whether a file may be an object of JSON, by its first character."""
    with path.open("rb") as stream:
        return stream.read(1) == b"{"


def read_record(path: Path) -> dict[str, Any]:
    """Read a sealed record; raises A3Error that names the file as `read_json` and `unseal` do."""
    return unseal(read_json(path), path)


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the hash of its content under SEAL."""
    return record | {SEAL: content_hash(record)}


def unseal(record: Any, path: Path) -> dict[str, Any]:
    """The record, including its seal; raises A3Error if its content has changed since."""
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
    """Hex SHA-256 of a record's content; white space on disk does not matter."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content; a large file is hashed again only if it has changed."""
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if stat.st_size < SMALL or key not in _hashes:
        with path.open("rb") as stream:
            _hashes[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _hashes[key]
