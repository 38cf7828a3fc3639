"""What all rules share: the checked configuration, names of files, and the code's fingerprints."""

import json
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from a3.config import complete, kinds_of, load_yaml, read_experiments, wheels_of
from a3.errors import A3Error
from a3.provenance import fingerprint
from a3.results import Place
from a3.solutions.modes import DENSE, PARTS, kinds_needed

# Rules call the `a3` of the environment that runs Snakemake, activated or not.
os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))

SCHEMA = Path(workflow.basedir, "workflow/schemas/config.schema.yaml")

try:
    C = complete(config, load_yaml(SCHEMA))
    ROWS = read_experiments(Path(C["experiments"]), C)
except A3Error as error:
    raise WorkflowError(str(error)) from None

RESULTS = C["results"]
TABLE = f"{RESULTS}/tables/{C['table']}"
LOGS = f"{RESULTS}/logs"
WHEELS = wheels_of(C)
# Every row of the table, each model's dense row included.
PLACES = list(
    dict.fromkeys(place for row in ROWS for place in (Place(row["model"]), Place(**row)))
)


wildcard_constraints:
    model=r"[\w.-]+",
    calibration=r"[\w.-]+",
    text=r"[\w.-]+",
    kind=r"\w+",
    qk=r"[\w-]+",
    ov=r"[\w-]+",
    mlp=r"[\w-]+",
    ratio=r"[\d.]+",


def entry(section, name):
    """One entry of the configuration, for a wildcard that may name none."""
    if name not in C[section]:
        known = ", ".join(sorted(C[section]))
        raise WorkflowError(f"{section} has no {name!r} in the configuration; it has {known}.")
    return C[section][name]


def sources(section, key):
    """The files that a model or text is made from: its wheel, a local path, or nothing (hub)."""

    def files(wildcards):
        source = entry(section, wildcards[key])["source"]
        if "wheel" in source:
            wheel = source["wheel"]
            return [f"{RESULTS}/wheels/{wheel['name']}-{wheel['version']}.whl"]
        return [source["path"]] if "path" in source else []

    return files


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
                words.append("--bos" if chosen[name] else "--no-bos")
            elif name in chosen:
                words += [option, str(chosen[name])]
        return words

    return options
