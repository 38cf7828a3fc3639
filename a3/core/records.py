"""Sealed JSON records, and the records beside files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.files import read_record


@dataclass(frozen=True)
class Record:
    """A JSON file and its content; `record["size.dense"]` looks a nested key up."""

    path: Path
    data: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        """The value at a dotted key; raises A3Error that names the file and the key."""
        value: Any = self.data
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                raise A3Error(
                    f"{self.path}: expected the key {key}, found none. "
                    "Delete the file and build it again."
                )
            value = value[name]
        return value

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read a sealed record; A3Error, with the file, when it is missing, broken or changed."""
        return cls(path, read_record(path))


def timing(path: Path) -> Path:
    """The timing record beside a result: X.timing.json for X.json, timing.json for approx.json."""
    if path.name == "approx.json":
        return path.with_name("timing.json")
    return path.with_name(f"{path.stem}.timing.json")
