"""a3 export onnx: converts a folder, dense or compressed, to an ONNX graph with a KV cache.

torch.export traces the family's own code, so that every rank, every set of RoPE pairs and every
kind of attention is in the graph as it is. Its inputs and outputs have the names that optimum gave
them, which transformers.js and other decoders look for: input_ids, attention_mask, position_ids and
past_key_values.N.key and .value to logits, present.N.key and .value, of any batch and length.
"""

import json
from pathlib import Path
from typing import Any

from a3.artifacts.card import show_graph
from a3.artifacts.targets import ONNX
from a3.core.dtypes import GRAPH_TYPES
from a3.core.errors import A3Error
from a3.core.files import RECORDS, read_json, sha256, whole_folder, write_record
from a3.core.progress import LOG
from a3.core.provenance import provenance
from a3.models.arch import is_compressed
from a3.models.checkpoint import Checkpoint, hash_files, model_source
from a3.models.load import load_model
from a3.models.travel import bring
from a3.models.wrappers import held_by, wrapper_in
from a3.stages.export.decoder import Slot, slots_of
from a3.stages.export.onnx_check import furthest
from a3.stages.export.onnx_config import config_of
from a3.stages.export.onnx_graph import write_graph

# Where transformers.js looks for the graph of each type, and how it calls the type.
FOLDER = "onnx"
NAMES = {"f32": ("model.onnx", "fp32"), "f16": ("model_fp16.onnx", "fp16")}

# Files of more bytes than protobuf takes get their weights beside them.
LARGEST = 2 * 10**9

# By type, the largest share of the logits' range by which a graph may differ from the model.
LIMITS = {"f32": 1e-3, "f16": 2e-2}


def export_onnx(folder: Path, out: Path, type_: str) -> None:
    """Write the model of `folder`, dense or compressed, as ONNX to the folder `out`, whole or not.

    Weights and cache are of the type `type_`, f32 or f16. onnxruntime then reads the graph, and its
    logits are compared with the model's: of a prompt, with and without padding, and of tokens that
    follow it through the cache. Raises A3Error where they differ, and for a model that torch.export
    cannot trace or whose cache is not one of keys and values.
    """
    if wrapper := wrapper_in(read_json(folder / "config.json")):
        raise A3Error(f"{folder}: {held_by(wrapper)}. Run it in transformers, after import a3.")
    model = load_model(folder, GRAPH_TYPES[type_])
    slots = slots_of(model, folder)
    name, said = NAMES[type_]
    with whole_folder(out, ONNX.seal, [folder]) as made:
        graph = made / FOLDER / name
        graph.parent.mkdir()
        outside = model.get_memory_footprint() > LARGEST
        write_graph(model, slots, graph, outside)
        error = furthest(model, slots, graph)
        # Written so that a number that is not finite fails, too.
        if not error <= LIMITS[type_]:
            raise A3Error(
                f"{folder}: in onnxruntime, the graph's logits differ from the model's by "
                f"{error:.2g} of their range, expected at most {LIMITS[type_]:g}. "
                + ("Take --type f32." if type_ == "f16" else "This family has no export to ONNX.")
            )
        content = config_of(model, slots, name, said, outside)
        (made / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        bring(folder, made, "config.json", "timing.json", *RECORDS)
        show_graph(made, f"{FOLDER}/{name}")
        write_record(made / "export.json", record_of(folder, made, type_, slots, error))
    LOG.info(
        f"export: {FOLDER}/{name}; in onnxruntime its logits are the model's to {error:.1g} of "
        f"their range, through the cache, too. KV cache: {cache_bytes(slots, type_):,} bytes a "
        "token."
    )


def record_of(
    folder: Path, made: Path, type_: str, slots: list[Slot], error: float
) -> dict[str, Any]:
    """The content of export.json."""
    graphs = {f"{FOLDER}/{path.name}": path for path in sorted((made / FOLDER).iterdir())}
    files = hash_files(made) | {name: sha256(path) for name, path in graphs.items()}
    return {
        "files": files,
        "kv_bytes_per_token": cache_bytes(slots, type_),
        "largest_difference_of_range": error,
        "provenance": provenance(
            __name__,
            checkpoint_sha256=Checkpoint(folder).sha256(),
            compressed=is_compressed(folder),
            config_sha256=sha256(folder / "config.json"),
            model=model_source(folder),
            type=type_,
        ),
    }


def cache_bytes(slots: list[Slot], type_: str) -> int:
    """Bytes of the cache that one token takes."""
    width = 4 if type_ == "f32" else 2
    return width * sum(slot.heads * (slot.key + slot.value) for slot in slots)
