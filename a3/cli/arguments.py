"""Arguments that several commands have, and what users name with them."""

import argparse
from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli import options as values
from a3.cli.options import DTYPES, LARGEST_SEED, MOST_THREADS, count
from a3.core.errors import A3Error
from a3.solutions.modes import COMPONENTS, NO_RATIO, PRESETS, SERVABLE, parse_ratio

# Cells of a table's rows, and what may stand beside them.
ROW = (*COMPONENTS, "ratio")


SEED = count(0, LARGEST_SEED)


EXPERIMENTS = values.rows("model", others=("calibration", *ROW, "quantise"))


SURGERIES = values.rows("model", "calibration", "mode", "size", others=())


# The keys of a3.texts.blocks.JOINS.
JOINS = ("empty-line", "space", "nothing")


# What every command reads as a text.
TEXT = ".txt, .md, .jsonl, .json, .csv, .tsv or .parquet (text, title), plain or .gz, or a folder"


def folder(path: Path) -> Path:
    """A model folder; raises A3Error where there is none, or a3 does not read it as a model."""
    from a3.models.readable import require_readable

    if not path.is_dir():
        raise A3Error(
            f"{path}: no such folder; expected a Hugging Face folder. `a3 model NAME -o FOLDER` "
            "makes one from the catalogue, a hub repository or a GGUF file."
        )
    require_readable(path)
    return path


def entry(name: str, section: str) -> dict[str, Any]:
    """The entry of the catalogue for what a user calls a model, a text or a recipe.

    JSON of an entry, or what `find_entry` knows; raises A3Error where it is nothing of these.
    """
    from a3.experiments.config import validate_entry
    from a3.experiments.entries import SECTIONS, find_entry

    if not name.startswith("{"):
        return find_entry(name, section)
    called, _ = SECTIONS[section]
    found = values.read_json(name)
    validate_entry(found, called, f"{called} {values.shown(name)}")
    return found


def ratio(word: str) -> str:
    """A ratio as tables spell it; raises A3Error where it is none."""
    if word != NO_RATIO:
        parse_ratio(word)
    return word


def shares(word: str) -> dict[str, float]:
    """JSON of the shares of dev, test and harness."""
    from a3.experiments.config import validate_entry

    found = values.read_json(word)
    validate_entry(found, "text/properties/split", f"shares {values.shown(word)}")
    return found


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default where there is one, and the help does not say it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default in (None, False, [], {}) or "default" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


def add(commands: Any, name: str, command: Any, text: str) -> argparse.ArgumentParser:
    """One command."""
    one = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=Help,
    )
    one.set_defaults(command=command)
    return one


def add_out(
    one: argparse.ArgumentParser, writes: targets.Target, text: str, **several: str
) -> None:
    """Where the result goes, and what it is; `check` holds each command's to what is there."""
    one.add_argument("-o", "--out", type=Path, required=True, help=text, **several)
    one.set_defaults(writes=writes)


def add_modes(one: argparse.ArgumentParser) -> None:
    """Modes and ratio."""
    text = (
        "share of each dimension to remove, [0, 1); without one, each component needs its own size"
    )
    one.add_argument("--ratio", type=ratio, default=NO_RATIO, help=text)
    add_components(one)


def add_servable(one: argparse.ArgumentParser) -> None:
    """Sizes of heads."""
    text = f"heads of the nearest size that serving runtimes have: {', '.join(map(str, SERVABLE))}"
    one.add_argument("--servable", action="store_true", help=text)
    add_multiple(one)


def add_multiple(one: argparse.ArgumentParser) -> None:
    """Sizes that hardware likes."""
    text = "ranks that a ratio leaves are rounded to multiples of it (8, 16, 64 …)"
    one.add_argument("--multiple", type=count(), default=1, help=text)


def add_components(one: argparse.ArgumentParser) -> None:
    """The mode of each component, or a preset for all."""
    text = "mode; with a ratio (@0.3) or rank (@48) of its own; or dense to leave it"
    for component, mode in PRESETS["a3"].items():
        one.add_argument(f"--{component}", default=mode, help=text)
    one.add_argument(
        "--preset",
        choices=PRESETS,
        action=Preset,
        default=argparse.SUPPRESS,
        help="modes of all components: the paper's (default), or those that keep most of the model",
    )


class Preset(argparse.Action):
    """Sets the modes of all components; those named behind it have their own."""

    def __call__(self, _: Any, namespace: argparse.Namespace, value: Any, *__: Any) -> None:
        """Called where the option stands."""
        for component, mode in PRESETS[value].items():
            setattr(namespace, component, mode)


def add_blocks(
    one: argparse.ArgumentParser, tokens: int, seed: bool, scored: bool = False
) -> argparse.ArgumentParser:
    """How text is cut into blocks; where it is `scored`, all of it can be, with BOS once."""
    text = "tokens to use, or all" if scored else "tokens to use"
    number = values.count_or_all if scored else count()
    one.add_argument("--tokens", type=number, default=tokens, help=text)
    one.add_argument("--block-length", type=count(2), default=1024, help="tokens a block")
    bos = argparse.BooleanOptionalAction
    one.add_argument("--bos", action=bos, default=True, help="each block starts with BOS")
    if scored:
        text = "BOS before the whole text only, where the tokenizer adds one"
        one.add_argument("--bos-once", action="store_const", const="once", dest="bos", help=text)
    if seed:
        one.add_argument("--seed", type=SEED, default=0, help="order of the documents")
    return one


def add_run(one: argparse.ArgumentParser) -> None:
    """Where and how the model runs."""
    one.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the forward pass")
    one.add_argument("--device", type=values.device, default="cpu", help="cpu, cuda …")
    add_threads(one)


def add_threads(one: argparse.ArgumentParser) -> None:
    """Threads."""
    one.add_argument(
        "--threads", type=count(most=MOST_THREADS), help="CPU threads (default: torch's choice)"
    )


def with_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Put the options that are `collect`'s under `settings`."""
    names = ("tokens", "block_length", "bos", "seed", "dtype", "device")
    return options | {"settings": {name: options.pop(name) for name in names if name in options}}
