"""Shell completion of commands, options, modes, names of the catalogue, and files.

Imported only if a shell asks for completions; argcomplete then sets the variable _ARGCOMPLETE.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import argcomplete
from argcomplete.completers import ChoicesCompleter, FilesCompleter, SuppressCompleter

from a3.cli.arguments import parsers
from a3.core.files import load_yaml
from a3.experiments.entries import CATALOGUE
from a3.rxx.kinds import KINDS
from a3.solutions.modes import COMPONENTS, DENSE, MARKED, METRICS, MODES, SHARED
from a3.solutions.surgeries import SURGERIES

FILES = FilesCompleter()


def complete(top: argparse.ArgumentParser) -> None:
    """Answer the shell and exit; returns only if no shell asks for completions."""
    for one in parsers(top):
        for action in one._actions:
            if completer := completer_of(action, one):
                action.completer = completer  # type: ignore[attr-defined]
    # An option without a completer takes a number or JSON, so files must not be offered.
    argcomplete.autocomplete(top, default_completer=SuppressCompleter())


def completer_of(action: argparse.Action, one: argparse.ArgumentParser) -> Callable | None:
    """What an argument may be; None if argparse knows its choices, or where nothing does."""
    entries = one.get_default("entries") or {}
    if action.dest in entries:
        return Names(list(load_yaml(CATALOGUE)[entries[action.dest]]))
    if action.dest in COMPONENTS:
        shared = [mode + SHARED for mode in MARKED[action.dest]]
        return ChoicesCompleter([*MODES[action.dest], *shared, DENSE])
    if action.dest == "mode":
        return ChoicesCompleter(list(SURGERIES))
    if action.dest == "beside":
        return ChoicesCompleter(list(METRICS))
    if action.dest == "out" and one.prog == "a3 collect":
        return Statistics()
    return FILES if action.type is Path else None


class Names:
    """Names of the catalogue, and files beside them."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, prefix: str, **options: Any) -> list[str]:
        """Those that start with `prefix`."""
        found = [name for name in self.names if name.startswith(prefix)]
        return found + list(FILES(prefix=prefix, **options))


class Statistics:
    """Files of statistics, named by their kind, in any folder."""

    def __call__(self, prefix: str, **options: Any) -> list[str]:
        """FOLDER/<kind>.safetensors for the folder that `prefix` names, and folders."""
        folder = prefix[: prefix.rfind("/") + 1]
        names = [f"{folder}{kind}.safetensors" for kind in KINDS]
        return [*filter(lambda name: name.startswith(prefix), names), *FILES(prefix=prefix)]
