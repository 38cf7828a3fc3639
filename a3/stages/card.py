"""The model card of a compressed folder: README.md, written anew from approx.json alone."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from huggingface_hub import ModelCardData

from a3.errors import A3Error
from a3.files import SEAL, read_record, sha256, whole_file, write_record
from a3.models.checkpoint import CARD, check_file, front_matter
from a3.results import PERPLEXITY_PROTOCOL, Record, same_protocol
from a3.solutions.modes import DENSE, PARTS

PAPER = "[A³](https://arxiv.org/abs/2505.12942)"
# What a base model's card says that holds for the compressed one.
CARRIED = ("license", "license_name", "license_link", "language")
NAMES = {"qk": "QK (attention scores)", "ov": "OV (attention output)", "mlp": "MLP"}
SIZES = {
    "parameters": "parameters",
    "kv_bytes_per_token": "KV cache, bytes a token",
    "flops_per_token": "FLOPs a token",
}
# What of a perplexity result the card says.
SAID = (*PERPLEXITY_PROTOCOL, "text", "perplexity", "perplexity_stderr")
USE = """```python
import a3  # or, without a3: trust_remote_code=True in both calls, which runs modeling_a3.py
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""


def base_of(model: dict[str, Any] | None, card: Path) -> dict[str, Any]:
    """What is known of the base model: its name, where it is from, licence and language.

    `model` is the content of its source.json, None where there is none; `card` its README.md,
    which may not be there.
    """
    said = front_matter(card)
    carried = {key: said[key] for key in CARRIED if is_text(said.get(key))}
    model = model or {"source": {"path": card.parent}}
    if model.get("licence"):
        carried.setdefault("license", model["licence"])
    return {"name": base_name(model["source"]), "commit": model.get("commit"), **carried}


def is_text(value: Any) -> bool:
    """Whether this is a string, or some of them; YAML reads dates and truth values, too."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, str) for one in values)


def base_name(source: dict[str, Any]) -> str | None:
    """What a source calls its model; of a local one the last part of its path."""
    if "hub" in source:
        return source["hub"]
    if "wheel" in source:
        return Path(source["wheel"]["member"]).name.removesuffix(".gguf")
    if "path" in source:
        return Path(source["path"]).resolve().name
    return source.get("repeat_kv")


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write README.md by a record as approx.json has it, whole or not at all."""
    base = record["base_card"]
    data = ModelCardData(
        base_model=base["name"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["a3", "compressed", "low-rank", record["base"]["family"]],
        **{key: base[key] for key in CARRIED if key in base},
    )
    name = base["name"] or f"a {record['base']['family']} model"
    paragraphs = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}, compressed",
        f"Made from {name} without training, by closed-form low-rank solutions ({PAPER}): the same "
        "layers with smaller heads, a smaller intermediate size and a smaller KV cache.",
        parts_table(record),
        sizes_table(record["size"]),
        calibration(record["provenance"]["statistics"]),
        "## Perplexity",
        perplexities(record.get("perplexity", [])),
        "## Use",
        USE,
        "## Licence and provenance",
        licence(base, name),
        provenance(record),
    ]
    with whole_file(folder / CARD) as temporary:
        temporary.write_text("\n\n".join(paragraphs) + "\n")


def parts_table(record: dict[str, Any]) -> str:
    """Mode, rank and relative error of each part."""
    base = record["base"]
    rows = ["| part | mode | rank | relative error: mean, largest |", "|---|---|---|---|"]
    for part in PARTS:
        full = base["intermediate_size" if part == "mlp" else "head_dim"]
        said = [layer[part] for layer in record["layers"] if part in layer]
        if not said:
            rows.append(f"| {NAMES[part]} | {DENSE} | {full} | |")
            continue
        ranks = sorted({layer["rank"] for layer in said})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        errors = [layer["relative_error"] for layer in said]
        error = f"{mean(errors):.3g}, {max(errors):.3g}"
        rows.append(f"| {NAMES[part]} | `{record['modes'][part]}` | {span} of {full} | {error} |")
    return "\n".join(rows)


def sizes_table(size: dict[str, dict[str, int]]) -> str:
    """Sizes before and after."""
    rows = ["| | dense | compressed | kept |", "|---|---|---|---|"]
    for key, name in SIZES.items():
        dense, compressed = size["dense"][key], size["compressed"][key]
        rows.append(f"| {name} | {dense:,} | {compressed:,} | {compressed / dense:.1%} |")
    return "\n".join(rows)


def calibration(statistics: dict[str, dict[str, Any]]) -> str:
    """The text that statistics were taken of."""
    if not statistics:
        return "No calibration text: the modes go by the weights alone."
    # Gradients are of a share of the tokens.
    said = max(statistics.values(), key=lambda one: one["tokens"])
    # Statistics of earlier versions do not name it.
    name = said.get("text", "a text")
    return (
        f"Calibration: {said['tokens']:,} tokens of {name} (SHA-256 "
        f"`{said['text_sha256']}`) in blocks of {said['block_length']}, {said['dtype']}."
    )


def perplexities(pairs: list[dict[str, Any]]) -> str:
    """Perplexity before and after, one row a text."""
    if not pairs:
        return "Not measured yet; `a3 eval ppl` measures it, `a3 card` writes it here."
    rows = [
        "| text | tokens scored | dense | compressed |",
        "|---|---|---|---|",
    ]
    for pair in pairs:
        said = pair["compressed"]
        text = f"{said['text']}, {said['split']}, blocks of {said['block_length']}, {said['dtype']}"
        values = (
            f"{pair[kind]['perplexity']:.2f} ± {pair[kind]['perplexity_stderr']:.2f}"
            for kind in ("dense", "compressed")
        )
        rows.append(f"| {text} | {said['tokens_scored']:,} | {' | '.join(values)} |")
    return "\n".join([*rows, "", "± is one standard error."])


def licence(base: dict[str, Any], name: str) -> str:
    """The base model's licence, which holds for what is made from it."""
    if "license" in base:
        return f"The licence of {name} holds: {base.get('license_name', base['license'])}."
    return f"The licence of {name} holds; a3 was not told which it is."


def provenance(record: dict[str, Any]) -> str:
    """What made the folder."""
    made, commit = record["provenance"], record["base_card"]["commit"]
    libraries = ", ".join(f"{name} {version}" for name, version in made["libraries"].items())
    lines = [
        *([f"- base model's commit `{commit}`"] if commit else []),
        f"- base model's weights, SHA-256 `{record['base']['weights_sha256']}`",
        f"- weights here, SHA-256 `{record['weights_sha256']}`",
        f"- a3's code `{made['code']}`; {libraries}",
        "- ranks, errors and kept RoPE pairs of every layer: `approx.json`",
    ]
    return "\n".join(lines)


def add_perplexity(folder: Path, dense: Sequence[Path], compressed: Sequence[Path]) -> None:
    """Put results of `a3 eval ppl`, dense and compressed of each text, into a folder's card.

    They replace those that were there. Raises A3Error where a result is of other weights, or two of
    one text were taken by different protocols.
    """
    if len(dense) != len(compressed):
        raise A3Error(
            f"card: {len(dense)} dense results, {len(compressed)} compressed ones; expected one of "
            "each for every text."
        )
    path = folder / "approx.json"
    record = read_record(path)
    if (folder / CARD).exists():
        known = record["files"].get(CARD, "")
        check_file(folder / CARD, known, "It would be written over: move it elsewhere first.")
    weights = {"dense": record["base"]["weights_sha256"], "compressed": record["weights_sha256"]}
    pairs = []
    for both in zip(dense, compressed, strict=True):
        read = dict(zip(weights, map(Record.read, both), strict=True))
        for kind, one in read.items():
            require_weights(one, weights[kind], kind)
        same_protocol(read["dense"], read["compressed"], PERPLEXITY_PROTOCOL)
        pairs.append({kind: {key: one[key] for key in SAID} for kind, one in read.items()})
    record["perplexity"] = pairs
    write_card(folder, record)
    record["files"][CARD] = sha256(folder / CARD)
    write_record(path, {key: value for key, value in record.items() if key != SEAL})


def require_weights(record: Record, expected: str, kind: str) -> None:
    """Raise A3Error unless a result was taken from these weights."""
    if (found := record["checkpoint_sha256"]) != expected:
        raise A3Error(
            f"{record.path}: checkpoint_sha256 is {found}, but the {kind} model's weights are "
            f"{expected}: the result is of another model. Name one of this model."
        )
