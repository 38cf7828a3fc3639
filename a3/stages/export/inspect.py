"""a3 inspect: what a checkpoint is, and which runtimes can load it."""

from itertools import groupby
from pathlib import Path
from typing import Any

from a3.artifacts.fit import said_of, warning_of
from a3.artifacts.runtimes import GGUF, HF, facts_of, said_of_graphs
from a3.artifacts.runtimes import said_of as said_of_runtimes
from a3.core.errors import A3Error
from a3.core.files import read_json
from a3.models.arch import is_compressed, load_arch
from a3.models.checkpoint import Checkpoint
from a3.models.compressed import compressed_record, dtype_of, own_sizes
from a3.models.served import obstacles as served_obstacles
from a3.models.stock import llama_cpp_cache, obstacles, rope_type, stock
from a3.models.wrappers import auto_class, held_by, wrapper_in
from a3.solutions.modes import COMPONENTS, SERVABLE
from a3.stages.export.llama import require_llama, require_tokenizer

UNTESTED = "vLLM, TGI"

UNKNOWN = "modes, errors and calibration are unknown: saved again without approx.json"


def inspect(folder: Path) -> str:
    """What a dense or compressed folder is, as text; raises A3Error if it cannot be read."""
    compressed = is_compressed(folder)
    content = read_json(folder / "config.json")
    lines = compressed_lines(folder, content) if compressed else dense_lines(folder)
    lines += [("loads in", text) for text in runtimes(folder, compressed)]
    width = max(len(name) for name, _ in lines)
    shown = [
        f"{'' if i and name == lines[i - 1][0] else name:<{width}}  {text}"
        for i, (name, text) in enumerate(lines)
    ]
    return "\n".join(shown)


def dense_lines(folder: Path) -> list[tuple[str, str]]:
    """What a folder is that its family's own code runs."""
    arch = load_arch(folder)
    what = "unmodified"
    if (folder / "export.json").exists():
        what = "compressed, exported by a3 export hf"
    ranks = {"qk": arch.head_dim, "ov": arch.head_dim, "mlp": arch.intermediate_size}
    return [
        *model_lines(arch.to_json(), what),
        *((component.upper(), f"{rank}") for component, rank in ranks.items()),
        *((name, text) for name, text, _ in size_lines(arch.size, arch.size)),
        *carried_lines(arch.size),
    ]


def compressed_lines(folder: Path, content: dict[str, Any]) -> list[tuple[str, str]]:
    """What a compressed folder is."""
    # The record must be of these weights.
    Checkpoint(folder).verify_all()
    record = compressed_record(folder)
    base, size = record["base"], own_sizes(record)
    lines = model_lines(base | {"dtype": dtype_of(record)}, "compressed by a3")
    for component in COMPONENTS:
        full = base["intermediate_size" if component == "mlp" else "head_dim"]
        kept = f"{runs(content['a3'][f'{component}_ranks'])} of {full}"
        mode = f"{record['modes'][component]}: " if "modes" in record else ""
        lines.append((component.upper(), mode + kept))
    lines += [("experts", text) for text in experts(content["a3"], base["experts"])]
    if "modes" not in record:
        lines.append(("", UNKNOWN))
    if any(content["a3"]["factors"]):
        names = sorted({name for layer in content["a3"]["factors"] for name in layer})
        lines.append(("", f"two factors in place of each of {', '.join(names)}"))
    if said := record.get("healed"):
        lines.append(("trained", training(said)))
    if "quantised" in content["a3"]:
        lines.append(("low precision", low_precision(size, content["a3"]["quantised"])))
    if loss := record.get("loss"):
        lines.append(("loss over dense", f"{said_of(loss)}, nats a token"))
        if warning := warning_of(loss):
            lines.append(("", f"warning: {warning}"))
    both = size_lines(size["compressed"], size["dense"])
    lines += [(name, f"{text} ({share:.1%} of dense)") for name, text, share in both]
    return lines + carried_lines(base["size"])


def experts(a3: dict[str, Any], full: int) -> list[str]:
    """How many of a mixture's `full` experts a layer has left, the same number in all layers whose
    experts are compressed; `a3` is the entry of the config. Nothing where there are none.
    """
    solved = [ranks for n, ranks in enumerate(a3["mlp_ranks"]) if n not in a3["fixed"]["mlp"]]
    if not full or not solved:
        return []
    merged = " after merging; the router chooses among all" if any(a3.get("merged", [])) else ""
    return [f"{len(solved[0])} of {full}{merged}"]


def training(said: dict[str, Any]) -> str:
    """What a3 heal did, in a line."""
    losses = f"{said['loss_before']:.4f} → {said['loss_after']:.4f}"
    return (
        f"after compression: {said['steps']:,} steps, {said['tokens']:,} tokens of {said['text']}; "
        f"KL(dense ‖ compressed) on held-out blocks {losses} nats a token"
    )


def low_precision(size: dict[str, Any], said: dict[str, Any]) -> str:
    """What a3 quantise made of the matrices, in a line; `size` as of `compressed_record`."""
    rank = max(one["rank"] for one in said["modules"].values())
    repair = f", A B of rank {rank}" if rank else ""
    bits = size["compressed"].get("bits_per_weight")
    bits = "unknown" if bits is None else f"{bits:.2f}"
    return f"simulated in {len(said['modules'])} matrices{repair}; bits a weight: {bits}"


def model_lines(arch: dict[str, Any], what: str) -> list[tuple[str, str]]:
    """Family and shapes; `arch` has the fields of `Arch`."""
    heads = f"{arch['heads']} heads of {arch['kv_heads']} key/value groups"
    where = f" in a {arch['wrapper']}" if arch.get("wrapper") else ""
    return [
        ("family", f"{arch['family']}{where} ({arch['attention']}, {arch['mlp']} MLP), {what}"),
        ("shape", f"{arch['layers']} layers, hidden size {arch['hidden_size']}, {heads}"),
        ("dtype", arch["dtype"]),
    ]


def carried_lines(dense: dict[str, int]) -> list[tuple[str, str]]:
    """How many of the parameters are in no language model, by the size of the dense model."""
    said = "of the parameters, in none of the language model's parts: unchanged"
    return [("carried along", f"{dense['carried']:,} {said}")] if "carried" in dense else []


def size_lines(size: dict[str, int], dense: dict[str, int]) -> list[tuple[str, str, float]]:
    """Parameters, KV cache and FLOPs: name, text, share of the dense model's."""
    names = {"parameters": "", "kv_bytes_per_token": " bytes", "flops_per_token": ""}
    titles = ("parameters", "KV cache/token", "FLOPs/token")
    return [
        (title, f"{size[name]:,}{unit}", size[name] / dense[name])
        for title, (name, unit) in zip(titles, names.items(), strict=True)
    ]


def runs(ranks: list[Any]) -> str:
    """Ranks layer by layer, shortly: "48", or "48 in layers 0–9, 52 in 10–29"; of experts the
    least and largest."""
    flat = [f"{min(r)}–{max(r)}" if isinstance(r, list) else str(r) for r in ranks]
    found, start = [], 0
    for rank, group in groupby(flat):
        end = start + len(list(group)) - 1
        found.append(f"{rank} in {start}" if start == end else f"{rank} in {start}–{end}")
        start = end + 1
    return flat[0] if len(found) == 1 else f"(by layer) {', '.join(found)}"


def runtimes(folder: Path, compressed: bool) -> list[str]:
    """Which runtimes load a folder, as it is or exported, and why others do not."""
    found, gguf_obstacles = obstacles(folder), obstacles(folder, by_layer=True)
    wrapper = wrapper_in(read_json(folder / "config.json"))
    by = f" ({auto_class(wrapper).__name__})" if wrapper else ""
    lines = [f"transformers after `import a3`{by}" if compressed else f"transformers{by}"]
    if "auto_map" in read_json(folder / "config.json"):
        lines.append("transformers without a3, with trust_remote_code=True")
    if wrapper:
        return [*lines, f"others: no export: {held_by(wrapper)}"]
    if compressed:
        lines.append(f"vLLM with a3's plugin: {by_plugin(folder)}")
    graphs = [f"after a3 export onnx, {text}" for text in said_of_graphs()]
    if gguf_obstacles:
        lines.append(f"transformers without a3, llama.cpp, {UNTESTED}: no: {'; '.join(found)}")
        return lines + graphs
    model = stock(folder, by_layer=True)
    facts = facts_of(model)
    if found:
        lines.append(f"transformers without a3, {UNTESTED}: no: {'; '.join(found)}")
    elif compressed:
        folded = f" ({model.folded})" if model.folded else ""
        lines.append(f"transformers without a3: after a3 export hf{folded}")
    reason = no_llama(folder)
    cache = llama_cpp_cache(model.head_dim)
    lines.append(f"llama.cpp: {f'no: {reason}' if reason else f'after a3 export gguf; {cache}'}")
    if not found:
        where = "after a3 export hf, " if compressed else ""
        lines += [where + text for text in said_of_runtimes(facts, HF)]
        sizes = ", ".join(map(str, SERVABLE))
        lines.append(
            f"{UNTESTED}: fused attention for heads of {sizes}: this model has {model.head_dim}"
        )
    if not reason:
        lines += [f"after a3 export gguf, {text}" for text in said_of_runtimes(facts, GGUF)]
    return lines + graphs


def by_plugin(folder: Path) -> str:
    """Whether vLLM serves a compressed folder itself where a3 is installed, and if not, why."""
    a3 = read_json(folder / "config.json")["a3"]
    found = served_obstacles(a3, rope_type(folder))
    return f"no: {'; '.join(found)}" if found else "yes (tried on CPUs, with vLLM 0.32)"


def no_llama(folder: Path) -> str | None:
    """Why llama.cpp cannot have a folder that other runtimes can; None if it can."""
    try:
        require_llama(stock(folder, by_layer=True))
        require_tokenizer(folder)
    except A3Error as error:
        return str(error)
    return None
