"""A compressed model's folder: its config.json, its code and its record."""

import shutil
from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.models import arch, attention_a3, modeling_a3
from a3.models.arch import Arch, CompressedArch, check_count
from a3.models.checkpoint import Checkpoint
from a3.models.families import FAMILIES
from a3.models.load import load_config, load_whole, number_of_parameters
from a3.models.registry import LazyConfig
from a3.models.sizes import Ranks, sizes
from a3.models.stock import dense_config


def compressed_record(folder: Path) -> dict[str, Any]:
    """The content of approx.json, or as much of it as can be read from the folder itself.

    That is `base`, the shapes of the dense model (its weights_sha256 is None), `size`, dense and
    compressed, and weights_sha256. Raises A3Error if a file has changed, and if the tensors do not
    match the config.
    """
    checkpoint = Checkpoint(folder)
    path = folder / "approx.json"
    return read_record(path) if path.exists() else described(folder, checkpoint)


def described(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """`compressed_record` of a folder that has no approx.json."""
    config = load_config(folder)
    check_count(folder / "config.json", "layers", config.num_hidden_layers, len(checkpoint.names()))
    # A load without weights refuses sizes that the tensors do not have.
    model = load_whole(folder, device_map="meta")
    a3, dense = config.a3, dense_config(folder)
    require_lengths(folder, a3, config.num_hidden_layers)
    family = FAMILIES[a3["family"]]
    fields, dense_model = arch.described(folder, family, dense)
    # Any matrix of attention; the modes have decided which of them are factored.
    attention = f"{family.attention_module(0)}."
    dtype = checkpoint.dtype(
        next(n for n in checkpoint.names() if n.startswith(attention) and n.endswith(".weight"))
    )
    full = (fields["head_dim"], fields["head_dim"], fields["intermediate_size"])
    dense_size = sizes(fields, [full] * fields["layers"], number_of_parameters(dense_model), dtype)
    ranks = list(zip(a3["qk_ranks"], a3["ov_ranks"], a3["mlp_ranks"], strict=True))
    size = sizes(fields, ranks, number_of_parameters(model), dtype, a3["factors"])
    # A and B of a quantised model.
    products = (w.numel() for name, w in model.named_parameters() if name.endswith((".A", ".B")))
    size["flops_per_token"] += 2 * sum(products)
    base = Arch(**fields, dtype=dtype, weights_sha256="", size=dense_size)
    return {
        "base": base.to_json() | {"weights_sha256": None},
        "size": {"dense": dense_size, "compressed": size},
        "weights_sha256": checkpoint.sha256(),
    }


def require_lengths(folder: Path, a3: dict[str, Any], layers: int) -> None:
    """Raise A3Error unless the config has the sizes of this number of layers."""
    for key in ("qk_ranks", "ov_ranks", "mlp_ranks", "factors"):
        if len(a3[key]) != layers:
            raise A3Error(
                f"{folder / 'config.json'}: a3.{key} has {len(a3[key])} items, and "
                f"num_hidden_layers is {layers}. Save or build the model again."
            )


def dense_or_compressed(folder: Path) -> Arch:
    """`CompressedArch` of a compressed folder, `Arch` of a dense one."""
    return compressed_arch(folder) if arch.is_compressed(folder) else arch.load_arch(folder)


def compressed_arch(folder: Path) -> CompressedArch:
    """`CompressedArch` of a folder; raises A3Error as `compressed_record` does."""
    record, compressed = compressed_record(folder), load_config(folder).a3
    own = {
        "head_dim": max(compressed["ov_ranks"]),
        "weights_sha256": record["weights_sha256"],
        "size": record["size"]["compressed"],
    }
    if not record["base"]["experts"]:
        own["intermediate_size"] = max(compressed["mlp_ranks"])
    return CompressedArch.from_json(record["base"] | own, folder / "approx.json")


def compressed_config(
    dense: dict[str, Any],
    arch: Arch,
    ranks: list[Ranks],
    pairs: list[int],
    factors: list[dict[str, int]],
    *,
    down_bias: bool,
    same_pairs: bool,
) -> dict[str, Any]:
    """The content of a compressed model's config.json, from the dense one's.

    `ranks`, `pairs` (kept RoPE pairs of a head, if a layer has RoPE) and `factors` (ranks of
    factored matrices) have one item per layer. `down_bias`: the MLP's output gets a bias, even if
    the family has none. `same_pairs`: all layers with RoPE keep the same pairs.
    """
    qk_ranks, ov_ranks, mlp_ranks = map(list, zip(*ranks, strict=True))
    config = dense | {"model_type": LazyConfig.model_type}
    classes = modeling_a3.classes(arch.family)
    # Replaces references to code of the dense model, which is not copied.
    config["auto_map"] = {
        auto: f"{Path(modeling_a3.__file__).stem}.{own.__name__}" for auto, own in classes.items()
    }
    config["architectures"] = [classes["AutoModelForCausalLM"].__name__]
    config["a3"] = {
        "family": arch.family,
        "modules": arch.adapter.modules,
        "heads": arch.heads,
        "kv_heads": arch.kv_heads,
        "scaling": arch.scaling,
        "qkv_bias": arch.qkv_bias,
        "o_bias": arch.o_bias,
        "qk_norm": arch.qk_norm,
        "rope": arch.rope_layout is not None,
        "nope_layers": arch.nope_layers,
        "same_pairs": same_pairs,
        "rope_pairs": [n if arch.has_rope(layer) else 0 for layer, n in enumerate(pairs)],
        "qk_ranks": qk_ranks,
        "ov_ranks": ov_ranks,
        "mlp_ranks": mlp_ranks,
        "factors": factors,
        "down_bias": down_bias,
    }
    return config


def bring_code(folder: Path) -> None:
    """Copy the code of compressed models, with which `trust_remote_code=True` runs without a3."""
    for code in map(Path, (attention_a3.__file__, modeling_a3.__file__)):
        shutil.copyfile(code, folder / code.name)


def pairs_name(arch: Arch, layer: int) -> str:
    """Tensor of the kept RoPE pairs of one layer."""
    return f"{arch.adapter.attention_module(layer)}.rope_pairs"
