"""Which files of a folder a3 publish shares, and in which words: no path of this machine."""

import json
import re
from pathlib import Path
from typing import Any

from a3.artifacts.card import ADDRESS, own_text, sign
from a3.core.files import (
    HIDDEN_SEAL,
    RECORDS,
    SEAL,
    read_json,
    read_record,
    seal_folder,
    sha256,
    write_json,
    write_record,
)
from a3.models.checkpoint import CARD, Checkpoint, recorded_files
from a3.models.inputs import TEMPLATES, files_of
from a3.models.packing import CODE
from a3.models.readable import INDEX
from a3.models.tokenizer import FILES as TOKENIZER_FILES

# Files that belong to a model, besides its weights, records and a3's code.
SHARED = (
    *("config.json", "generation_config.json", INDEX, CARD, "source.json"),
    *TOKENIZER_FILES,
)
PATTERNS = ("tokenizer.model.v*", f"{TEMPLATES}/*.jinja", "LICENSE*", "NOTICE*")

CODE_NAMES = tuple(Path(str(module.__file__)).name for module in CODE)

# Configs, and their keys for the folder from which they were loaded.
CONFIGS = ("config.json", "tokenizer_config.json")
LOADED_FROM = ("_name_or_path", "name_or_path")


def files_to_share(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files of a folder to upload by their names in it, and names of those left out.

    These are the weights, and files that belong to a model by their names; with a record, only
    those that it names.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    recorded = recorded_files(folder)
    own = {*RECORDS, HIDDEN_SEAL}
    allowed = {*SHARED, *own, *CODE_NAMES, *Checkpoint(folder).files()}

    def shared(name: str) -> bool:
        return (not recorded or name in recorded or name in own) and (
            name in allowed or any(Path(name).match(pattern) for pattern in PATTERNS)
        )

    files = {name: path for name, path in paths.items() if shared(name)}
    return files, sorted(paths.keys() - files.keys())


def rewritten(
    folder: Path, repo: str, work: Path, shared: dict[str, Path]
) -> tuple[dict[str, Path], list[str]]:
    """Copies in `work` of what is uploaded in other words, by name; and the paths that they hide.

    The card's example names `repo`, if the card is a3's. Records name a path of this machine by
    its last part only, and configs name no folder from which they were loaded. Records and seal
    have the hashes of these copies, and name the `shared` files.
    """
    hidden: list[str] = []
    places = places_of(folder)
    if (text := own_text(folder / CARD)) is not None:
        text = text.replace(ADDRESS, json.dumps(repo))
        (work / CARD).write_text(text + sign(text))
    if (folder / "source.json").exists():
        source = read_json(folder / "source.json")
        write_json(work / "source.json", without_paths(source, hidden, places))
    for name in CONFIGS:
        if (folder / name).exists():
            content = read_json(folder / name)
            if (found := without_names(content, hidden, places)) != content:
                write_json(work / name, found)
    files = {path.name: sha256(path) for path in work.iterdir()}
    for name in RECORDS:
        if (folder / name).exists():
            read = read_record(folder / name)
            record = without_paths({**read, "files": {}}, hidden, places)
            known = {
                one: files.get(one, found) for one, found in read["files"].items() if one in shared
            }
            own = {key: value for key, value in record.items() if key != SEAL}
            write_record(work / name, own | {"files": known})
            if (folder / HIDDEN_SEAL).exists():
                seal_folder(work, name)
            break
    return {path.name: path for path in work.iterdir()}, sorted(set(hidden))


def places_of(folder: Path) -> re.Pattern[str]:
    """Finds a path in a text that begins with the user's home, the working folder or `folder`."""
    found = {one for path in (Path.home(), Path.cwd(), folder) for one in (path, path.resolve())}
    spelled = {str(path) for path in found if path.is_absolute() and len(path.parts) > 1}
    longest = sorted(spelled, key=len, reverse=True)
    return re.compile(rf"(?:{'|'.join(map(re.escape, longest))})(?![\w.-])[^\s\"',:;()]*")


def without_paths(value: Any, hidden: list[str], places: re.Pattern[str], key: str = "") -> Any:
    """A JSON value with the last part of each path of this machine, which `hidden` collects.

    These are what stands under the key "path", absolute paths, and what `places` finds in texts.
    """
    if isinstance(value, dict):
        return {name: without_paths(one, hidden, places, name) for name, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one, hidden, places, key) for one in value]
    if not isinstance(value, str):
        return value
    if Path(value).is_absolute() or (key == "path" and len(Path(value).parts) > 1):
        hidden.append(value)
        return Path(value).name
    return hide(value, hidden, places)


def without_names(value: Any, hidden: list[str], places: re.Pattern[str]) -> Any:
    """The content of a config without the folder that it was loaded from, and without `places`."""
    if isinstance(value, dict):
        hidden += [str(value[key]) for key in LOADED_FROM if value.get(key)]
        kept = {key: one for key, one in value.items() if key not in LOADED_FROM}
        return {key: without_names(one, hidden, places) for key, one in kept.items()}
    if isinstance(value, list):
        return [without_names(one, hidden, places) for one in value]
    return hide(value, hidden, places) if isinstance(value, str) else value


def hide(text: str, hidden: list[str], places: re.Pattern[str]) -> str:
    """A text with the last parts of the paths that `places` finds, which `hidden` collects."""
    hidden += places.findall(text)
    return places.sub(lambda found: Path(found[0]).name, text)
