"""The model card of a compressed folder: README.md, always written from approx.json alone.

Of config.json it has the type of RoPE.

If transformers saved the folder again, approx.json is missing. The card then has what
a3.models.compressed can read from the folder, and says that the rest is unknown.
"""

import hashlib
import re
from pathlib import Path
from statistics import mean
from typing import Any

from huggingface_hub import ModelCardData

from a3.artifacts.fit import said_of, warning_of
from a3.artifacts.runtimes import GGUF, HF, Facts, said_of_graphs
from a3.artifacts.runtimes import said_of as said_of_runtimes
from a3.core.files import (
    SEAL,
    read_json,
    read_record,
    seal_folder,
    sha256,
    whole_file,
    write_record,
)
from a3.models.checkpoint import CARD, front_matter
from a3.models.compressed import own_sizes
from a3.models.stock import FAMILIES, kept_type, llama_cpp_cache
from a3.solutions.modes import COMPONENTS, DENSE

PAPER = "[A³](https://arxiv.org/abs/2505.12942)"

MADE = f"Made from {{name}} without training, by closed-form low-rank solutions ({PAPER})"

TRAINED = (
    f"Made from {{name}} by closed-form low-rank solutions ({PAPER}), and then trained towards it"
)

SAVED_AGAIN = (
    f"Made from {{name}} by closed-form low-rank solutions ({PAPER}), then saved again by "
    "another program, so perhaps fine-tuned"
)

SMALLER = (
    ": the same layers with smaller heads, a smaller intermediate size and a smaller KV cache."
)

CARRIED_ALONG = (
    "Only the language model is compressed. {carried:,} of the parameters are in other parts, such "
    "as the vision tower, which are as they were."
)

# Tags of every card.
TAGS = ("a3", "compressed", "low-rank")

# Fields of the base model's card that also hold for the compressed model.
CARRIED = ("license", "license_name", "license_link", "language")

NAMES = {"qk": "QK (attention scores)", "ov": "OV (attention output)", "mlp": "MLP"}

HEAD = ("qk", "ov")

SIZES = {
    "parameters": "parameters",
    "kv_bytes_per_token": "KV cache, bytes a token",
    "flops_per_token": "FLOPs a token",
}

WITHOUT = "  # or, without a3: trust_remote_code=True in both calls, running the folder's *_a3.py"

# What the example loads, until the folder is published under a name.
ADDRESS = '"FOLDER"'

USE = f"""```python
import a3{{without}}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({ADDRESS})
tokenizer = AutoTokenizer.from_pretrained({ADDRESS})
```"""

USE_HELD = f"""```python
import a3{{without}}
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({ADDRESS})
processor = AutoProcessor.from_pretrained({ADDRESS})
```"""

USE_GRAPH = """```python
from onnxruntime import InferenceSession
from transformers import AutoTokenizer

graph = InferenceSession("FOLDER/{graph}")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""


def base_of(model: dict[str, Any] | None, card: Path) -> dict[str, Any]:
    """What is known about the base model: its name, source, licence and language.

    `model` is the content of its source.json, or None if there is none. `card` is the path of its
    README.md, which need not exist.
    """
    said = front_matter(card)
    carried = {key: said[key] for key in CARRIED if is_text(said.get(key))}
    model = model or {"source": {"path": card.parent}}
    if model.get("licence"):
        carried.setdefault("license", model["licence"])
    made = model.get("origin") or model
    return {"name": base_name(made["source"]), "commit": made.get("commit"), **carried}


def is_text(value: Any) -> bool:
    """Whether this is a string or a list of strings; YAML also yields dates and booleans."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, str) for one in values)


def base_name(source: dict[str, Any]) -> str | None:
    """The model's name in its source; for a local path, the name of the folder or file."""
    if "hub" in source:
        return source["hub"]
    if "wheel" in source:
        return Path(source["wheel"]["member"]).name.removesuffix(".gguf")
    if "wheels" in source:
        return source["wheels"]["file"].removesuffix(".gguf")
    if "path" in source:
        return Path(source["path"]).resolve().name
    return source.get("repeat_kv")


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write README.md from a record of `compressed_record`, atomically."""
    base, wrapper = base_card(record), record["base"].get("wrapper")
    data = ModelCardData(
        base_model=base["name"],
        library_name="transformers",
        pipeline_tag="image-text-to-text" if wrapper else "text-generation",
        tags=[*TAGS, wrapper or record["base"]["family"]],
        **{key: base[key] for key in CARRIED if key in base},
    )
    name = base["name"] or f"a {record['base']['family']} model"
    known = "modes" in record
    made = TRAINED if "healed" in record else MADE if known else SAVED_AGAIN
    paragraphs = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}, compressed",
        made.format(name=name) + SMALLER,
        *([components_table(record)] if known else []),
        *([training(record)] if "healed" in record else []),
        *([low_precision(record)] if "matrices" in record else []),
        sizes_table(own_sizes(record)),
        *([CARRIED_ALONG.format(**record["base"]["size"])] if wrapper else []),
        calibration(record),
        *([losses(record["loss"])] if "loss" in record else []),
        "## Perplexity",
        perplexities(record.get("perplexity", [])),
        "## Use",
        # The code in the folder does not simulate low precision, so it needs a3.
        (USE_HELD if wrapper else USE).format(without="" if "matrices" in record else WITHOUT),
        *([] if wrapper else runtimes(record, dense_rope_type(folder))),
        "## Licence and provenance",
        licence(base, name),
        provenance(record),
    ]
    text = "\n\n".join(paragraphs) + "\n"
    with whole_file(folder / CARD) as temporary:
        temporary.write_text(text + sign(text))


def record_again(folder: Path, record: dict[str, Any]) -> None:
    """Write the card and approx.json of a folder again, from a changed record, and seal them."""
    write_card(folder, record)
    files = record["files"] | {CARD: sha256(folder / CARD)}
    own = {key: value for key, value in record.items() if key != SEAL}
    write_record(folder / "approx.json", own | {"files": files})
    seal_folder(folder, "approx.json")


def record_loss(folder: Path, loss: dict[str, Any]) -> None:
    """Add the loss on calibration and dev text (a3.artifacts.fit) to a folder's record and card."""
    record_again(folder, read_record(folder / "approx.json") | {"loss": loss})


def sign(text: str) -> str:
    """The last line of a card: an invisible comment with the hash of everything before it."""
    return f"\n<!-- a3 wrote this, SHA-256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def own_text(card: Path) -> str | None:
    """A card's text without its last line, if there is one that a3 wrote and nobody has changed."""
    if not card.is_file():
        return None
    text, mark, _ = card.read_text(errors="replace").rpartition(sign("").split("SHA")[0])
    return text if mark and card.read_bytes() == (text + sign(text)).encode() else None


def need_no_a3(folder: Path) -> None:
    """Leave `import a3` out of the example of a folder's card, if the card is a3's."""
    text = own_text(folder / CARD)
    if text is not None:
        for line in (f"import a3{WITHOUT}\n", "import a3\n"):
            text = text.replace(line, "")
        (folder / CARD).write_text(text + sign(text))


def show_graph(folder: Path, graph: str) -> None:
    """Have the example of a folder's card load its ONNX graph, if the card is a3's.

    `graph` is the graph's path in the folder.
    """
    text = own_text(folder / CARD)
    if text is not None:
        before, title, after = text.partition("\n## Use\n")
        example = USE_GRAPH.format(graph=graph)
        after = re.sub(r"```python\n.*?\n```", lambda _: example, after, count=1, flags=re.DOTALL)
        text = before + title + after
        (folder / CARD).write_text(text + sign(text))


def is_own_card(card: Path) -> bool:
    """Whether a3 wrote this card and nobody has changed it since."""
    return own_text(card) is not None


def base_card(record: dict[str, Any]) -> dict[str, Any]:
    """What the record says about the base model; name and commit are None if it says nothing."""
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
        ranks = sorted({rank for layer in said for rank in ranks_of(layer)})
        if counts_experts(said[0]):
            full = f"{base['experts']} experts"
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        errors = [layer["relative_error"] for layer in said]
        error = f"{mean(errors):.3g}, {max(errors):.3g}"
        rows.append(
            f"| {NAMES[component]} | `{record['modes'][component]}` | {span} of {full} | {error} |"
        )
    return "\n".join(rows)


def ranks_of(layer: dict[str, Any]) -> list[int]:
    """The ranks of a component of a layer: of experts each one's, or how many are kept."""
    return [layer["rank"]] if counts_experts(layer) else layer.get("expert_ranks", [layer["rank"]])


def counts_experts(layer: dict[str, Any]) -> bool:
    """Whether the rank of a component of a layer is how many experts are left."""
    return "experts" in layer or "merged" in layer


def training(record: dict[str, Any]) -> str:
    """What a3 heal did; of a model that was quantised after it, too."""
    said = record["healed"]
    return (
        f"Training after compression (a3 heal): {said['steps']:,} steps, {said['tokens']:,} tokens "
        f"of {said['text']} (SHA-256 `{said['text_sha256']}`) that the calibration has not seen. "
        f"KL(dense ‖ compressed) on held-out blocks, nats a token: {said['loss_before']:.4f} "
        f"before, {said['loss_after']:.4f} after. The relative errors above are those before."
    )


def low_precision(record: dict[str, Any]) -> str:
    """What a3 quantise did, and the remaining errors of outputs."""
    said, errors = record["provenance"], [m["relative_error"] for m in record["matrices"].values()]
    rank = "" if said["rank"] is None else f" of rank {said['rank']}"
    bits = record["size"]["compressed"]["bits_per_weight"]
    return (
        f"Low precision, simulated (values are rounded, nothing runs faster): {len(errors)} "
        f"matrices, error correction `{said['method']}`{rank}; {bits:.2f} bits for each weight of "
        f"the dense model's matrices. Relative error of their outputs: mean {mean(errors):.3g}, "
        f"largest {max(errors):.3g}."
    )


def sizes_table(size: dict[str, dict[str, int]]) -> str:
    """Sizes before and after."""
    rows = ["| | dense | compressed | kept |", "|---|---|---|---|"]
    for key, name in SIZES.items():
        dense, compressed = size["dense"][key], size["compressed"][key]
        # Recurrent layers may have no KV cache.
        kept = f"{compressed / dense:.1%}" if dense else "–"
        rows.append(f"| {name} | {dense:,} | {compressed:,} | {kept} |")
    return "\n".join(rows)


def runtimes(record: dict[str, Any], rope_type: str) -> list[str]:
    """What runtimes make of the exports, and which KV-cache types work in llama.cpp.

    `rope_type` is the dense model's. Only of ONNX graphs unless all layers have one head size and
    one set of RoPE pairs.
    """
    base = record["base"]
    title = "What runtimes make of its exports, as far as somebody tried (versions as named):"
    graphs = [f"- after `a3 export onnx`, {text}" for text in said_of_graphs()]
    if "layers" not in record or base["family"] not in FAMILIES:
        return [title, "\n".join(graphs)]
    dense = base["head_dim"]
    said = [layer.get(component, {}) for layer in record["layers"] for component in HEAD]
    sizes = {one.get("rank", dense) for one in said}
    whole = list(range(dense // 2))
    pairs: set[tuple[int, ...]] = {
        tuple(group) for one in said for group in one.get("rope_pairs", [whole])
    }
    if len(sizes) != 1 or len(pairs - {tuple(whole)}) > 1:
        return [title, "\n".join(graphs)]
    (size,), widths = sizes, {layer.get("mlp", {}).get("rank") for layer in record["layers"]}
    kept = list(min(pairs, key=len, default=whole))
    facts = Facts(
        head_dim=size,
        rope=kept_type(rope_type, kept, len(whole)),
        usual=size * base["heads"] == base["hidden_size"],
        by_layer=len(widths) > 1,
    )
    exports = [GGUF] if facts.by_layer else [HF, GGUF]
    others = [
        f"- after `a3 export {one}`, {text}"
        for one in exports
        for text in said_of_runtimes(facts, one)
    ]
    return [
        title,
        "\n".join(others + graphs),
        f"KV cache in llama.cpp (after `a3 export gguf`): {llama_cpp_cache(size)}.",
    ]


def dense_rope_type(folder: Path) -> str:
    """The type of RoPE that config.json says, of the dense model."""
    rope = read_json(folder / "config.json").get("rope_parameters") or {}
    return str(rope.get("rope_type", "default"))


def calibration(record: dict[str, Any]) -> str:
    """The calibration text; of a quantised model, the one that quantisation used."""
    if "provenance" not in record:
        return "Calibration, modes and errors are unknown: the folder has no approx.json."
    statistics = record["provenance"]["statistics"]
    if not statistics:
        return "No calibration text: the modes use only the weights."
    # Gradient statistics use only a share of the tokens; report the largest number.
    said = max(statistics.values(), key=lambda one: one["tokens"])
    # Statistics of earlier versions do not name the text.
    name = said.get("text", "a text")
    return (
        f"Calibration: {said['tokens']:,} tokens of {name} (SHA-256 "
        f"`{said['text_sha256']}`) in blocks of {said['block_length']}, {said['dtype']}."
    )


def losses(loss: dict[str, Any]) -> str:
    """The loss over the dense model's: predicted, on calibration blocks, and on a dev text."""
    warning = warning_of(loss)
    said = f"Loss over the dense model's, in nats a token: {said_of(loss)}."
    return f"{said} **Warning**: {warning}" if warning else said


def perplexities(pairs: list[dict[str, Any]]) -> str:
    """Perplexity before and after, one row a text."""
    if not pairs:
        return "Not measured yet. Measure it with `a3 eval ppl` and add it here with `a3 card`."
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
    """The base model's licence, which also applies to the compressed model."""
    if "license" in base:
        return f"The licence of {name} applies: {base.get('license_name', base['license'])}."
    return f"The licence of {name} applies; a3 could not determine which licence that is."


def provenance(record: dict[str, Any]) -> str:
    """The folder's provenance, as far as it is known."""
    commit, dense = base_card(record)["commit"], record["base"]["weights_sha256"]
    lines = [
        *([f"- base model's commit `{commit}`"] if commit else []),
        *([f"- base model's weights, SHA-256 `{dense}`"] if dense else []),
        f"- compressed weights, SHA-256 `{record['weights_sha256']}`",
    ]
    if "provenance" in record:
        made = record["provenance"]
        libraries = ", ".join(f"{name} {version}" for name, version in made["libraries"].items())
        lines += [f"- a3's code `{made['code']}`; {libraries}"]
    if "modes" in record:
        lines += ["- ranks, errors and kept RoPE pairs of every layer: `approx.json`"]
    return "\n".join(lines)
