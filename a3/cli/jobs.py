"""Commands for jobs: a3 plan, verify, recover."""

from pathlib import Path
from typing import Any

from a3.cli import options as values
from a3.cli.arguments import add, add_blocks, add_modes, add_run, folder, with_settings
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
    """Say what jobs will cost, and refuse what cannot be."""
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


def verify(results: Path) -> None:
    """Check all artifacts."""
    from a3.artifacts.verify import verify

    verify(results)


def add_verify(commands: Any) -> None:
    """Arguments of a3 verify."""
    one = add(commands, "verify", verify, "check every artifact of a results folder")
    one.add_argument("results", type=Path, help="folder of models, rxx, checkpoints, eval …")


def recover() -> None:
    """Clean up after a killed Snakemake."""
    require_installed("snakemake", "workflow")
    require_installed("psutil", "workflow")
    from a3.jobs.recover import recover

    recover()


def add_recover(commands: Any) -> None:
    """Arguments of a3 recover."""
    add(commands, "recover", recover, "after snakemake was killed: cancel its Slurm jobs, unlock")
