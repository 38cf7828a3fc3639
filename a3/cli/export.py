"""Commands for other runtimes: a3 export, inspect."""

from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli.arguments import add, add_out, folder
from a3.core.dtypes import GGUF_TYPES
from a3.core.extras import require_installed


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    export = commands.add_parser(
        "export", help="compressed models for other runtimes", description="Export."
    )
    kinds = export.add_subparsers(metavar="KIND", required=True)
    add_export_hf(kinds)
    add_export_gguf(kinds)
    add_inspect(commands)


def export_hf(model: Path, out: Path) -> None:
    """Write an ordinary checkpoint."""
    from a3.stages.export.hf import export_hf

    export_hf(folder(model), out)


def add_export_hf(kinds: Any) -> None:
    """Arguments of a3 export hf."""
    one = add(kinds, "hf", export_hf, "an ordinary checkpoint, which transformers loads without a3")
    one.add_argument("model", type=Path, help="compressed folder with one set of RoPE pairs")
    add_out(one, targets.EXPORTED, "Hugging Face folder")


def export_gguf(model: Path, out: Path, type: str) -> None:
    """Write a GGUF file."""
    require_installed("gguf", "export")
    from a3.stages.export.gguf import export_gguf

    export_gguf(folder(model), out, type)


def add_export_gguf(kinds: Any) -> None:
    """Arguments of a3 export gguf."""
    one = add(kinds, "gguf", export_gguf, "a file for llama.cpp")
    text_ = "dense folder, or compressed one with one set of RoPE pairs"
    one.add_argument("model", type=Path, help=text_)
    text_ = "type of the matrices"
    one.add_argument("--type", choices=GGUF_TYPES, default="f16", help=text_)
    add_out(one, targets.PLAIN, "the .gguf file")


def inspect(model: Path) -> None:
    """Say what a checkpoint is."""
    from a3.stages.export.inspect import inspect

    print(inspect(folder(model)))


def add_inspect(commands: Any) -> None:
    """Arguments of a3 inspect."""
    one = add(commands, "inspect", inspect, "what a checkpoint is, and which runtimes load it")
    one.add_argument("model", type=Path, help="dense or compressed Hugging Face folder")
