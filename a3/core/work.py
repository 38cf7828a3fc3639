"""Work folders: what a long command has finished, so that the same command goes on after a kill.

A work folder is beside the output, under a name that says what it is. It has a sealed record of the
command that it was made for, and is locked while a command uses it.
"""

import errno
import fcntl
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.files import SEAL, read_record, require_place, whole_folder, write_record
from a3.core.progress import LOG

# The record of a work folder.
RECORD = "work.json"

LOCK = ".lock"


class WorkError(A3Error):
    """A work folder may not be used."""


def work_of(out: Path) -> Path:
    """The work folder of an output: `small.a3-work` beside `small`."""
    return out.parent / f"{out.name}.a3-work"


@contextmanager
def work_folder(
    out: Path,
    made_for: dict[str, Any],
    own: Callable[[Path], Iterable[str]],
    long: Iterable[str],
    fresh: bool = False,
) -> Iterator[Path]:
    """Yield the work folder of `out`, new or as a killed command left it; remove it at the end.

    `made_for` says what the command computes, and of what. `own` gives patterns for the names of
    all files that the command may write to the folder. After an error the folder stays if a file
    of the patterns `long` is in it: that was long work. If `fresh`, what is in it is not used.
    Raises WorkError for a folder that was not made by this command, has other files, was made for
    something else, or is in use.
    """
    work = work_of(out)
    require_place(work)
    if work.exists():
        require_own(work, own)
    else:
        with whole_folder(work) as made:
            write_record(made / RECORD, made_for)
    with locked(work):
        if fresh:
            remove(work, own, but=RECORD)
            write_record(work / RECORD, made_for)
        require_same(work, made_for)
        try:
            yield work
        except BaseException:
            if not any(next(work.glob(pattern), None) for pattern in long):
                remove(work, own)
            raise
        remove(work, own)


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Keep other commands out of a work folder; the lock ends with the process, however it ends."""
    with (work / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkError(
                f"{work}: another command is at work in it. Wait for it, or name another output."
            ) from None
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


def require_own(work: Path, own: Callable[[Path], Iterable[str]]) -> None:
    """Raise WorkError unless a folder is a work folder without foreign files."""
    if not (work / RECORD).is_file():
        raise WorkError(
            f"{work}: exists already, expected a work folder of this command, with {RECORD}. Name "
            "another output, or move it."
        )
    read_record(work / RECORD)
    if others := foreign(work, own):
        raise WorkError(
            f"{work}: holds {others[0]}, which is not of this command. Move it elsewhere."
        )


def require_same(work: Path, made_for: dict[str, Any]) -> None:
    """Raise WorkError, with the first difference, if a work folder was made for something else."""
    known = read_record(work / RECORD)
    for key in made_for | known:
        found, asked = known.get(key), made_for.get(key)
        if key != SEAL and found != asked:
            raise WorkError(
                f"{work}: was made for another command: {key} is {found!r}, now {asked!r}. Repeat "
                "that command to go on, or start over with --fresh."
            )


def foreign(work: Path, own: Callable[[Path], Iterable[str]]) -> list[str]:
    """Names of files in a work folder that the command did not write.

    Files of killed writers have hidden names.
    """
    patterns = [RECORD, *own(work)]
    inside = sorted(path.relative_to(work) for path in work.rglob("*"))
    return [
        path.as_posix()
        for path in inside
        if not any(part.startswith(".") for part in path.parts)
        and (not (work / path).is_dir() or (work / path).is_symlink())
        and not any(fnmatchcase(path.as_posix(), pattern) for pattern in patterns)
    ]


def remove(work: Path, own: Callable[[Path], Iterable[str]], but: str | None = None) -> None:
    """Delete a work folder, or all files in it but one; its record goes last.

    If there are foreign files meanwhile, the folder stays.
    """
    if others := foreign(work, own):
        LOG.warning(f"{work}: stays, since it holds {others[0]}, which is not of this command.")
        return
    for path in sorted(work.iterdir(), key=lambda path: path.name == RECORD):
        if path.name == but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if but is None:
        work.rmdir()
