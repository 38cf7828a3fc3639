"""GGUF files as llama.cpp's own script writes them, of tiny models, and changed copies of them."""

import json
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFValueType, GGUFWriter, get_tensor_name_map
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from a3.stages.export.gguf_vocabulary import add_vocabulary

# Of each architecture that a3 reads: the family, what its config has beside the tiny sizes, and
# the file's keys that are not of all.
PHI3 = {"pad_token_id": 1, "tie_word_embeddings": False}
ARCHITECTURES = {
    "llama": ("llama", {}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 32}, {}),
    "qwen3moe": (
        "qwen3_moe",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"norm_topk_prob": True},
        {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
        | {"tie_word_embeddings": True},
        {"attention.sliding_window": 16, "attn_logit_softcapping": 50.0}
        | {"final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7}
        | {"tie_word_embeddings": True},
        {"attention.sliding_window": 16, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4},
    ),
    "phi3": ("phi3", PHI3, {"rope.dimension_count": 16}),
    "stablelm": (
        "stablelm",
        {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
        {"rope.dimension_count": 8},
    ),
    "gpt2": ("gpt2", {"tie_word_embeddings": True, "n_positions": 512}, {}),
    "bloom": ("bloom", {"tie_word_embeddings": True}, {}),
}
LAYER_NORM = ("stablelm", "gpt2", "bloom")


def tiny_gguf(folder: Path, arch: str, **keys) -> Path:
    """`folder` with a tiny model of an architecture's family in `hf`, and its `model.gguf`.

    `keys` are more of the config.
    """
    family, config, own = ARCHITECTURES[arch]
    tiny_model(folder / "hf", family, **config | keys)
    return write_gguf(folder / "hf", folder / "model.gguf", arch, own)


def write_gguf(folder: Path, out: Path, arch: str, own: dict) -> Path:
    """A folder as a float32 GGUF file of an architecture."""
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(out, arch)
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    heads = config.get("num_attention_heads", config.get("n_head"))
    hidden = config.get("hidden_size", config.get("n_embd"))
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    wide = arch in ("gpt2", "bloom")
    writer.add_feed_forward_length(4 * hidden if wide else config["intermediate_size"])
    writer.add_head_count(heads)
    groups = heads if wide else config["num_key_value_heads"]
    writer.add_head_count_kv(groups)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if arch in LAYER_NORM:
        writer.add_layer_norm_eps(config.get("layer_norm_eps", 1e-5))
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if arch not in ("gpt2", "bloom") and "rope.freq_base" not in own:
        writer.add_rope_freq_base(1e4)
    for key, value in own.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{arch}.{key}", value)
    add_vocabulary(writer, folder, config["vocab_size"])
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = get_tensor_name_map(number, layers)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name, value in model.state_dict().items():
        if name in tied:
            continue
        for source, stored in stored_as(arch, name, value, heads, groups, names):
            writer.add_tensor(source, np.ascontiguousarray(stored.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def stored_as(arch, name, value, heads, groups, names):
    """The tensors of the file that one of transformers becomes."""
    if ".experts." in name:
        block = name.split(".")[2]
        projections = ("down",) if name.endswith("down_proj") else ("gate", "up")
        for projection, one in zip(projections, value.chunk(len(projections), dim=1), strict=True):
            yield f"blk.{block}.ffn_{projection}_exps.weight", one
        return
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
        count = heads if "q_proj" in name else groups
        value = value.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
    if arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        value = value + 1
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    if arch == "gpt2" and name.endswith(turned):
        value = value.T
    if arch == "bloom" and "query_key_value" in name:
        value = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    yield (
        names.get_name(name.removeprefix("transformer."), try_suffixes=(".weight", ".bias")),
        value,
    )


def value_type(value):
    """The type that a value is written in: llama.cpp has counts unsigned, and arrays signed."""
    if type(value) is not int or value < 0:
        return GGUFValueType.get_type(value)
    return GGUFValueType.UINT32 if value < 2**32 else GGUFValueType.UINT64


def changed(source: Path, out: Path, keys=None, tensors=None, without=()) -> Path:
    """A copy of a GGUF file with other values of `keys`, more `tensors`, `without` some of both."""
    reader = GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    arch = fields.pop("general.architecture").contents()
    writer = GGUFWriter(out, (keys or {}).get("general.architecture", arch))
    for name, field in fields.items():
        if name not in (*without, *(keys or {})):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for name, value in (keys or {}).items():
        if name == "general.architecture":
            continue
        kind = value_type(value)
        inner = GGUFValueType.get_type(value[0]) if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, inner)
    stored = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for name, value in (stored | (tensors or {})).items():
        if name not in without:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
