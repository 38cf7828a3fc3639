"""What all rules share: the checked configuration, names of files, and what wildcards may be.

a3 writes over no folder but one that is empty or has its seal. Snakemake deletes the record, which is
an output, before it has a folder made again; a second, hidden seal in it is no output, and stays.
"""

import json
import re
from contextlib import contextmanager
from pathlib import Path

from snakemake.exceptions import WorkflowError

from a3.artifacts.places import HEALED_BY, PLACE, Place
from a3.core.errors import A3Error
from a3.core.files import load_yaml
from a3.core.provenance import fingerprint
from a3.experiments.config import calibrates, check_models_made, complete, prefer_own_scripts
from a3.experiments.needed import kinds_by_calibration, option_words
from a3.experiments.paper import Paper
from a3.experiments.rows import kinds_to_quantise, read_experiments, read_surgeries
from a3.models.inputs import local_inputs, marks, wheel_name, wheels_in
from a3.solutions.modes import DENSE, choose, kinds_needed
from a3.solutions.target import NAMES

prefer_own_scripts()

SCHEMA = Path(workflow.basedir, "workflow/schemas/config.schema.yaml")


@contextmanager
def correctable():
    """Show what the user can correct, without a traceback."""
    try:
        yield
    except A3Error as error:
        raise WorkflowError(str(error)) from None


with correctable():
    C = complete(config, load_yaml(SCHEMA))
    # What the report shows; the paper's tables add entries of their own.
    CONFIGURED = json.dumps(C, sort_keys=True)
    if "paper" in C:
        PAPER = Paper(Path(workflow.basedir, "config/paper.yaml"))
        C = complete(PAPER.join(config), load_yaml(SCHEMA))
        PAPER_ROWS = PAPER.rows(C["paper"]["models"])
    else:
        PAPER, PAPER_ROWS = None, []
    check_models_made(C)
    ROWS = read_experiments(Path(C["experiments"]), C)
    OPERATIONS = read_surgeries(Path(C["surgery"]["rows"]), C) if "surgery" in C else []

RESULTS = C["results"]
TABLE = f"{RESULTS}/tables/{C['table']}"
LOGS = f"{RESULTS}/logs"
RXX = f"{RESULTS}/rxx/{{model}}/{{calibration}}"
# A row as paths spell it, of wildcards.
RUN = Place("{model}", "{calibration}", "{qk}", "{ov}", "{mlp}", "{ratio}").format()
CHECKPOINT = f"{RESULTS}/checkpoints/{RUN}"
TRAINED = [
    f"{RESULTS}/trained/{{model}}/{name}"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "train.json")
]
# What one pass over each calibration collects. The paper's tables have calibrations of their own, so
# that they make no other statistics larger; theirs are what the paper's own modes read, which is small
# and part of every table.
TOGETHER = kinds_by_calibration(ROWS, OPERATIONS)
if PAPER:
    own = [name for name in PAPER.spec["calibrations"] if name not in TOGETHER]
    TOGETHER |= dict.fromkeys(own, PAPER.kinds())
# Every row of the table, each model's dense row included.
PLACES = list(dict.fromkeys(place for row in ROWS for place in (Place(row["model"]), Place(**row))))
# Compressed models that are quantised, by statistics of their own.
QUANTISED_KINDS = sorted(
    {kind for place in PLACES if not place.is_whole for kind in kinds_to_quantise(place)}
)
SPEEDS = [
    str(place.speed(Path(RESULTS), name))
    for place in PLACES
    for name in C["evaluate"]["speed"]
    if not place.is_dense
]
SURGERY_TABLES = [
    f"{TABLE}/{name}" for name in ("surgery.csv", "surgery.md", "surgery_figures") if OPERATIONS
]


def one_of(names):
    """A wildcard's constraint."""
    return "|".join(map(re.escape, sorted(names)))


# What may be written in place of a ratio; whether it is right is checked with the table.
TARGETS = rf"({one_of(NAMES.values())})@[\w.,:@-]+"


wildcard_constraints:
    model=r"[\w.-]+",
    calibration=r"[\w.-]+",
    text=r"[\w.-]+",
    kind=r"\w+",
    shard=r"\d+of\d+",
    # Nothing, or the shard of a calibration that is collected in several jobs.
    shard_folder=r"(/shards/\d+of\d+)?",
    # A mode, with `~` where its ratio is allocated, with `@` and a size where it has its own; a
    # ratio is `-` where all components do, and in its place may be targets: fit@300MB,kv-cache@0.5.
    qk=r"[\w@.~-]+",
    ov=r"[\w@.~-]+",
    mlp=r"[\w@.~-]+",
    ratio=rf"[\d.]+|-|{TARGETS}",
    task=r"[\w.-]+",
    speed=r"[\w.-]+",
    # A recipe, a method and its rank.
    quantise=r"[\w.-]+\+[a-z-]+(@\d+)?",
    heal=r"[\w.-]+",
    # The dense model, or calibration/modes/ratio of a compressed one, and what was done to it then.
    run=f"{DENSE}|[^/]+/[^/]+/[^/]+(/[^/]+)?",


def entry(section, name):
    """One entry of the configuration, for a wildcard that may name none."""
    if name not in C[section]:
        known = ", ".join(sorted(C[section]))
        raise WorkflowError(f"{section} has no {name!r} in the configuration; it has {known}.")
    return C[section][name]


def sources(section, key):
    """What a model or text is made from: wheels, a path, others of it, or nothing (hub)."""

    def files(wildcards):
        source = entry(section, wildcards[key])["source"]
        if wheels := wheels_in(source):
            return [f"{RESULTS}/wheels/{wheel_name(wheel)}" for wheel in wheels]
        if "repeat_kv" in source:
            folder = f"{RESULTS}/models/{source['repeat_kv']}"
            return [f"{folder}/{name}" for name in ("arch.json", "config.json")]
        if "train" in source:
            return expand(TRAINED, model=wildcards[key])
        if "mix" in source:
            return list(map(learned, sorted(source["mix"])))
        return list(map(str, local_inputs(section, source)))

    return files


def content(section, key):
    """What tells whether the local files that a model or text is made from have changed.

    Snakemake looks at their times, which say nothing where older files take the place of others.
    """
    return lambda wildcards: marks(local_inputs(section, entry(section, wildcards[key])["source"]))


def spec(section, key):
    """The definition of a model or text as JSON, for the command line."""
    return lambda wildcards: json.dumps(entry(section, wildcards[key]), sort_keys=True)


def settings(section, key, names):
    """Options of the command line from an entry's keys: {"block_length": 8} to --block-length 8."""
    return lambda wildcards: option_words(entry(section, wildcards[key]), names)


def calibration_text(wildcards):
    """Documents that a calibration reads."""
    return learned(entry("calibrations", wildcards.calibration)["text"])


def learned(text):
    """Documents of a text that calibrations, mixtures and trained models read."""
    split = "calibration" if calibrates(text, C["texts"]) else "docs"
    return f"{RESULTS}/texts/{text}/{split}.jsonl"


def place_of(wildcards):
    """The row of a job, by its run or by names of its own."""
    if "run" not in wildcards.keys():
        return Place(**{key: wildcards[key] for key in PLACE if key in wildcards.keys()})
    with correctable():
        return Place.parse(f"{wildcards.model}/{wildcards.run}")


def model_files(wildcards):
    """The files that say a model folder is there; the first lies in the folder itself."""
    return folder_files(place_of(wildcards))


def base_files(wildcards):
    """The same of the model that is quantised or trained."""
    return folder_files(place_of(wildcards).base)


def folder_files(place):
    """The files that say a row's model folder is there; the first lies in the folder itself."""
    folder = place.weights(Path(RESULTS)).parent
    if place.is_dense:
        return [f"{folder}/{name}" for name in ("arch.json", "config.json")]
    return checkpoint_files(folder)


def checkpoint_files(folder):
    """The files that say a compressed model's folder is there, whose weights may be in many files."""
    return [f"{folder}/{name}" for name in ("config.json", "approx.json")]
