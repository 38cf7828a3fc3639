"""What rows of a table need: statistics, results, and options of commands."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from a3.artifacts.places import Place, SurgeryPlace
from a3.experiments.rows import kinds_of
from a3.rxx.kinds import SPECTRA_KINDS
from a3.solutions.surgeries import find_surgery

BOS_OPTIONS = {True: "--bos", False: "--no-bos", "once": "--bos-once"}


def spectra_are_free(rows: Sequence[Mapping[str, str]]) -> bool:
    """Whether the rows already need all statistics from which spectra are computed."""
    return set(SPECTRA_KINDS) <= set(kinds_of(rows))


def kinds_by_calibration(
    rows: Sequence[Mapping[str, str]], surgeries: Sequence[Mapping[str, str]] = ()
) -> dict[str, list[str]]:
    """The kinds of statistics that each calibration needs, sorted: what one pass has to collect."""
    spectra = SPECTRA_KINDS if spectra_are_free(rows) else ()
    found: dict[str, set[str]] = {}
    for name in dict.fromkeys(row["calibration"] for row in rows):
        found[name] = {*spectra, *kinds_of([row for row in rows if row["calibration"] == name])}
    for row in surgeries:
        found.setdefault(row["calibration"], set()).update(find_surgery(row["mode"]).kinds)
    return {name: sorted(kinds) for name, kinds in found.items()}


def is_partly_collected(folder: Path, kinds: Iterable[str]) -> bool:
    """Whether a folder of Rxx, or one of its shards, has some of these kinds but not all."""
    wanted = set(kinds)
    for place in (folder, *folder.glob("shards/*")):
        there = {kind for kind in wanted if (place / f"{kind}.safetensors").exists()}
        if there and there != wanted:
            return True
    return False


def evaluations(places: Iterable[Place], results: Path, evaluate: Mapping[str, Any]) -> list[str]:
    """Every input file of a table of these rows: records of weights, scores and texts."""
    found: list[Path] = []
    for place in places:
        found.append(place.weights(results))
        found += [place.perplexity(results, name) for name in evaluate["perplexity"]]
        found += [place.harness(results, name) for name in evaluate["harness"]]
        if isinstance(place, SurgeryPlace):
            found.append(place.generation(results))
        elif "fit" in evaluate and not place.is_dense:
            found.append(place.fit(results))
    return [str(path) for path in found]


def frontiers(places: Iterable[Place], results: Path, evaluate: Mapping[str, Any]) -> list[str]:
    """The frontiers of these rows, where the configuration asks for them; each once."""
    found = [place.frontier(results) for place in places] if evaluate["frontier"] else []
    return [str(path) for path in dict.fromkeys(found) if path]


def option_words(entry: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Options of the command line from an entry: {"block_length": 8} gives --block-length 8.

    Missing keys and false flags give no option.
    """
    words: list[str] = []
    for name in names:
        option, value = f"--{name.replace('_', '-')}", entry.get(name)
        if name == "bos":
            words.append(BOS_OPTIONS[entry[name]])
        elif isinstance(value, list):
            words += [option, *value]
        elif isinstance(value, bool):
            words += [option] if value else []
        elif name in ("apply_chat_template", "system_instruction") and name in entry:
            # The user's text may begin with a hyphen.
            words.append(f"{option}={value}")
        elif name in entry:
            words += [option, str(value)]
    return words
