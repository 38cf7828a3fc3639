"""a3 export gguf: converts a folder to a file for llama.cpp.

Its architecture is `llama`, or, where the sizes of MLPs differ between layers, `deci`, which has
the same graph with sizes by layer.
"""

import tempfile
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
)
from gguf.quants import quantize
from torch import Tensor

import a3.models.modeling_a3  # noqa: F401
from a3.artifacts.runtimes import GGUF, facts_of, warnings_of
from a3.core.errors import A3Error
from a3.core.files import whole_file
from a3.core.progress import LOG, Bar
from a3.models.checkpoint import model_source
from a3.models.gguf_rope import FACTORS
from a3.models.stock import BLOCK, K, Q, Stock, llama_cpp_cache, stock
from a3.stages.export.gguf_vocabulary import add_vocabulary
from a3.stages.export.llama import require_llama

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Of rows that are no multiple of a type's blocks, as llama.cpp's own tool does.
INSTEAD = GGMLQuantizationType.F16


def export_gguf(folder: Path, out: Path, dtype: str) -> None:
    """Write the model of `folder`, dense or compressed, to the file `out`, whole or not at all.

    Matrices are of the type `dtype` (f32, f16, q8_0 …), or float16 where a row is no multiple of
    its blocks; all else is float32. One tensor at a time is in memory. Raises A3Error, with all
    reasons, for a model that llama.cpp's code (`architecture`) would not run as it is, and for
    its tokenizer.
    """
    model = stock(folder, by_layer=True)
    require_llama(model)
    wanted = GGMLQuantizationType[dtype.upper()]
    with whole_file(out) as temporary:
        writer, types = begun(model, wanted, temporary)
        for name, type_ in Bar(types.items(), unit="tensor", desc="gguf"):
            writer.write_tensor_data(quantize(value_of(model, name), type_))
        if model.linear is None:
            writer.write_tensor_data(model.rope_factors.float().numpy())
        writer.close()
    if model.folded:
        LOG.info(f"export: {model.folded}.")
    for warning in warnings_of(facts_of(model), GGUF):
        LOG.warning(f"export: {warning}.")
    if model.head_dim % BLOCK:
        LOG.info(f"export: in llama.cpp, {llama_cpp_cache(model.head_dim)}.")
    if others := [name for name, type_ in types.items() if type_ == INSTEAD != wanted]:
        LOG.info(
            f"export: {len(others)} of {len(types)} tensors are F16, since a row is not a "
            f"multiple of {block_of(wanted)}, the block of {wanted.name}: {others[0]} has "
            f"{model.checkpoint.shape(others[0])[-1]} columns. --multiple 32 avoids this."
        )


def begun(
    model: Stock, wanted: GGMLQuantizationType, out: Path
) -> tuple[GGUFWriter, dict[str, GGMLQuantizationType]]:
    """The writer of a file that has all but the tensors' data, and the tensors' types by name."""
    writer = GGUFWriter(out, MODEL_ARCH_NAMES[architecture(model)])
    add_sizes(writer, model)
    add_vocabulary(writer, model.folder, model.config.vocab_size)
    writer.add_file_type(file_type(wanted))
    types = {name: stored_type(model, name, wanted) for name in names(model)}
    for name, type_ in types.items():
        add_info(writer, tensor_name(model, name), model.checkpoint.shape(name), type_)
    if model.linear is None:
        add_info(writer, FACTORS, (model.head_dim // 2,), GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer, types


def gguf_bytes(folder: Path, dtype: str) -> int:
    """Bytes of the file that `export_gguf` would write of a model; raises A3Error as it does."""
    model = stock(folder, by_layer=True)
    require_llama(model)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "begun.gguf")
        writer, _ = begun(model, GGMLQuantizationType[dtype.upper()], path)
        (tensors,) = writer.tensors
        data = sum(writer.ggml_pad(one.nbytes, writer.data_alignment) for one in tensors.values())
        writer.close()
        return writer.ggml_pad(path.stat().st_size, writer.data_alignment) + data


def add_sizes(writer: GGUFWriter, model: Stock) -> None:
    """Sizes, RoPE and norms."""
    config = model.config
    writer.add_name(model.folder.resolve().name)
    if licence := (model_source(model.folder) or {}).get("licence"):
        writer.add_license(licence)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    sizes = {
        writer.add_feed_forward_length: model.mlp_ranks,
        writer.add_head_count: [config.num_attention_heads] * config.num_hidden_layers,
        writer.add_head_count_kv: [config.num_key_value_heads] * config.num_hidden_layers,
    }
    for add, of in sizes.items():
        add(of if architecture(model) == MODEL_ARCH.DECI else of[0])
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.theta)
    if model.linear not in (None, 1):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.linear)


def architecture(model: Stock) -> MODEL_ARCH:
    """llama.cpp's architecture: `llama`, or `deci` where MLPs have other sizes by layer."""
    return MODEL_ARCH.DECI if len(set(model.mlp_ranks)) > 1 else MODEL_ARCH.LLAMA


def names(model: Stock) -> list[str]:
    """Tensors that are written; a head that is the embedding is not."""
    found = model.names()
    tied = HEAD in found and model.config.tie_word_embeddings
    # A head of its own under a tied config is what transformers takes.
    if tied and torch.equal(model.tensor(HEAD), model.tensor(EMBEDDING)):
        found.remove(HEAD)
    return found


def tensor_name(model: Stock, name: str) -> str:
    """llama.cpp's name of a tensor; raises A3Error if it has none."""
    arch = architecture(model)
    known = get_tensor_name_map(arch, model.config.num_hidden_layers)
    found = known.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        where = MODEL_ARCH_NAMES[arch]
        raise A3Error(f"{model.folder}: tensor {name!r} has no place in llama.cpp's {where!r}.")
    return found


def stored_type(model: Stock, name: str, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type that a tensor is written in."""
    shape = model.checkpoint.shape(name)
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return wanted if shape[-1] % block_of(wanted) == 0 else INSTEAD


def block_of(dtype: GGMLQuantizationType) -> int:
    """How many numbers of a row a type stores together."""
    return GGML_QUANT_SIZES[dtype][0]


def add_info(
    writer: GGUFWriter, name: str, shape: tuple[int, ...], dtype: GGMLQuantizationType
) -> None:
    """Say what a tensor will be."""
    block, width = GGML_QUANT_SIZES[dtype]
    writer.add_tensor_info(
        name, shape, np.dtype(np.float32), prod(shape) // block * width, raw_dtype=dtype
    )


def value_of(model: Stock, name: str) -> np.ndarray:
    """A tensor, float32; rows of q and k in the order that llama.cpp turns them in."""
    value = model.tensor(name).float()
    if Q.search(name):
        value = in_neighbours(value, model.config.num_attention_heads)
    elif K.search(name):
        value = in_neighbours(value, model.config.num_key_value_heads)
    return value.contiguous().numpy()


def in_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Move RoPE pairs (j, j + r / 2) of each head's rows to (2j, 2j + 1): (heads · r, …)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def file_type(dtype: GGMLQuantizationType) -> LlamaFileType:
    """The name that GGUF has for the type of the whole file."""
    name = "ALL_F32" if dtype == GGMLQuantizationType.F32 else f"MOSTLY_{dtype.name}"
    return LlamaFileType[name]
