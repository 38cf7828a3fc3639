"""Commands that make smaller models: a3 compress and the stages that it runs."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli.allocate import add_commands as add_allocating_commands
from a3.cli.arguments import (
    ANY_MODEL,
    NAMED_TEXT,
    SMALL_MODEL,
    add,
    add_blocks,
    add_cut,
    add_device,
    add_losses,
    add_model,
    add_modes,
    add_named_model,
    add_out,
    add_run,
    add_rxx,
    add_servable,
    add_shard,
    add_target,
    add_text,
    add_threads,
    folder,
    with_runtime,
    with_settings,
    with_target,
)
from a3.cli.options import count, positive
from a3.core.dtypes import HEAL_DTYPES
from a3.core.progress import LOG
from a3.core.work import RECORD, WorkError, work_of
from a3.solutions.modes import choose
from a3.solutions.recipes import METHODS, check_method
from a3.solutions.target import target_of


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    add_compress(commands)
    add_allocating_commands(commands)
    add_approx(commands)
    add_gather(commands)
    add_quantise(commands)
    add_heal(commands)
    add_surgery(commands)
    add_spectra(commands)


def compress(
    model: dict[str, Any],
    text: dict[str, Any],
    out: Path,
    settings: dict[str, Any],
    servable: bool,
    multiple: int,
    runtime: str | None,
    dev_text: dict[str, Any] | None,
    fresh: bool,
    **row: str,
) -> None:
    """Collect and approx in one go; after an error says where the finished work is."""
    from a3.jobs.forecast import announce
    from a3.pipeline import compress
    from a3.solutions.plan import Plan

    plan, texts = Plan(choose(row), servable, multiple, runtime), 1 if dev_text is None else 2
    say = partial(announce, row, settings, texts)
    with keeping(out):
        compress(model, text, plan, out, settings, dev_text=dev_text, fresh=fresh, announce=say)


@contextmanager
def keeping(out: Path) -> Iterator[None]:
    """After an error inside the block, say where the finished work is."""
    try:
        yield
    except BaseException as error:
        # Not of an error of this command's options, after which nothing goes on.
        if (work_of(out) / RECORD).is_file() and not isinstance(error, WorkError):
            LOG.warning(f"{work_of(out)}: keeps what is finished; the same command goes on there")
        raise


def add_fresh(one: argparse.ArgumentParser) -> None:
    """Whether a killed run's work is used."""
    text_ = "start over where a killed run left FOLDER.a3-work; otherwise it goes on from there"
    one.add_argument("--fresh", action="store_true", help=text_)


def add_compress(commands: Any) -> None:
    """Arguments of a3 compress."""
    one = add(
        commands,
        "compress",
        compress,
        "make a model smaller, in one command",
        "Reads a model and a calibration text, runs the stages collect, allocate and approx, and "
        "writes a smaller model that transformers loads. FOLDER.a3-work has what is finished until "
        "then: after a kill, the same command goes on from there.",
        "a3 compress my-llama --preset a3-plus --ratio 0.2 --text my-text.txt -o small",
    )
    add_named_model(one)
    one.add_argument("--text", default="mixture", metavar="TEXT", help=NAMED_TEXT)
    text_ = "text that the calibration has not seen, to measure the loss on; named like --text"
    one.add_argument("--dev-text", metavar="TEXT", help=text_)
    add_modes(one)
    add_target(one)
    add_servable(one)
    add_out(one, targets.COMPRESSED, "FOLDER", "new Hugging Face folder")
    add_run(add_blocks(one, tokens=32768, seed=True))
    add_fresh(one)
    one.set_defaults(
        command=lambda **options: compress(**with_settings(with_target(options))),
        entries={"model": "models", "text": "texts", "dev_text": "texts"},
    )


def approx(
    model: Path,
    rxx: Path,
    out: Path,
    shard: str | None,
    allocation: Path | None,
    losses: list[Path],
    device: str,
    servable: bool,
    multiple: int,
    runtime: str | None,
    **row: str,
) -> None:
    """Compress with collected statistics."""
    from a3.solutions.plan import Plan
    from a3.stages.approx.approximate import approximate, approximate_shard

    plan = Plan(choose(row), servable, multiple, runtime)
    solving: dict[str, Any] = {"losses": losses, "device": device}
    if runtime is not None:
        from a3.runnable import check_runtime

        check_runtime(plan, folder(model), allocation)
    if shard is None:
        approximate(folder(model), rxx, plan, out, allocation, **solving)
        say_kept("approx", model, out)
    else:
        approximate_shard(folder(model), rxx, plan, shard, out, allocation, **solving)


def add_approx(commands: Any) -> None:
    """Arguments of a3 approx."""
    one = add(
        commands,
        "approx",
        approx,
        "solve for the smaller weights",
        "Reads a model and its statistics, solves layer by layer, and writes the smaller model "
        "with a card and a record of ranks and errors (approx.json); with --shard, one "
        ".safetensors file of a shard of the layers.",
        "a3 approx dense --rxx rxx --ratio 0.2 -o small",
    )
    one.set_defaults(command=lambda **options: approx(**with_runtime(options)))
    add_model(one)
    add_rxx(one)
    add_modes(one)
    text_ = "ranks that a3 allocate wrote, for modes marked ~"
    one.add_argument("--allocation", type=Path, metavar="FILE", help=text_)
    add_losses(one)
    add_device(one)
    add_servable(one)
    add_shard(one)
    add_out(one, targets.APPROXIMATED, "FOLDER", "Hugging Face folder to write")
    add_threads(one)


def gather(model: Path, shards: list[Path], out: Path) -> None:
    """Make one folder of shards."""
    from a3.stages.approx.assemble import gather

    gather(folder(model), shards, out)
    say_kept("gather", model, out)


def say_kept(command: str, model: Path, out: Path) -> None:
    """Say what a target asked of a folder, and what it has."""
    from a3.core.files import read_record

    # Without one, the modules that measure are not imported: most runs need none of them.
    if target_of(read_record(out / "approx.json")["modes"].values()) is not None:
        from a3.promise import check_kept

        for line in check_kept(model, out):
            LOG.info(f"{command}: {line}")


def add_gather(commands: Any) -> None:
    """Arguments of a3 gather."""
    one = add(
        commands,
        "gather",
        gather,
        "join the shards of a compressed model",
        "Reads the dense model and what a3 approx --shard wrote of it, and writes the same folder "
        "as a3 approx without shards.",
        "a3 gather dense 0of2.safetensors 1of2.safetensors -o small",
    )
    add_model(one)
    text_ = "files that a3 approx --shard wrote, in order"
    one.add_argument("shards", type=Path, nargs="+", metavar="SHARD", help=text_)
    add_out(one, targets.APPROXIMATED, "FOLDER", "Hugging Face folder to write")


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
        commands,
        "quantise",
        quantise,
        "simulate low precision, repaired by a low-rank term (LQER, QERA)",
        "Reads a model and the statistics of its inputs (attention_input, o_proj_input …), and "
        "writes a model whose values are rounded to the recipe's formats; nothing runs faster.",
        "a3 quantise small --rxx small-rxx --recipe w4a8 --method qera --rank 32 -o quantised",
    )
    add_model(one, ANY_MODEL)
    add_rxx(one)
    text_ = "number formats: catalogue name, or JSON as under quantisations in the configuration"
    one.add_argument("--recipe", default="w4a8", metavar="RECIPE", help=text_)
    text_ = "metric of the low-rank repair, or none for no repair"
    one.add_argument("--method", choices=METHODS, default="qera", help=text_)
    text_ = "rank of the repair; not with --method none"
    one.add_argument("--rank", type=count(), metavar="N", help=text_)
    add_out(one, targets.QUANTISED, "FOLDER", "Hugging Face folder to write")
    one.set_defaults(entries={"recipe": "quantisations"})
    add_threads(one)


def heal(
    model: Path,
    teacher: Path,
    text: Path,
    out: Path,
    device: str,
    fresh: bool,
    **settings: Any,
) -> None:
    """Train a compressed model towards its dense one."""
    from a3.stages.heal.heal import Settings, heal

    with keeping(out):
        said = Settings(**settings)
        heal(folder(model), folder(teacher), text, out, said, device=device, fresh=fresh)


def add_heal(commands: Any) -> None:
    """Arguments of a3 heal."""
    one = add(
        commands,
        "heal",
        heal,
        "train a compressed model towards its dense one (distillation)",
        "Reads a compressed model, the dense model that it was made from, and a text, and writes a "
        "model of the same shapes whose layers were trained to predict like the dense one, on "
        "blocks that the calibration has not seen. FOLDER.a3-work has its state until then: after "
        "a kill, the same command goes on from there.",
        "a3 heal small --teacher my-llama --text my-text.txt --minutes 10 -o healed",
    )
    add_model(one, SMALL_MODEL)
    text_ = "Hugging Face folder of the dense model, which has the same tokenizer"
    one.add_argument("--teacher", type=Path, required=True, metavar="MODEL", help=text_)
    add_text(one)
    add_out(one, targets.HEALED, "FOLDER", "Hugging Face folder to write")
    text_ = "minutes of training at most (default: 10, where --tokens is not given)"
    one.add_argument("--minutes", type=positive, metavar="N", help=text_)
    text_ = "number of tokens to use at most; --minutes may end it earlier"
    one.add_argument("--tokens", type=count(), metavar="N", help=text_)
    add_cut(one)
    text_ = "largest learning rate, of Adam"
    one.add_argument("--learning-rate", type=positive, default=3e-4, metavar="N", help=text_)
    text_ = "number of blocks of a step; one is in memory at a time"
    one.add_argument("--batch-size", type=count(), default=1, metavar="N", help=text_)
    add_run(one, "dtype of the forward pass and of gradients; weights are float32", HEAL_DTYPES)
    add_fresh(one)


def surgery(model: Path, rxx: Path | None, mode: str, size: str, out: Path) -> None:
    """Rebuild Q, K and V from principal components."""
    from a3.solutions.surgeries import parse_size
    from a3.stages.approx.surgery import surgery

    surgery(folder(model), rxx, mode, parse_size(size), out)


def add_surgery(commands: Any) -> None:
    """Arguments of a3 surgery."""
    one = add(
        commands,
        "surgery",
        surgery,
        "rebuild Q, K and V from their leading principal components",
        "Reads a model and, for modes that end in -rxx, the statistic attention_input, and writes "
        "a model of the same shapes: an ablation that shows how low-dimensional Q, K and V are.",
        "a3 surgery dense --mode pca-shared-kv --size variance@0.9 -o operated",
    )
    add_model(one)
    add_rxx(one, required=False)
    text_ = "which matrices share principal components"
    one.add_argument("--mode", default="pca-shared-kv", metavar="MODE", help=text_)
    text_ = "variance@0.9: components that explain that share; parameters@0.5: as many as fit"
    one.add_argument("--size", required=True, metavar="SIZE", help=text_)
    add_out(one, targets.OPERATED, "FOLDER", "Hugging Face folder to write")
    add_threads(one)


def spectra(model: Path, rxx: Path, out: Path) -> None:
    """Energy by rank."""
    from a3.stages.approx.spectra import spectra

    spectra(folder(model), rxx, out)


def add_spectra(commands: Any) -> None:
    """Arguments of a3 spectra."""
    one = add(
        commands,
        "spectra",
        spectra,
        "compute the energy that each rank keeps, by layer and group",
        "Reads a model and its statistics, and writes the spectra, which a3 figures draws.",
        "a3 spectra dense --rxx rxx -o spectra.json",
    )
    add_model(one)
    add_rxx(one)
    add_out(one, targets.SPECTRA, "FILE", "JSON file to write")
    add_threads(one)
