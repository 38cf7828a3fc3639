"""Arguments that several commands share, and the readers of their values."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli import options as values
from a3.cli.options import LARGEST_SEED, MOST_THREADS, count
from a3.core.dtypes import RUN_DTYPES
from a3.core.errors import A3Error
from a3.solutions.modes import BRIEFS, COMPONENTS, NO_RATIO, PRESETS, SERVABLE, parse_amount
from a3.solutions.runtime import RUNTIMES
from a3.solutions.target import NAMES, Target

# Cells of a table's rows, and what may stand beside them.
ROW = (*COMPONENTS, "ratio")


SEED = count(0, LARGEST_SEED)


EXPERIMENTS = values.rows("model", others=("calibration", *ROW, "quantise", "heal"))


SURGERIES = values.rows("model", "calibration", "mode", "size", others=())


# The keys of a3.texts.blocks.JOINS.
JOINS = ("empty-line", "space", "nothing")


# Help of arguments that several commands have; the same words everywhere.
MODEL = "Hugging Face folder of a dense model"

ANY_MODEL = "Hugging Face folder of a dense or compressed model"

SMALL_MODEL = "Hugging Face folder of a compressed model"

NAMED_MODEL = "folder, .gguf file, catalogue name or owner/name@revision of the hub"

TEXT = "file (.txt, .md, .jsonl, .json, .csv, .tsv or .parquet, also .gz) or folder of text"

DRAWN = "random seed (order of documents, choice of examples and items)"

NAMED_TEXT = f"catalogue name, or {TEXT}"


def folder(path: Path) -> Path:
    """A model folder; raises A3Error if it does not exist or is not a model that a3 reads."""
    if not path.is_dir():
        raise A3Error(
            f"{path}: no such folder; expected a Hugging Face folder. `a3 model NAME -o FOLDER` "
            "makes one from the catalogue, a hub repository or a GGUF file."
        )
    from a3.models.readable import require_readable

    require_readable(path)
    return path


def entry(name: str, section: str) -> dict[str, Any]:
    """The entry of the catalogue for what a user calls a model, a text or a recipe.

    JSON of an entry, or a name that `find_entry` knows; raises A3Error for anything else.
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
    """A ratio, or targets in its place, as written in tables; raises A3Error for other text."""
    if word != NO_RATIO:
        parse_amount(word)
    return word


class Default(str):
    """A mode that nobody asked for: with a target, the preset that fits it takes its place."""


def shares(word: str) -> dict[str, float]:
    """JSON of the shares of dev, test, harness and calibration."""
    from a3.experiments.config import validate_entry

    found = values.read_json(word)
    validate_entry(found, "text/properties/split", f"shares {values.shown(word)}")
    return found


def parsers(top: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of all its commands."""
    yield top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from parsers(one)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default that the help does not already mention; does not re-wrap examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is False or action.default in (None, [], {}, NO_RATIO)
        said = none or "default" in (action.help or "")
        return action.help if said else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap each line except indented ones, which are examples to copy."""
        fill = super()._fill_text
        lines = text.split("\n")
        return "\n".join(x if x.startswith(" ") else fill(x, width, indent) for x in lines)


def add(
    commands: Any, name: str, command: Any, brief: str, about: str, example: str
) -> argparse.ArgumentParser:
    """Add a command with its line in the list of commands, its description and an example."""
    one = commands.add_parser(
        name,
        help=brief,
        description=f"{brief[0].upper()}{brief[1:]}. {about}",
        epilog=f"example:\n  {example}",
        formatter_class=Help,
    )
    one.set_defaults(command=command)
    return one


def add_group(commands: Any, name: str, brief: str, about: str, example: str) -> Any:
    """A command that has commands of its own; returns what `add` adds them to."""
    group = add(commands, name, None, brief, about, example)
    return group.add_subparsers(metavar="COMMAND", title="commands", required=True)


def add_model(one: argparse.ArgumentParser, text: str = MODEL, **options: Any) -> None:
    """The model, which is the first word of most commands."""
    one.add_argument("model", type=Path, metavar="MODEL", help=text, **options)


def add_named_model(one: argparse.ArgumentParser, text: str = NAMED_MODEL) -> None:
    """A model that may be an entry of the catalogue; `check` reads it."""
    one.add_argument("model", metavar="MODEL", help=text)
    one.set_defaults(entries={"model": "models"})


def add_text(one: argparse.ArgumentParser) -> None:
    """The text that a stage reads."""
    one.add_argument("--text", type=Path, required=True, metavar="TEXT", help=TEXT)


def add_wheels(one: argparse.ArgumentParser) -> None:
    """Where wheels are."""
    text = "folder of the wheels that a3 wheel downloaded"
    one.add_argument("--wheels", type=Path, metavar="FOLDER", help=text)


def add_rxx(one: argparse.ArgumentParser, required: bool = True) -> None:
    """Where the statistics are."""
    text = "folder of the statistics (<kind>.safetensors) that a3 collect wrote"
    one.add_argument("--rxx", type=Path, required=required, metavar="FOLDER", help=text)


def add_shard(one: argparse.ArgumentParser) -> None:
    """One of several jobs of a stage."""
    text = "make one shard of several: 0of4, 1of4 …; a3 merge or a3 gather joins them"
    one.add_argument("--shard", type=values.shard, metavar="KofN", help=text)


def add_stream(one: argparse.ArgumentParser) -> None:
    """Whether one layer at a time is in memory."""
    text = "keep one layer at a time in memory (default: where all weights do not fit)"
    one.add_argument("--stream", action=argparse.BooleanOptionalAction, help=text)


def add_results(one: argparse.ArgumentParser, **options: Any) -> None:
    """The folder of results."""
    text = "folder of results, in which the workflow writes models, statistics, scores …"
    one.add_argument("--results", type=Path, metavar="FOLDER", help=text, **options)


def add_rows(one: argparse.ArgumentParser, **options: Any) -> None:
    """Rows of the table of experiments."""
    text = "rows of the table of experiments, a JSON list of objects"
    one.add_argument("--experiments", metavar="JSON", help=text, **options)


def add_scores(one: argparse.ArgumentParser) -> None:
    """The evaluations that a table shows."""
    text = "names of perplexity evaluations to show"
    one.add_argument("--perplexity", nargs="*", default=[], metavar="NAME", help=text)
    text = "names of harness evaluations to show"
    one.add_argument("--harness", nargs="*", default=[], metavar="NAME", help=text)


def add_out(
    one: argparse.ArgumentParser, writes: targets.Target, metavar: str, text: str, **several: str
) -> None:
    """Where the result goes, and what it is; `check` compares each with what is there."""
    one.add_argument("-o", "--out", type=Path, required=True, metavar=metavar, help=text, **several)
    one.set_defaults(writes=writes)


def add_modes(one: argparse.ArgumentParser) -> None:
    """Modes and ratio."""
    text = "share of each dimension to remove, in [0, 1); not needed where each mode has its own"
    one.add_argument("--ratio", type=ratio, default=NO_RATIO, metavar="RATIO", help=text)
    add_components(one)


def add_target(one: argparse.ArgumentParser) -> None:
    """What the model is to become, in place of a ratio."""
    said = {
        "fit": (
            "SIZE",
            "bytes of its weights at most: 300MB, 300MB:bfloat16 to write the folder in that "
            "dtype, or 300MB:q8_0 of a GGUF file; with a target, modes that are not named are "
            "those of a3-plus, or of a3-stock for a GGUF file",
        ),
        "params": ("N", "parameters at most: 100M"),
        "kv_cache": ("SHARE", "share of the dense model's KV cache at most: 0.5"),
        "flops": ("SHARE", "share of the dense model's FLOPs a token at most: 0.7"),
        "max_loss": (
            "NATS",
            "nats a token to lose at most, on held-out calibration text: 0.05",
        ),
    }
    for name, (metavar, text) in said.items():
        one.add_argument(f"--{NAMES[name]}", metavar=metavar, help=text)


def with_target(options: dict[str, Any]) -> dict[str, Any]:
    """Put the options of `add_target` in place of the ratio, with modes that fit where none is
    named; raises A3Error for a wrong target, and for a ratio beside it.
    """
    said = {name: options.pop(name) for name in NAMES}
    if all(word is None for word in said.values()):
        return with_runtime(options)
    if options["ratio"] != NO_RATIO:
        named = ", ".join(f"--{NAMES[name]}" for name, word in said.items() if word is not None)
        raise A3Error(f"--ratio beside {named}: a target takes the place of a ratio. Give one.")
    target = Target.of(said)
    return with_runtime(options, target.preset) | {"ratio": str(target)}


def with_runtime(options: dict[str, Any], preset: str | None = None) -> dict[str, Any]:
    """Put the modes of the runtime's preset, or of another one, where none is named."""
    runtime = options["runtime"]
    preset = RUNTIMES[runtime].preset if runtime else preset
    free = [one for one in COMPONENTS if isinstance(options[one], Default)] if preset else []
    return options | {one: PRESETS[preset][one] for one in free if preset}


def add_servable(one: argparse.ArgumentParser) -> None:
    """Sizes of heads."""
    sizes = ", ".join(map(str, SERVABLE))
    text = f"round head sizes to those that serving runtimes support: {sizes}"
    one.add_argument("--servable", action="store_true", help=text)
    add_multiple(one)
    add_runtime(one)


def add_runtime(one: argparse.ArgumentParser) -> None:
    """Sizes and modes for a runtime."""
    text = (
        "round sizes to those that a runtime takes, and take modes that it runs where none is named"
    )
    named = "; ".join(f"{name}: {runtime.words}" for name, runtime in RUNTIMES.items())
    text = f"{text}. {named}"
    one.add_argument("--for", dest="runtime", choices=RUNTIMES, metavar="RUNTIME", help=text)


def add_multiple(one: argparse.ArgumentParser, **several: Any) -> None:
    """Option to round ranks to a multiple that hardware handles well."""
    text = "round ranks to a multiple of N (8, 16, 64 …)"
    options: dict[str, Any] = {"type": count(), "default": 1, "metavar": "N", "help": text}
    one.add_argument("--multiple", **options | several)


def add_components(one: argparse.ArgumentParser, preset: str = "a3") -> None:
    """The mode of each component, or a preset for all."""
    text = "MODE[@RATIO or @RANK], or dense to skip"
    for component, mode in PRESETS[preset].items():
        one.add_argument(f"--{component}", default=Default(mode), metavar="MODE", help=text)
    one.add_argument(
        "--preset",
        nargs="?",
        choices=PRESETS,
        action=Preset,
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="modes of all components: a3 (the paper's), a3-plus (most accurate), a3-stock (for "
        "llama.cpp) or a baseline; without a name, lists them",
    )


class Preset(argparse.Action):
    """Sets the modes of all components; a component's option after it overrides it.

    Without a name it prints all presets and leaves, as --help does.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any
    ) -> None:
        """Called where the option stands."""
        if value is None:
            width = max(map(len, BRIEFS))
            print("\n".join(f"{name:<{width}}  {brief}" for name, brief in BRIEFS.items()))
            parser.exit()
        for component, mode in PRESETS[value].items():
            setattr(namespace, component, mode)


def add_blocks(
    one: argparse.ArgumentParser, tokens: int, seed: bool, scored: bool = False
) -> argparse.ArgumentParser:
    """How text is cut into blocks; where it is `scored`, all of it can be, with BOS once."""
    text = f"number of tokens to use{', or all' if scored else ''}"
    number = values.count_or_all if scored else count()
    one.add_argument("--tokens", type=number, default=tokens, metavar="N", help=text)
    add_cut(one)
    if scored:
        text = "BOS before the whole text only, where the tokenizer adds one"
        one.add_argument("--bos-once", action="store_const", const="once", dest="bos", help=text)
    if seed:
        add_seed(one)
    return one


def add_cut(one: argparse.ArgumentParser) -> None:
    """The length of a block, and whether it begins with BOS."""
    text = "tokens of a block, which the model sees at once"
    one.add_argument("--block-length", type=count(2), default=1024, metavar="N", help=text)
    bos = argparse.BooleanOptionalAction
    one.add_argument("--bos", action=bos, default=True, help="start each block with BOS")


def add_seed(one: argparse.ArgumentParser) -> None:
    """What is drawn at random."""
    one.add_argument("--seed", type=SEED, default=0, metavar="N", help=DRAWN)


def add_run(
    one: argparse.ArgumentParser,
    dtype: str = "dtype of the forward pass",
    dtypes: tuple[str, ...] = RUN_DTYPES,
) -> None:
    """Where and how the model runs; `dtype` is the help of --dtype."""
    one.add_argument("--dtype", choices=dtypes, default="float32", help=dtype)
    add_device(one)
    add_threads(one)


def add_device(one: argparse.ArgumentParser) -> None:
    """Device."""
    text = "device to compute on: cpu, cuda, cuda:1 …"
    one.add_argument("--device", type=values.device, default="cpu", metavar="DEVICE", help=text)


def add_losses(one: argparse.ArgumentParser) -> None:
    """What a3 losses wrote."""
    text = "files that a3 losses wrote, of all shards; without them the losses are computed here"
    one.add_argument("--losses", type=Path, nargs="+", default=[], metavar="FILE", help=text)


def add_threads(one: argparse.ArgumentParser) -> None:
    """Threads."""
    text = "CPU threads (default: torch's choice)"
    one.add_argument("--threads", type=count(most=MOST_THREADS), metavar="N", help=text)


def with_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Put the options that are `collect`'s under `settings`."""
    names = ("tokens", "block_length", "bos", "seed", "dtype", "device")
    return options | {"settings": {name: options.pop(name) for name in names if name in options}}
