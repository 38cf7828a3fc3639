"""Commands that make smaller models: a3 compress and the stages that it runs."""

from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli import options as values
from a3.cli.arguments import (
    TEXT,
    add,
    add_blocks,
    add_modes,
    add_multiple,
    add_out,
    add_run,
    add_servable,
    add_threads,
    folder,
    with_settings,
)
from a3.cli.options import count
from a3.solutions.modes import COMPONENTS, choose
from a3.solutions.recipes import METHODS, check_method


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    add_compress(commands)
    add_allocate(commands)
    add_approx(commands)
    add_gather(commands)
    add_quantise(commands)
    add_surgery(commands)
    add_spectra(commands)


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


def add_compress(commands: Any) -> None:
    """Arguments of a3 compress."""
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


def allocate(
    model: Path, rxx: Path, out: Path, multiple: int, uniform: list[str], **row: str
) -> None:
    """Share out ranks over layers and components."""
    from a3.solutions.plan import Plan
    from a3.stages.approx.allocate import allocate

    plan = Plan(choose(row), multiple=multiple)
    allocate(folder(model), rxx, plan, out, uniform=tuple(uniform))


def add_allocate(commands: Any) -> None:
    """Arguments of a3 allocate."""
    one = add(commands, "allocate", allocate, "share out the ranks of modes with ~")
    one.add_argument("model", type=Path, help="Hugging Face folder")
    one.add_argument("--rxx", type=Path, required=True, help="folder of <kind>.safetensors")
    add_modes(one)
    add_multiple(one)
    text_ = "components whose rank is the same in all layers"
    one.add_argument("--uniform", nargs="+", choices=COMPONENTS, default=[], help=text_)
    add_out(one, targets.ALLOCATION, "the ranks, JSON")
    add_threads(one)


def approx(
    model: Path,
    rxx: Path,
    out: Path,
    shard: str | None,
    allocation: Path | None,
    servable: bool,
    multiple: int,
    **row: str,
) -> None:
    """Compress with collected statistics."""
    from a3.solutions.plan import Plan
    from a3.stages.approx.approximate import approximate, approximate_shard

    plan = Plan(choose(row), servable, multiple)
    if shard is None:
        approximate(folder(model), rxx, plan, out, allocation)
    else:
        approximate_shard(folder(model), rxx, plan, shard, out, allocation)


def add_approx(commands: Any) -> None:
    """Arguments of a3 approx."""
    one = add(commands, "approx", approx, "weights and Rxx to a compressed checkpoint")
    one.add_argument("model", type=Path, help="Hugging Face folder")
    one.add_argument("--rxx", type=Path, required=True, help="folder of <kind>.safetensors")
    add_modes(one)
    one.add_argument("--allocation", type=Path, help="a3 allocate's file, for modes with ~")
    add_servable(one)
    text_ = "only a run of layers, to a .safetensors file: 0of4, 1of4 …; a3 gather joins them"
    one.add_argument("--shard", type=values.shard, help=text_)
    add_out(one, targets.APPROXIMATED, "compressed Hugging Face folder")
    add_threads(one)


def gather(model: Path, shards: list[Path], out: Path) -> None:
    """Make one folder of shards."""
    from a3.stages.approx.assemble import gather

    gather(folder(model), shards, out)


def add_gather(commands: Any) -> None:
    """Arguments of a3 gather."""
    one = add(commands, "gather", gather, "shards of a compressed model to one folder")
    one.add_argument("model", type=Path, help="Hugging Face folder of the dense model")
    one.add_argument("shards", type=Path, nargs="+", help="what a3 approx --shard made, in order")
    add_out(one, targets.APPROXIMATED, "compressed Hugging Face folder")


def quantise(
    model: Path, rxx: Path, recipe: dict[str, Any], method: str, rank: int | None, out: Path
) -> None:
    """Low precision and its repair."""
    check_method(method, rank)
    from a3.stages.approx.quantise import quantise_model

    quantise_model(folder(model), rxx, recipe, method, rank, out)


def add_quantise(commands: Any) -> None:
    """Arguments of a3 quantise."""
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


def surgery(model: Path, rxx: Path | None, mode: str, size: str, out: Path) -> None:
    """Rebuild Q, K and V from principal components."""
    from a3.solutions.surgeries import parse_size
    from a3.stages.approx.surgery import surgery

    surgery(folder(model), rxx, mode, parse_size(size), out)


def add_surgery(commands: Any) -> None:
    """Arguments of a3 surgery."""
    one = add(commands, "surgery", surgery, "Q, K, V from principal components, in dense shapes")
    one.add_argument("model", type=Path, help="Hugging Face folder")
    text_ = "folder of attention_input.safetensors, for modes with -rxx"
    one.add_argument("--rxx", type=Path, help=text_)
    one.add_argument("--mode", default="pca-shared-kv", help="which matrices share components")
    text_ = "variance@0.9: components that explain that share; parameters@0.5: as many as fit"
    one.add_argument("--size", required=True, help=text_)
    add_out(one, targets.OPERATED, "Hugging Face folder of the same family")
    add_threads(one)


def spectra(model: Path, rxx: Path, out: Path) -> None:
    """Energy by rank."""
    from a3.stages.approx.spectra import spectra

    spectra(folder(model), rxx, out)


def add_spectra(commands: Any) -> None:
    """Arguments of a3 spectra."""
    one = add(commands, "spectra", spectra, "energy that each rank keeps, by layer and group")
    one.add_argument("model", type=Path, help="Hugging Face folder")
    one.add_argument("--rxx", type=Path, required=True, help="folder of <kind>.safetensors")
    add_out(one, targets.SPECTRA, "spectra, JSON")
    add_threads(one)
