"""Types of command-line options: values are checked while they are parsed, before anything runs."""

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from a3.core.dtypes import RUN_DTYPES
from a3.core.errors import A3Error
from a3.jobs.settings import SETTINGS, settings_of

# No machine has more tokens, blocks, threads …, and C libraries can still count so far.
MOST = 10**12

# torch would start more without a warning and use up the threads of the system.
MOST_THREADS = 1024

# Limit of numpy's generator, to which lm-eval passes the seed.
LARGEST_SEED = 2**32 - 1


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments like every other error: one line, exit status 1.

    Options without another type are read by `text`, and paths by `place`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", None, text)
        self.register("type", Path, place)

    def add_subparsers(self, **options: Any) -> Any:
        """The action; it is given all words of a command, which that reads itself."""
        action = super().add_subparsers(**options)
        action.type = str
        return action

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """What was found, and no rest: a command refuses unknown words itself, by its own name."""
        found, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Raise A3Error."""
        raise A3Error(f"{message}. `{self.prog} -h` shows the arguments.")


def count(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """An integer from `least` to `most`."""

    def read(word: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", word) or not least <= int(word) <= most:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {least} to {most}, found {shown(word)}"
            )
        return int(word)

    return read


def positive(word: str) -> float:
    """A number above 0: 10, 0.5, 1e-4."""
    written = re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?(e-?[0-9]{1,2})?", word)
    if written is None or not float(word) > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {shown(word)}")
    return float(word)


def share(word: str) -> float:
    """A number between 0 and 1."""
    if not (number := positive(word)) < 1:
        raise argparse.ArgumentTypeError(f"expected a number below 1, found {shown(word)}")
    return number


def count_or_all(word: str) -> int | str:
    """A number of tokens, or all."""
    return word if word == "all" else count()(word)


def shard(word: str) -> str:
    """One of several shards: 0of4."""
    if not re.fullmatch(r"[0-9]{1,9}of[0-9]{1,9}", word):
        raise argparse.ArgumentTypeError(f"expected 0of4, 1of4 …, found {shown(word)}")
    return word


def unicode(word: str) -> str:
    """Text in UTF-8: the shell may give other bytes, which records cannot hold."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"{os.fsencode(word)!r} is not UTF-8. Rename the file or correct the text"
        ) from None
    return word


def text(word: str) -> str:
    """Text of at least one character: an unset shell variable gives an empty argument."""
    if not word:
        raise argparse.ArgumentTypeError("expected text, found ''")
    return unicode(word)


def place(word: str) -> Path:
    """A path that is valid UTF-8 and not empty; Path itself would read "" as the working folder."""
    return Path(text(word))


def device(word: str) -> str:
    """The name of a device; `require_device` later asks torch whether the device exists."""
    if not re.fullmatch(r"[a-z]+(:[0-9]{1,4})?", word):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, cuda:1 …, found {shown(word)}")
    return word


def read_json(word: str) -> Any:
    """JSON given as an argument; raises A3Error if it is not JSON or contains NaN or Infinity."""
    try:
        return json.loads(word, parse_constant=refuse_constant)
    # Numbers of thousands of digits, and endless nesting.
    except (ValueError, RecursionError) as error:
        raise A3Error(f"argument {shown(word)} is not valid JSON: {error}") from error


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which are not JSON, although Python reads them."""
    raise ValueError(f"{name} is no number")


def shown(word: str) -> str:
    """An argument as messages show it."""
    return repr(word) if len(word) < 200 else f"{word[:200]!r} …"


def rows(
    *columns: str, others: tuple[str, ...] | None = None, least: int = 1
) -> Callable[[str], list[dict[str, str]]]:
    """JSON of the rows of a table: each has all of `columns` and possibly some of `others`.

    If `others` is None, any other columns are allowed. Values are text; numbers become text. There
    must be at least `least` rows.
    """

    def read(word: str) -> list[dict[str, str]]:
        found = read_json(word)
        entries: list[Any] = found if isinstance(found, list) and len(found) >= least else [None]
        for row in entries:
            cells = isinstance(row, dict) and all(
                type(v) in (str, int, float) for v in row.values()
            )
            if not cells or not set(columns) <= row.keys():
                raise A3Error(
                    f"argument {shown(word)}: expected a list of objects with the keys "
                    f"{', '.join(columns)}, whose values are text."
                )
            if others is not None and (unknown := sorted(row.keys() - {*columns, *others})):
                raise A3Error(
                    f"argument {shown(word)}: unknown key {unknown[0]!r} in a row; expected "
                    f"{', '.join((*columns, *others))}."
                )
        return [{key: str(value) for key, value in row.items()} for row in entries]

    return read


def mapping(word: str) -> dict[str, Any]:
    """JSON of an object."""
    found = read_json(word)
    if not isinstance(found, dict):
        raise A3Error(f"argument {shown(word)}: expected an object ({{…}}).")
    return found


# Of a job's settings: what they have to be.
NUMBERS = ("tokens", "block_length", "items", "shots", "batch", "prompt", "new_tokens", "repeats")


def jobs(word: str) -> list[dict[str, Any]]:
    """JSON of the jobs that a workflow plans."""
    found = read_json(word)
    for job in found if isinstance(found, list) else [None]:
        if why := wrong_job(job):
            raise A3Error(f"argument {shown(word)}: expected a list of jobs: {why}.")
    return found


def wrong_job(job: Any) -> str | None:
    """What is wrong with one job; None if it is valid."""
    if not isinstance(job, dict) or not {"model", "stage", "settings"} <= job.keys():
        return "each has model, stage and settings"
    if job.keys() - {"model", "stage", "settings", "count"} or not isinstance(job["model"], str):
        return "each has model (text), stage, settings, and count"
    settings = job["settings"]
    if job["stage"] not in SETTINGS or not isinstance(settings, dict):
        return f"stage is one of {', '.join(SETTINGS)}, and settings an object"
    needed = settings_of(job["stage"])
    if settings.keys() != set(needed):
        return f"settings of {job['stage']} are {', '.join(needed)}"
    numbers = [settings["threads"], settings.get("jobs", 1), job.get("count", 1)]
    if any(type(number) is not int or not 1 <= number <= MOST for number in numbers):
        return "threads, jobs and count are integers from 1 on"
    if any(type(settings[key]) is not int or settings[key] < 0 for key in NUMBERS if key in needed):
        return f"{', '.join(NUMBERS)} are integers"
    row = settings.get("row", {})
    if not isinstance(row, dict) or (row and {"qk", "ov", "mlp", "ratio"} - row.keys()):
        return "row has qk, ov, mlp and ratio, or nothing"
    if settings.get("dtype", "float32") not in RUN_DTYPES or not isinstance(
        settings["device"], str
    ):
        return f"dtype is one of {', '.join(RUN_DTYPES)}, and device a name"
    return None
