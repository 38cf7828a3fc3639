"""What each command writes. A command may overwrite only what the same stage wrote.

The command line checks this before it computes anything. A file may be written if the path is free
or the existing file carries the stage's seal. Such a file is a record, statistics, or a file that
the record beside it names and that has not changed since. The same holds for folders
(`whole_folder` checks again). Files that carry no seal (.csv, .md, .html, .gguf, .whl) are never
overwritten.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.files import (
    Seal,
    is_json,
    read_record,
    require_apart,
    require_replaceable,
    sha256,
    unseal,
)
from a3.core.work import RECORD, work_of

# Files that a3 wrote do not have longer headers.
LONGEST_HEADER = 100 * 2**20

# Ending of the separate record with the seconds that a stage took.
TIMING = "timing"

# Files and folders that other rules write to the folder of a table.
TABLE = (
    *("results.csv", "comparisons.csv", "seeds.csv", "timings.csv", "results.md", "figures"),
    *("speed.csv", "speed.md", "surgery.csv", "surgery_layers.csv", "surgery.md"),
    *("surgery_figures", "report.html"),
)

# Folders from which a command reads some files, and into which it may also write.
SHARED = ("results", "wheels", "tables", "rxx")


@dataclass(frozen=True)
class Folder:
    """A folder that is written as a whole; an existing one is replaced only if it has the seal."""

    seal: Seal | None = None

    def check(self, path: Path, sources: list[Path], shared: list[Path]) -> None:
        """Raise A3Error if it may not be written."""
        require_apart(path, sources, whole=True)
        for folder in shared:
            require_outside(path, folder)
        require_replaceable(path, self.seal)


class Resumed(Folder):
    """A folder that is made with a work folder; with that, it may be there already.

    The command itself compares the two: it may have been killed after its last step.
    """

    def check(self, path: Path, sources: list[Path], shared: list[Path]) -> None:
        """Raise A3Error if it may not be written."""
        for one in (path, work_of(path)):
            require_apart(one, sources, whole=True)
        if not (work_of(path) / RECORD).is_file():
            super().check(path, sources, shared)


@dataclass(frozen=True)
class File:
    """A file of one stage, and files beside it with the same stem: {".timing.json": stage}."""

    stage: str | None = None
    beside: tuple[tuple[str, str], ...] = ()
    suffix: str = ""

    def check(self, path: Path, sources: list[Path], _: list[Path]) -> None:
        """Raise A3Error if it may not be written."""
        require_file(path, self.stage, sources)
        if self.suffix not in ("", path.suffix):
            raise A3Error(
                f"{path}: expected a name that ends in {self.suffix}. Choose such a name."
            )
        for ending, stage in self.beside:
            require_file(path.with_suffix(ending), stage, sources)


@dataclass(frozen=True)
class Files:
    """Files with fixed names in a folder that may contain nothing else but `others`."""

    names: tuple[str, ...]
    others: tuple[str, ...]
    stage: str | None = None

    def check(self, path: Path, sources: list[Path], _: list[Path]) -> None:
        """Raise A3Error if one of them may not be written."""
        require_apart(path, [], whole=True)
        require_apart(path, [one for one in sources if one.is_dir()], whole=False)
        if path.exists() and not path.is_dir():
            raise A3Error(f"{path}: a file, expected a folder or nothing. Name another path.")
        known = (*self.names, *self.others)
        for one in sorted(path.iterdir()) if path.exists() else []:
            # Other stages may be writing files there, under hidden names.
            if not any(one.match(name) or one.match(f".{name}.*") for name in known):
                raise A3Error(
                    f"{path}: exists already and holds {one.name}, which is not of this stage. "
                    "Name another folder."
                )
        for name in self.names:
            require_file(path / name, self.stage, sources)


Target = Folder | File | Files


def check(target: Target, options: dict[str, Any]) -> None:
    """Raise A3Error if a command with these options may not write what they say under `out`."""
    sources, shared = read_by(options)
    out = options["out"] if isinstance(options["out"], list) else [options["out"]]
    if len({path.stem for path in out}) < len(out):
        raise A3Error(
            f"{', '.join(map(str, out))}: two files have the same name. Name each statistic once."
        )
    for path in out:
        target.check(path, sources, shared)


def read_by(options: dict[str, Any]) -> tuple[list[Path], list[Path]]:
    """Every path that a command reads, including folders into which it may also write."""
    sources: list[Path] = []
    shared: list[Path] = []
    for name, value in options.items():
        paths = [one for one in (value if isinstance(value, list) else [value])]
        if isinstance(value, dict):  # an entry of the catalogue
            source = value.get("source", {})
            paths = [Path(source["path"])] if "path" in source else []
        if name != "out":
            found = [one for one in paths if isinstance(one, Path)]
            (shared if name in SHARED else sources).extend(found)
    return sources, shared


def require_outside(path: Path, folder: Path) -> None:
    """Raise A3Error if a folder to be written is a folder that is read, or holds it."""
    target, source = path.resolve(), folder.resolve()
    if target == source or target in source.parents:
        raise A3Error(f"{path}: is or holds {folder}, which is an input. Name another path.")


def require_file(path: Path, stage: str | None, of: list[Path]) -> None:
    """Raise A3Error unless a file may be written at `path`, made `of` others, by a stage."""
    require_apart(path, of, whole=False)
    if path.is_dir():
        raise A3Error(f"{path}: a folder, expected a file or nothing. Name a file.")
    if path.exists() and (stage is None or stage_of(path) != stage):
        raise A3Error(
            f"{path}: exists already, and was not written by this command, or has changed since. "
            "Name another file, or delete it first."
        )


def stage_of(path: Path) -> str | None:
    """The stage whose seal a file carries; None if it has no seal or has changed."""
    try:
        if path.suffix == ".safetensors" and (said := metadata(path)):
            return stage_in(unseal(said, path))
        if path.suffix not in (".safetensors", ".jsonl") and is_json(path):
            return stage_in(read_record(path))
        return stage_beside(path)
    except (A3Error, OSError, ValueError):
        return None


def stage_in(record: dict[str, Any]) -> str | None:
    """The stage that wrote a record."""
    made = record.get("provenance") or record.get("said", {}).get("provenance") or record
    return made.get("stage") or (TIMING if "seconds" in record else None)


def stage_beside(path: Path) -> str | None:
    """The stage whose record lies beside the file and names it with its present hash."""
    for beside in (path.with_suffix(".json"), path.with_name("split.json")):
        if beside.is_file():
            record = read_record(beside)
            # A shard of a checkpoint has only one file.
            known = record.get("files") or {path.name: record.get("content_sha256")}
            if known.get(path.name) == sha256(path):
                return stage_in(record)
    return None


def metadata(path: Path) -> dict[str, Any] | None:
    """The metadata of statistics in a safetensors file; None for other files."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length)) if length < LONGEST_HEADER else {}
    said = header.get("__metadata__", {}).get("a3")
    return None if said is None else json.loads(said)


TIMED = ((".timing.json", TIMING),)

MODEL = Folder(Seal("arch.json", "model"))

TRAINED = Folder(Seal("train.json", "train"))

APPROXIMATED = Folder(Seal("approx.json", "approximate"))

QUANTISED = Folder(Seal("approx.json", "quantise"))

HEALED = Resumed(Seal("approx.json", "heal"))

OPERATED = Folder(Seal("approx.json", "surgery"))

EXPORTED = Folder(Seal("export.json", "hf"))

IN_SHAPE = Folder(Seal("export.json", "dense"))

ONNX = Folder(Seal("export.json", "onnx"))

# These have no seal, or are never written twice.
NEW = Folder()

COMPRESSED = Resumed()

STATISTICS = File("collect", TIMED, ".safetensors")

SHARD = File("approximate", ((".json", "approximate"),), ".safetensors")

LOSSES = File("losses", TIMED, ".safetensors")

ALLOCATION = File("allocate", TIMED)

FRONTIER = File("frontier", TIMED)

PERPLEXITY = File("perplexity", TIMED)

FIT = File("fit", TIMED)

HARNESS = File("harness", TIMED)

GENERATION = File("generation", TIMED)

SPEED = File("speed")

SPECTRA = File("spectra")

PLAIN = File()

DOCUMENTS = File("text", ((".json", "text"),), ".jsonl")

SPLIT = Files(
    ("dev.jsonl", "test.jsonl", "harness.jsonl", "calibration.jsonl", "split.json"),
    ("docs.jsonl", "docs.json"),
    "split",
)

ITEMS = Files(("items.jsonl", "items.json"), (), "items")

TABLES = Files(TABLE[:5], TABLE)

SPEED_TABLE = Files(("speed.csv", "speed.md"), TABLE)

SURGERY_TABLE = Files(("surgery.csv", "surgery_layers.csv", "surgery.md"), TABLE)

COMPARISON = Files(tuple(f"comparison{end}" for end in (".csv", ".md", ".svg", ".png")), ("*.csv",))
