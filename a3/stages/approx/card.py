"""The model card of a compressed folder: README.md, written anew from approx.json alone.

Of a folder that transformers saved again it says what the folder itself tells
(a3.models.compressed), and that the rest is unknown.
"""

import hashlib
from pathlib import Path
from statistics import mean
from typing import Any

from huggingface_hub import ModelCardData

from a3.core.files import whole_file
from a3.models.checkpoint import CARD, front_matter
from a3.models.stock import FAMILIES, llama_cpp_cache
from a3.solutions.modes import COMPONENTS, DENSE

PAPER = "[A³](https://arxiv.org/abs/2505.12942)"

MADE = f"Made from {{name}} without training, by closed-form low-rank solutions ({PAPER})"

SAVED_AGAIN = (
    f"Made from {{name}} by closed-form low-rank solutions ({PAPER}), and saved again since, so "
    "perhaps trained"
)

SMALLER = (
    ": the same layers with smaller heads, a smaller intermediate size and a smaller KV cache."
)

# Of every card that is written here.
TAGS = ("a3", "compressed", "low-rank")

# What a base model's card says that holds for the compressed one.
CARRIED = ("license", "license_name", "license_link", "language")

NAMES = {"qk": "QK (attention scores)", "ov": "OV (attention output)", "mlp": "MLP"}

HEAD = ("qk", "ov")

SIZES = {
    "parameters": "parameters",
    "kv_bytes_per_token": "KV cache, bytes a token",
    "flops_per_token": "FLOPs a token",
}

WITHOUT = "  # or, without a3: trust_remote_code=True in both calls, which runs modeling_a3.py"

USE = """```python
import a3{without}
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
    """What a source calls its model; of a local one the last name of its path."""
    if "hub" in source:
        return source["hub"]
    if "wheel" in source:
        return Path(source["wheel"]["member"]).name.removesuffix(".gguf")
    if "path" in source:
        return Path(source["path"]).resolve().name
    return source.get("repeat_kv")


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write README.md by a record as `compressed_record` has it, whole or not at all."""
    base = base_card(record)
    data = ModelCardData(
        base_model=base["name"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, record["base"]["family"]],
        **{key: base[key] for key in CARRIED if key in base},
    )
    name = base["name"] or f"a {record['base']['family']} model"
    known = "modes" in record
    paragraphs = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}, compressed",
        (MADE if known else SAVED_AGAIN).format(name=name) + SMALLER,
        *([components_table(record)] if known else []),
        *([low_precision(record)] if "matrices" in record else []),
        sizes_table(record["size"]),
        calibration(record),
        "## Perplexity",
        perplexities(record.get("perplexity", [])),
        "## Use",
        # The code that travels does not simulate low precision.
        USE.format(without="" if "matrices" in record else WITHOUT),
        *llama_cpp(record),
        "## Licence and provenance",
        licence(base, name),
        provenance(record),
    ]
    text = "\n\n".join(paragraphs) + "\n"
    with whole_file(folder / CARD) as temporary:
        temporary.write_text(text + sign(text))


def sign(text: str) -> str:
    """The last line of a card, which renders as nothing: the hash of all before it."""
    return f"\n<!-- a3 wrote this, SHA-256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_own_card(card: Path) -> bool:
    """Whether a card is as it was written here."""
    text, mark, _ = card.read_text(errors="replace").rpartition(sign("").split("SHA")[0])
    return bool(mark) and card.read_bytes() == (text + sign(text)).encode()


def base_card(record: dict[str, Any]) -> dict[str, Any]:
    """What is known of the base model; nothing where a record says nothing."""
    return record.get("base_card") or {"name": None, "commit": None}


def components_table(record: dict[str, Any]) -> str:
    """Mode, rank and relative error of each component."""
    base = record["base"]
    rows = ["| component | mode | rank | relative error: mean, largest |", "|---|---|---|---|"]
    for component in COMPONENTS:
        full = base["intermediate_size" if component == "mlp" else "head_dim"]
        said = [layer[component] for layer in record["layers"] if component in layer]
        if not said:
            rows.append(f"| {NAMES[component]} | {DENSE} | {full} | |")
            continue
        ranks = sorted({layer["rank"] for layer in said})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        errors = [layer["relative_error"] for layer in said]
        error = f"{mean(errors):.3g}, {max(errors):.3g}"
        rows.append(
            f"| {NAMES[component]} | `{record['modes'][component]}` | {span} of {full} | {error} |"
        )
    return "\n".join(rows)


def low_precision(record: dict[str, Any]) -> str:
    """What a3 quantise did, and the errors of outputs that it left."""
    said, errors = record["provenance"], [m["relative_error"] for m in record["matrices"].values()]
    rank = "" if said["rank"] is None else f" of rank {said['rank']}"
    bits = record["size"]["compressed"]["bits_per_weight"]
    return (
        f"Low precision, simulated (values are rounded, nothing runs faster): {len(errors)} "
        f"matrices, repaired by `{said['method']}`{rank}; {bits:.2f} bits for each weight of the "
        f"dense model's matrices. Relative error of their outputs: mean {mean(errors):.3g}, "
        f"largest {max(errors):.3g}."
    )


def sizes_table(size: dict[str, dict[str, int]]) -> str:
    """Sizes before and after."""
    rows = ["| | dense | compressed | kept |", "|---|---|---|---|"]
    for key, name in SIZES.items():
        dense, compressed = size["dense"][key], size["compressed"][key]
        rows.append(f"| {name} | {dense:,} | {compressed:,} | {compressed / dense:.1%} |")
    return "\n".join(rows)


def llama_cpp(record: dict[str, Any]) -> list[str]:
    """Which KV caches are right in llama.cpp, where heads of all layers have one size."""
    if "layers" not in record:
        return []
    dense = record["base"]["head_dim"]
    sizes = {
        layer.get(component, {}).get("rank", dense)
        for layer in record["layers"]
        for component in HEAD
    }
    if record["base"]["family"] not in FAMILIES or len(sizes) != 1:
        return []
    return [f"As a file for llama.cpp (`a3 export gguf`), KV cache: {llama_cpp_cache(*sizes)}."]


def calibration(record: dict[str, Any]) -> str:
    """The text that statistics were taken of: those of quantisation, where it is quantised."""
    if "provenance" not in record:
        return "Calibration, modes and errors are unknown: it was saved without its approx.json."
    statistics = record["provenance"]["statistics"]
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
        return f"The licence of {name} applies: {base.get('license_name', base['license'])}."
    return f"The licence of {name} applies; a3 does not know which it is."


def provenance(record: dict[str, Any]) -> str:
    """What made the folder, as far as it is known."""
    commit, dense = base_card(record)["commit"], record["base"]["weights_sha256"]
    lines = [
        *([f"- base model's commit `{commit}`"] if commit else []),
        *([f"- base model's weights, SHA-256 `{dense}`"] if dense else []),
        f"- weights here, SHA-256 `{record['weights_sha256']}`",
    ]
    if "provenance" in record:
        made = record["provenance"]
        libraries = ", ".join(f"{name} {version}" for name, version in made["libraries"].items())
        lines += [f"- a3's code `{made['code']}`; {libraries}"]
    if "modes" in record:
        lines += ["- ranks, errors and kept RoPE pairs of every layer: `approx.json`"]
    return "\n".join(lines)
