"""What all rules share: the checked configuration, names of files, and the code's fingerprints.

a3 writes over no folder but one that is empty or has its seal. Snakemake deletes the record, which is
an output, before it has a folder made again; a second, hidden seal in it is no output, and stays.
"""

import json
import re
from pathlib import Path

from snakemake.exceptions import WorkflowError

from a3.experiments.config import (
    check_models_made,
    complete,
    excluded,
    prefer_own_scripts,
    wheels_of,
)
from a3.experiments.rows import kinds_of, kinds_to_quantise, read_experiments, read_surgeries
from a3.models.cost import BYTES_PER_TOKEN, WHOLE_TEXT
from a3.core.dtypes import GGUF_TYPES
from a3.core.errors import A3Error
from a3.core.files import load_yaml, sha256
from a3.models.inputs import local_inputs, marks
from a3.experiments.paper import Paper
from a3.core.shards import weight_files
from a3.core.provenance import fingerprint
from a3.solutions.recipes import parse_quantisation
from a3.artifacts.places import PLACE, Place, SurgeryPlace
from a3.rxx.kinds import SPECTRA_KINDS
from a3.solutions.modes import DENSE, SHARED, choose, kinds_needed
from a3.solutions.surgeries import SURGERIES, find_surgery
from a3.stages.evaluate.tasks import data_files, read_task

prefer_own_scripts()

SCHEMA = Path(workflow.basedir, "workflow/schemas/config.schema.yaml")

try:
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
except A3Error as error:
    raise WorkflowError(str(error)) from None

RESULTS = C["results"]
TABLE = f"{RESULTS}/tables/{C['table']}"
LOGS = f"{RESULTS}/logs"
RXX = f"{RESULTS}/rxx/{{model}}/{{calibration}}"
# A row as paths spell it, of wildcards.
RUN = Place("{model}", "{calibration}", "{qk}", "{ov}", "{mlp}", "{ratio}").format()
CHECKPOINT = f"{RESULTS}/checkpoints/{RUN}"
QUANTISED = f"{RESULTS}/quantised/{RUN}/{{quantise}}"
TRAINED = [
    f"{RESULTS}/trained/{{model}}/{name}"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "train.json")
]
# Calibrations of which as many kinds of statistics are needed as of any, and the others.
KINDS = kinds_of(ROWS)
CALIBRATED = {row["calibration"]: [] for row in ROWS}
for row in ROWS:
    CALIBRATED[row["calibration"]].append(row)
OTHERS = [name for name, rows in CALIBRATED.items() if kinds_of(rows) != KINDS]
if len(OTHERS) == len(CALIBRATED):
    OTHERS = []
OTHER_KINDS = kinds_of([row for name in OTHERS for row in CALIBRATED[name]])
PAPER_GROUPS = f"{RESULTS}/paper"
# The paper's tables have calibrations of their own, so that they make no other statistics larger. Of
# these, one pass collects what the paper's own modes read, which is small and part of every table.
PAPER_CALIBRATIONS = sorted(set(PAPER.spec["calibrations"]) - set(CALIBRATED)) if PAPER else []
PAPER_KINDS = PAPER.kinds() if PAPER else []
# Files of weights of a checkpoint: one for each job that makes it, and one for what is in no layer.
WEIGHTS = weight_files(C["approx_jobs"])
WHEELS = wheels_of(C)
BOS_OPTIONS = {True: "--bos", False: "--no-bos", "once": "--bos-once"}
SHARDED = [name for name, entry in C["calibrations"].items() if entry["shards"] > 1]
# Every row of the table, each model's dense row included.
PLACES = list(dict.fromkeys(place for row in ROWS for place in (Place(row["model"]), Place(**row))))
# Every file that the table is made of.
EVALUATED = [
    str(path)
    for place in PLACES
    for path in (
        place.weights(Path(RESULTS)),
        *(place.perplexity(Path(RESULTS), name) for name in C["evaluate"]["perplexity"]),
        *(place.harness(Path(RESULTS), name) for name in C["evaluate"]["harness"]),
    )
]
# Every file that the table of surgeries is made of, and what it is.
OPERATED_PLACES = [SurgeryPlace(row["model"]) for row in OPERATIONS]
OPERATED_PLACES = list(
    dict.fromkeys([*OPERATED_PLACES, *(SurgeryPlace(**row) for row in OPERATIONS)])
)
OPERATIONS_EVALUATED = [
    str(path)
    for place in OPERATED_PLACES
    for path in (
        place.weights(Path(RESULTS)),
        *(place.perplexity(Path(RESULTS), name) for name in C["evaluate"]["perplexity"]),
        *(place.harness(Path(RESULTS), name) for name in C["evaluate"]["harness"]),
        place.generation(Path(RESULTS)),
    )
]
SURGERY_TABLES = [
    f"{TABLE}/{name}" for name in ("surgery.csv", "surgery.md", "surgery_figures") if OPERATIONS
]
# Of each model and calibration, where the table needs those statistics anyway.
SPECTRA = sorted(
    str(place.spectra(Path(RESULTS)))
    for place in {Place(row["model"], row["calibration"]) for row in ROWS}
    if set(SPECTRA_KINDS) <= set(KINDS)
)
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


wildcard_constraints:
    model=r"[\w.-]+",
    calibration=r"[\w.-]+",
    text=r"[\w.-]+",
    kind=r"\w+",
    shard=r"\d+of\d+",
    # Nothing, or the shard of a calibration that is collected in several jobs.
    shard_folder=r"(/shards/\d+of\d+)?",
    # A mode, with `~` where its ratio is allocated, with `@` and a size where it has its own; a
    # ratio is `-` where all components do.
    qk=r"[\w@.~-]+",
    ov=r"[\w@.~-]+",
    mlp=r"[\w@.~-]+",
    ratio=r"[\d.]+|-",
    task=r"[\w.-]+",
    speed=r"[\w.-]+",
    # A recipe, a method and its rank.
    quantise=r"[\w.-]+\+[a-z-]+(@\d+)?",
    # The dense model, or calibration/modes/ratio of a compressed one, and how it was quantised.
    run=f"{DENSE}|[^/]+/[^/]+/[^/]+(/[^/]+)?",


def entry(section, name):
    """One entry of the configuration, for a wildcard that may name none."""
    if name not in C[section]:
        known = ", ".join(sorted(C[section]))
        raise WorkflowError(f"{section} has no {name!r} in the configuration; it has {known}.")
    return C[section][name]


def one_of(names):
    """A wildcard's constraint."""
    return "|".join(map(re.escape, sorted(names)))


def sources(section, key):
    """What a model or text is made from: a wheel, a path, others of it, or nothing (hub)."""

    def files(wildcards):
        source = entry(section, wildcards[key])["source"]
        if "wheel" in source:
            wheel = source["wheel"]
            return [f"{RESULTS}/wheels/{wheel['name']}-{wheel['version']}.whl"]
        if "repeat_kv" in source:
            folder = f"{RESULTS}/models/{source['repeat_kv']}"
            return [f"{folder}/{name}" for name in ("arch.json", "config.json")]
        if "train" in source:
            return expand(TRAINED, model=wildcards[key])
        if "mix" in source:
            return [f"{RESULTS}/texts/{member}/docs.jsonl" for member in source["mix"]]
        return list(map(str, local_inputs(section, source)))

    return files


def content(section, key):
    """What tells whether the local files that a model or text is made from have changed.

    Snakemake looks at their times, which say nothing where older files take the place of others.
    """
    return lambda wildcards: marks(local_inputs(section, entry(section, wildcards[key])["source"]))


def base_option(wildcards, input):
    """The folder that a model is made from, where it is made from one."""
    source = entry("models", wildcards.model)["source"]
    made = "repeat_kv" in source or "train" in source
    return ["--base", Path(input[0]).parent] if made else []


def training_text(wildcards):
    """Documents that a model is trained on."""
    source = entry("models", wildcards.model)["source"]
    if "train" not in source:
        raise WorkflowError(f"models.{wildcards.model}.source has no train, so it is not trained.")
    return f"{RESULTS}/texts/{source['train']['text']}/docs.jsonl"


def spec(section, key):
    """The definition of a model or text as JSON, for the command line."""
    return lambda wildcards: json.dumps(entry(section, wildcards[key]), sort_keys=True)


def settings(section, key, names):
    """Options of the command line from an entry's keys: {"block_length": 8} to --block-length 8."""

    def options(wildcards):
        chosen = entry(section, wildcards[key])
        words = []
        for name in names:
            option = f"--{name.replace('_', '-')}"
            if name == "bos":
                words.append(BOS_OPTIONS[chosen[name]])
            elif isinstance(chosen.get(name), list):
                words += [option, *chosen[name]]
            elif isinstance(chosen.get(name), bool):
                words += [option] if chosen[name] else []
            # Text of the user's may begin with a hyphen.
            elif name in ("apply_chat_template", "system_instruction") and name in chosen:
                words.append(f"{option}={chosen[name]}")
            elif name in chosen:
                words += [option, str(chosen[name])]
        return words

    return options


def experiments_of(model):
    """The rows of one model as JSON, for the command line."""
    return json.dumps([row for row in ROWS if row["model"] == model])


def shards(ending, wildcards):
    """The files of one kind of all shards, in order."""
    folder, count = RXX.format(**wildcards), C["calibrations"][wildcards.calibration]["shards"]
    return [f"{folder}/shards/{i}of{count}/{wildcards.kind}.{ending}" for i in range(count)]


def shard_option(wildcards):
    """What tells `a3 collect` which shard it makes, where it is one."""
    folder = wildcards.shard_folder
    return ["--shard", Path(folder).name] if folder else []


def kinds_together(calibration):
    """The statistics that one pass over a calibration collects."""
    if calibration in PAPER_CALIBRATIONS:
        return PAPER_KINDS
    return OTHER_KINDS if calibration in OTHERS else KINDS


def some_are_missing(calibrations):
    """Whether, in some folder that is collected to, one kind is there and another one is not."""
    collected = {(row["model"], row["calibration"]) for row in [*ROWS, *PAPER_ROWS]}
    for model, calibration in collected:
        if calibration not in calibrations:
            continue
        kinds = kinds_together(calibration)
        folder = Path(RXX.format(model=model, calibration=calibration))
        for place in (folder, *folder.glob("shards/*")):
            there = {kind for kind in kinds if (place / f"{kind}.safetensors").exists()}
            if there and there != set(kinds):
                return True
    return False


def excluded_by(text):
    """The texts whose documents are taken out of a text."""
    entry("texts", text)
    return excluded(text, C["texts"])


def paper_groups(table):
    """The groups of rows that a comparison with the paper builds."""
    try:
        models = PAPER.models_of(PAPER.tables[table], C["paper"]["models"])
    except A3Error as error:
        raise WorkflowError(str(error)) from None
    return [f"{PAPER_GROUPS}/{table}/{model}.csv" for model in models]


def other_paper_groups(table):
    """The groups that are there beside them, and their content: a change makes a new comparison."""
    there = {str(path) for path in Path(PAPER_GROUPS, table).glob("*.csv")}
    others = sorted(there - set(paper_groups(table)))
    return {path: sha256(Path(path)) for path in others if Path(path).stem in PAPER.models}


def calibration_text(wildcards):
    """Documents that a calibration reads."""
    text = entry("calibrations", wildcards.calibration)["text"]
    return f"{RESULTS}/texts/{text}/docs.jsonl"


def rxx_needed(wildcards):
    """The statistics that the modes read."""
    try:
        kinds = kinds_needed(choose(wildcards))
    except A3Error as error:
        raise WorkflowError(str(error)) from None
    folder = RXX.format(model=wildcards.model, calibration=wildcards.calibration)
    return [f"{folder}/{kind}.safetensors" for kind in kinds]


def allocation_needed(wildcards):
    """The ranks of layers, where some mode has an allocated ratio."""
    shared = SHARED in wildcards.qk + wildcards.ov + wildcards.mlp
    return [f"{RESULTS}/allocations/{RUN}.json".format(**wildcards)] if shared else []


def approx_output(wildcards, output):
    """Where `a3 approx` writes: a folder, or the file of one shard."""
    if "shard" in wildcards.keys():
        return ["--shard", wildcards.shard, "-o", output.weights]
    return ["-o", str(Path(output.config).parent)]


def model_files(wildcards):
    """The files that say a model folder is there; the first lies in the folder itself."""
    return folder_files(place_of(wildcards))


def base_files(wildcards):
    """The same of the model that is quantised."""
    return folder_files(place_of(wildcards).base)


def folder_files(place):
    """The files that say a row's model folder is there; the first lies in the folder itself."""
    folder = place.weights(Path(RESULTS)).parent
    if place.is_dense:
        return [f"{folder}/{name}" for name in ("arch.json", "config.json")]
    # A surgery keeps the dense model's files of weights, whatever they are.
    if place.is_quantised or isinstance(place, SurgeryPlace):
        return [f"{folder}/{name}" for name in ("config.json", "approx.json")]
    return checkpoint_files(folder)


def checkpoint_files(folder):
    """The files that say a compressed model's folder is there."""
    return [f"{folder}/{name}" for name in (*WEIGHTS, "config.json", "approx.json")]


def place_of(wildcards):
    """The row of a job, by its run or by names of its own."""
    if "run" not in wildcards.keys():
        return Place(*(wildcards[key] for key in PLACE))
    try:
        return Place.parse(f"{wildcards.model}/{wildcards.run}")
    except A3Error as error:
        raise WorkflowError(str(error)) from None


def rxx_to_quantise(wildcards):
    """The statistics that a quantised checkpoint reads, those of its base."""
    place = place_of(wildcards)
    try:
        return [str(place.rxx(Path(RESULTS), kind)) for kind in kinds_to_quantise(place)]
    except A3Error as error:
        raise WorkflowError(str(error)) from None


def quantise_options(wildcards):
    """Recipe, method and rank."""
    said = parse_quantisation(wildcards.quantise)
    recipe = json.dumps(entry("quantisations", said.recipe))
    return ["--recipe", recipe, "--method", said.method] + (
        ["--rank", str(said.rank)] if said.rank else []
    )


def scored_text(wildcards):
    """The split of a text that a perplexity entry scores."""
    chosen = entry("perplexity", wildcards.text)
    split = "docs" if chosen["split"] == "all" else chosen["split"]
    return f"{RESULTS}/texts/{chosen['text']}/{split}.jsonl"


def scored_source(wildcards):
    """What says where the text of a perplexity entry is from."""
    return f"{RESULTS}/texts/{entry('perplexity', wildcards.text)['text']}/docs.json"


def tokens_scored(wildcards):
    """How many tokens a perplexity entry scores; of a whole text a guess, by its size if it is there."""
    chosen, path = entry("perplexity", wildcards.text), Path(scored_text(wildcards))
    if chosen["tokens"] != "all":
        return chosen["tokens"]
    return path.stat().st_size // BYTES_PER_TOKEN if path.exists() else WHOLE_TEXT


def task_files(wildcards):
    """The items or the YAML and data files of a local task; nothing for one of lm-eval's own."""
    chosen = entry("harness", wildcards.task)
    if "text" in chosen:
        return [f"{RESULTS}/items/{wildcards.task}/items.jsonl"]
    if "yaml" not in chosen:
        return []
    try:
        return [chosen["yaml"], *data_files(read_task(Path(chosen["yaml"])))]
    except A3Error as error:
        raise WorkflowError(str(error)) from None


def task_content(wildcards):
    """What tells whether the files of a local task have changed."""
    chosen = entry("harness", wildcards.task)
    return marks(map(Path, task_files(wildcards))) if "yaml" in chosen else {}


def task_options(wildcards, input):
    """Which task, and where its items or its YAML are."""
    chosen = entry("harness", wildcards.task)
    if "text" in chosen:
        return ["--task", wildcards.task, "--items", *input.local]
    if "yaml" in chosen:
        return ["--task", wildcards.task, "--yaml", chosen["yaml"]]
    return ["--task", chosen["task"]]
