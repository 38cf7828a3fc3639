"""Commands for other runtimes, hubs, and about models: a3 export, publish, inspect, families."""

from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli.arguments import (
    ANY_MODEL,
    SMALL_MODEL,
    add,
    add_group,
    add_model,
    add_out,
    add_run,
    folder,
)
from a3.core.dtypes import GGUF_TYPES, GRAPH_TYPES
from a3.core.extras import require_installed


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    subcommands = add_group(
        commands,
        "export",
        "write a compressed model for runtimes without a3",
        "The heads of all layers have to keep the same RoPE pairs; a3 inspect says whether they "
        "do, and docs/export.md how to make such a model.",
        "a3 export gguf small -o small.gguf",
    )
    add_export_hf(subcommands)
    add_export_dense(subcommands)
    add_export_gguf(subcommands)
    add_export_onnx(subcommands)
    add_publish(commands)
    add_inspect(commands)
    add_families(commands)


def export_hf(model: Path, out: Path) -> None:
    """Write an ordinary checkpoint."""
    from a3.stages.export.hf import export_hf

    export_hf(folder(model), out)


def add_export_hf(commands: Any) -> None:
    """Arguments of a3 export hf."""
    one = add(
        commands,
        "hf",
        export_hf,
        "write a checkpoint that the family's own code loads",
        "Reads a compressed model and writes a folder that transformers and other runtimes load "
        "without a3.",
        "a3 export hf small -o stock",
    )
    add_model(one, f"{SMALL_MODEL}, with one set of RoPE pairs")
    add_out(one, targets.EXPORTED, "FOLDER", "Hugging Face folder to write")


def export_dense(model: Path, out: Path) -> None:
    """Put a compressed model back into the dense model's shapes."""
    from a3.stages.export.dense import export_dense

    export_dense(folder(model), out)


def add_export_dense(commands: Any) -> None:
    """Arguments of a3 export dense."""
    one = add(
        commands,
        "dense",
        export_dense,
        "write a compressed model in the dense model's shapes, with zeros",
        "Reads a compressed model and writes an ordinary checkpoint with the same logits, as large "
        "as the dense one: to run it where compressed models do not run, and to compress it "
        "further, for ratios that are too large for one step.",
        "a3 export dense small -o step",
    )
    add_model(one, SMALL_MODEL)
    add_out(one, targets.IN_SHAPE, "FOLDER", "Hugging Face folder to write")


def export_gguf(model: Path, out: Path, type: str) -> None:
    """Write a GGUF file."""
    require_installed("gguf", "export")
    from a3.stages.export.gguf import export_gguf

    export_gguf(folder(model), out, type)


def add_export_gguf(commands: Any) -> None:
    """Arguments of a3 export gguf."""
    one = add(
        commands,
        "gguf",
        export_gguf,
        "write a GGUF file for llama.cpp",
        "Reads a dense or compressed model and writes one file with weights and tokenizer.",
        "a3 export gguf small --type q8_0 -o small.gguf",
    )
    add_model(one, f"{ANY_MODEL}, with one set of RoPE pairs")
    text_ = "type of the matrices"
    one.add_argument("--type", choices=GGUF_TYPES, default="f16", help=text_)
    add_out(one, targets.PLAIN, "FILE", ".gguf file to write")


def publish(model: Path, repo: str, **options: Any) -> None:
    """Check a folder, and upload it."""
    from a3.stages.export.publish import publish

    for line in publish(folder(model), repo, **options):
        print(line, flush=True)


def add_publish(commands: Any) -> None:
    """Arguments of a3 publish."""
    one = add(
        commands,
        "publish",
        publish,
        "check a compressed or exported folder and upload it to the Hugging Face hub",
        "Checks that its files are as they were written, and that it loads, tokenises and "
        "generates; shows the files, the card and the repository; uploads only with --upload. The "
        "token is that of `hf auth login` or HF_TOKEN.",
        "a3 publish small me/my-llama-small --upload",
    )
    add_model(one, "Hugging Face folder of a compressed or exported model")
    one.add_argument("repo", metavar="OWNER/NAME", help="repository of the hub")
    one.add_argument("--upload", action="store_true", help="upload; without it only say what would")
    one.add_argument("--private", action="store_true", help="make a new repository private")
    text_ = "overwrite or delete files of another model that are in the repository"
    one.add_argument("--replace", action="store_true", help=text_)
    add_run(one)


def export_onnx(model: Path, out: Path, type: str) -> None:
    """Write an ONNX graph."""
    require_installed("onnx_ir", "onnx")
    require_installed("onnxruntime", "onnx")
    require_installed("onnxscript", "onnx")  # torch.onnx imports it
    from a3.stages.export.onnx import export_onnx

    export_onnx(folder(model), out, type)


def add_export_onnx(commands: Any) -> None:
    """Arguments of a3 export onnx."""
    one = add(
        commands,
        "onnx",
        export_onnx,
        "write an ONNX graph for onnxruntime, transformers.js and OpenVINO",
        "Reads a dense or compressed model, with any RoPE pairs and ranks, and writes a folder "
        "with a graph that has a KV cache, and the tokenizer. onnxruntime reads it, and its logits "
        "are compared with the model's, before the folder is put in place.",
        "a3 export onnx small -o graph",
    )
    add_model(one, ANY_MODEL)
    text_ = "type of the matrices"
    one.add_argument("--type", choices=list(GRAPH_TYPES), default="f32", help=text_)
    add_out(one, targets.ONNX, "FOLDER", "folder to write")


def inspect(model: Path) -> None:
    """Say what a checkpoint is."""
    from a3.stages.export.inspect import inspect

    print(inspect(folder(model)))


def add_inspect(commands: Any) -> None:
    """Arguments of a3 inspect."""
    one = add(
        commands,
        "inspect",
        inspect,
        "show ranks, sizes, and which runtimes load a model",
        "Reads the config and the records of a model, and prints what they say. Writes nothing.",
        "a3 inspect small",
    )
    add_model(one, ANY_MODEL)


def families(probe: Path | None) -> None:
    """Say which model types a3 compresses."""
    from a3.models.probe.table import lines, read_table, row_of_config, wrapper_lines

    if probe is not None:
        print(*lines(row_of_config(probe)), sep="\n")
        return
    table = read_table()
    held = "of several modalities, whose language model is compressed in place:"
    print(*lines(table["types"]), "", held, *wrapper_lines(table["wrappers"]), sep="\n")


def add_families(commands: Any) -> None:
    """Arguments of a3 families."""
    one = add(
        commands,
        "families",
        families,
        "list the model types of transformers, and which parts of each a3 compresses",
        "A type without an adapter of its own is probed: a3 builds a tiny random model of it, "
        "proposes what its modules are, and believes what numbers confirm.",
        "a3 families --probe my-model/config.json",
    )
    one.add_argument(
        "--probe", type=Path, metavar="CONFIG", help="config.json of a model to probe instead"
    )
