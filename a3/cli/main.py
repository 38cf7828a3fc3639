"""The command line: arguments, progress, exit codes. Every rule of the workflow calls it.

Nothing heavy is imported before a command runs, so that `a3 -h` takes milliseconds.
"""

import argparse
import os
import signal
import sys
from functools import cache
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from a3.artifacts import targets
from a3.cli import collect, compress, evaluate, export, inputs, jobs, report
from a3.cli.arguments import Help, entry
from a3.cli.options import Parser
from a3.core.devices import require_device
from a3.core.errors import A3Error
from a3.core.files import is_disk_error
from a3.core.progress import on_terminal

# Commands as `a3 -h` lists them.
GROUPS = {
    "everyday": (
        *("compress", "plan", "eval", "compare", "inspect"),
        *("export", "publish", "quantise", "heal", "show", "families"),
    ),
    "stages": (
        *("model", "convert", "train", "wheel", "text", "split", "items"),
        *("collect", "merge", "losses", "allocate", "frontier"),
        *("approx", "gather", "spectra", "surgery"),
    ),
    "the workflow's own": (
        *("tables", "figures", "speed-table", "surgery-table", "surgery-figures", "paper"),
        *("report", "card", "verify", "recover"),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status (1 for a user-correctable error)."""
    # A cluster stops jobs with SIGTERM: leave as on Ctrl-C, so that no temporary file stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with on_terminal():
            try:
                return run(arguments)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:
        # Its reader has enough, as in `a3 inspect small | head -1`: leave as other programs do.
        leave_output()
        return 141
    except OSError as error:
        if not is_disk_error(error):
            raise
        leave_output()
        print(f"a3: error: standard output: {error.strerror}. Make room.", file=sys.stderr)
        return 1


def leave_output() -> None:
    """Write to nowhere from now on: Python flushes once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(arguments: list[str] | None) -> int:
    """Parse and run one command; returns the exit status."""
    try:
        top = parser()
        if "_ARGCOMPLETE" in os.environ:
            from a3.cli.completion import complete

            complete(top)
        options = vars(top.parse_args(arguments))
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
    """Read entries of the catalogue that options name, and check where the command may write.

    `entries` maps an option to the section of its entry. Raises A3Error for a wrong entry, and if
    the command would overwrite its input or a file or folder that it did not write.
    """
    for name, section in entries.items():
        if options[name] is not None:
            options[name] = entry(options[name], section)
    if writes is not None:
        if writes == targets.APPROXIMATED and options.get("shard"):
            writes = targets.SHARD
        targets.check(writes, options)


def prepare(threads: int | None, device: str | None, dtype: str | None) -> None:
    """Silence the libraries, set the thread count before torch starts threads, test the device.

    Raises A3Error if HF_ENDPOINT contains a password, which the hub's client would log, and if the
    device does not exist.
    """
    if "@" in urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc:
        raise A3Error(
            "HF_ENDPOINT: contains a user name or password, and the hub client logs addresses. "
            "Remove it from the address; put the token into HF_TOKEN."
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_MININTERVAL", "1")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if device not in (None, "cpu") or dtype not in (None, "float32"):
        require_device(device or "cpu", dtype or "float32")


@cache
def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Parser(
        prog="a3",
        usage="a3 COMMAND …",
        description="Make transformer language models smaller without training.",
        formatter_class=Help,
    )
    top.add_argument("--version", action="version", version=f"a3 {version('a3')}")
    # Their list is the epilog: argparse would show it as one.
    commands = top.add_subparsers(
        prog="a3", metavar="COMMAND", help=argparse.SUPPRESS, required=True
    )
    for wing in (compress, evaluate, export, inputs, collect, report, jobs):
        wing.add_commands(commands)
    briefs = {one.dest: one.help for one in commands._choices_actions}
    top.epilog = "\n\n".join(
        f"{title}:\n" + "\n".join(f"  {name:<16} {briefs[name]}" for name in names)
        for title, names in GROUPS.items()
    )
    top.epilog += "\n\n`a3 COMMAND -h` shows what a command reads and writes, with an example."
    return top


if __name__ == "__main__":
    sys.exit(main())
