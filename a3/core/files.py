"""Files that appear whole or not at all, and their content hashes."""

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

# The key of a record under which the hash of all its other keys stands.
SEAL = "sha256"

# What says of a folder, under "files", which content a stage wrote.
RECORDS = ("arch.json", "approx.json", "train.json", "export.json")

# In every folder that a stage made: its stage and files once more, for a record that is gone.
# Snakemake deletes the records, which are outputs, before it has a stage make a folder again.
HIDDEN_SEAL = ".a3.json"

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
    """How a folder says which stage wrote it: the name of its record, and that record's stage."""

    record: str
    stage: str


@contextmanager
def whole_folder(path: Path, seal: Seal | None = None, of: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it replaces `path` only when the block succeeds.

    Only a folder that is empty or has the `seal`, and nothing in it that its record does not name
    (HIDDEN_SEAL, where the record was deleted), is replaced, and never one that is, holds or lies
    in a model folder that it is made `of`. Of several writers at once, the last to be done wins,
    whole. Raises A3Error otherwise, when the disk is full or the folder cannot be written; its
    message names `path` and not the temporary folder. Nothing is left behind.
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
        # Hours may have passed.
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
    """Yield a temporary folder beside `path`, which is removed at the end.

    Errors name what the user knows: for each of the names of `known` in the folder its value, and
    for all else `path`.
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
    """Let errors name each temporary place, and what is in it, by what the user knows it by."""
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
    """Raise A3Error if writing `path` would change what it is made `of`, or the place is none.

    Links and `..` are followed. It may be none of `of`, and lie in none of these that are folders.
    A `whole` folder may hold none of them, and not be or hold the working folder.
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
    """Each link in or at `source`, and each place that it leads through: links of links, too."""
    for link in (source, *source.rglob("*")):
        step, seen = link, set()
        while step.is_symlink() and step not in seen:  # some are loops
            seen.add(step)
            to = step.parent / step.readlink()
            step = to.parent.resolve() / to.name
            yield link, step


def require_place(path: Path) -> None:
    """Raise A3Error if no file or folder can be made at `path`, whatever is there now."""
    try:
        if path.is_symlink():
            raise A3Error(
                f"{path}: is a link; expected a file, a folder or nothing. Name another path."
            )
        resolved = path.resolve()
        if resolved.exists() and not path.exists():
            raise A3Error(f"{path}: leads through a folder that is not there. Write {resolved}.")
        there = next((folder for folder in resolved.parents if folder.exists()), resolved)
        longest = os.pathconf(there, "PC_NAME_MAX")
        # What is written has a longer name at first.
        names = [*resolved.relative_to(there).parts[:-1], f".{path.name}.timing.json.12345678"]
        if any(len(os.fsencode(name)) > longest for name in names):
            raise A3Error(f"{path}: the name is too long. Name a shorter one.")
    except (OSError, RuntimeError) as error:  # loops of links are of type RuntimeError
        reason = error.strerror if isinstance(error, OSError) else error
        raise A3Error(f"{path}: cannot write: {reason}. Name another path.") from error
    if not there.is_dir():
        raise A3Error(f"{path}: cannot write: {there} is a file. Name another path.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise A3Error(f"{path}: cannot write: {there} may not be written. Name another path.")


def require_replaceable(path: Path, seal: Seal | None) -> None:
    """Raise A3Error unless `path` is free, an empty folder, or one with the seal and no more.

    Another writer of the same stage may replace the folder meanwhile: then it is looked at again.
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
    """What tells a folder from one that is put in its place; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    # Numbers are used again.
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
        # A link holds nothing: what it points to stays.
        elif not one.is_symlink() and sha256(one) != files[name]:
            return f"and {name} in it was changed since it was written"
    return None


def seal_folder(path: Path, record: str) -> None:
    """Say once more, in a hidden file, what a folder's record says of its stage and files."""
    said = read_record(path / record)
    kept = {"provenance": {"stage": said["provenance"]["stage"]}, "files": said["files"]}
    write_record(path / HIDDEN_SEAL, kept)


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
        raise A3Error(f"{path}: no such file. Correct the path.") from None
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
        raise A3Error(f"{path}: no such file. Correct the path.") from None
    # Not UTF-8 and dates that there are not are of type ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise A3Error(f"{path}: not valid YAML: {error}") from error


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record with its seal as `write_json` does; A3Error if it is no record's place."""
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
    """The record, seal included; raises A3Error if it is not the one that was written."""
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
