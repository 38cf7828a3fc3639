"""Commands for jobs: a3 plan, verify, recover."""

from pathlib import Path
from typing import Any

from a3.cli import options as values
from a3.cli.arguments import (
    add,
    add_blocks,
    add_model,
    add_modes,
    add_results,
    add_run,
    folder,
    with_settings,
)
from a3.cli.options import count
from a3.core.devices import require_device
from a3.core.errors import A3Error
from a3.core.extras import require_installed


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    add_plan(commands)
    add_verify(commands)
    add_recover(commands)


def plan(
    model: Path | None,
    jobs: list[dict[str, Any]],
    results: Path,
    cores: int,
    elsewhere: bool,
    settings: dict[str, Any],
    **row: str,
) -> None:
    """Estimate what jobs cost, and refuse those that this machine cannot run."""
    from a3.jobs.forecast import Job, forecast, refuse, stages_of, table

    for where in sorted({job["settings"]["device"] for job in jobs}):
        require_device(where, "float32")
    found = [Job(**job) for job in jobs]
    if model is not None:
        found += stages_of(folder(model), row, settings)
    if not found:
        raise A3Error("plan: no model. Name a Hugging Face folder; its config.json is enough.")
    estimates = forecast(found)
    print(table(estimates, cores))
    refuse(estimates, results, here=not elsewhere)


def add_plan(commands: Any) -> None:
    """Arguments of a3 plan."""
    one = add(
        commands,
        "plan",
        plan,
        "estimate memory, disk, FLOPs and time before anything runs",
        "Reads config.json alone, times small pieces of a layer on this machine, prints a "
        "table of the stages, and fails where memory or disk would not be enough. Writes nothing.",
        "a3 plan my-llama --preset a3-plus --ratio 0.2",
    )
    add_model(one, "Hugging Face folder; config.json is enough", nargs="?")
    add_modes(one)
    add_run(add_blocks(one, tokens=32768, seed=False))
    text_ = "jobs of a workflow, a JSON list, in place of the stages of one model"
    one.add_argument("--jobs", type=values.jobs, default=[], metavar="JSON", help=text_)
    add_results(one, default=Path("results"))
    text_ = "number of jobs that run at once"
    one.add_argument("--cores", type=count(), default=1, metavar="N", help=text_)
    text_ = "jobs run remotely; skip the local memory check"
    one.add_argument("--elsewhere", action="store_true", help=text_)
    one.set_defaults(command=lambda **options: plan(**with_settings(options)))


def verify(results: Path) -> None:
    """Check all artifacts."""
    from a3.artifacts.verify import verify

    verify(results)


def add_verify(commands: Any) -> None:
    """Arguments of a3 verify."""
    one = add(
        commands,
        "verify",
        verify,
        "check every artifact of a results folder",
        "Reads all files in it, and compares their hashes, records and sources with each other. "
        "Writes nothing; the exit status is 1 where something is wrong.",
        "a3 verify results",
    )
    text_ = "folder of results: models, rxx, checkpoints, eval …"
    one.add_argument("results", type=Path, metavar="RESULTS", help=text_)


def recover() -> None:
    """Clean up after a killed Snakemake."""
    require_installed("snakemake", "workflow")
    require_installed("psutil", "workflow")
    from a3.jobs.recover import recover

    recover()


def add_recover(commands: Any) -> None:
    """Arguments of a3 recover."""
    add(
        commands,
        "recover",
        recover,
        "clean up after snakemake was killed",
        "Reads Snakemake's logs in the working folder, cancels the Slurm jobs that they name, and "
        "unlocks the folder. Artifacts stay as they are.",
        "a3 recover",
    )
