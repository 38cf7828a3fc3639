"""A compressed model's folder: its config.json, its code and its record."""

from pathlib import Path
from typing import Any

from a3.core.dtypes import WIDTHS
from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.models import arch
from a3.models.arch import check_count
from a3.models.checkpoint import Checkpoint
from a3.models.families import family_of
from a3.models.load import load_config, load_whole, number_of_parameters
from a3.models.shape import Arch, CompressedArch
from a3.models.sizes import sizes
from a3.models.stock import dense_config
from a3.models.wrappers import carried, text_of


def compressed_record(folder: Path) -> dict[str, Any]:
    """The content of approx.json, or as much of it as can be read from the folder itself.

    That is `base`, the shapes of the dense model (its weights_sha256 is None), `size`, dense and
    compressed, and weights_sha256. Raises A3Error if a file has changed, and if the tensors do not
    match the config.
    """
    checkpoint = Checkpoint(folder)
    path = folder / "approx.json"
    return read_record(path) if path.exists() else described(folder, checkpoint)


def dtype_of(record: dict[str, Any]) -> str:
    """The dtype of a compressed folder, by its record: the dense model's, or one that was asked."""
    return record.get("dtype", record["base"]["dtype"])


def own_sizes(record: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Sizes of both models, dense and compressed, with caches in the dtype of the folder."""
    counted, own = WIDTHS[record["base"]["dtype"]], WIDTHS[dtype_of(record)]
    key = "kv_bytes_per_token"
    return {of: size | {key: size[key] // counted * own} for of, size in record["size"].items()}


def described(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """`compressed_record` of a folder that has no approx.json."""
    config = load_config(folder)
    layers = text_of(config).num_hidden_layers
    check_count(folder / "config.json", "layers", layers, len(checkpoint.names()))
    # A load without weights refuses sizes that the tensors do not have.
    model = load_whole(folder, device_map="meta")
    a3, dense = config.a3, dense_config(folder)
    require_lengths(folder, a3, layers)
    family = family_of(a3["family"], a3["structure"], a3.get("wrapper"))
    fields, dense_model = arch.described(folder, family, dense)
    # Any matrix of a layer; the modes have decided which of them are factored.
    matrices = (n for n in family.names_in(checkpoint, 0) if len(checkpoint.shape(n)) > 1)
    dtype = checkpoint.dtype(next(n for n in matrices if not n.endswith("rope_pairs")))
    full = (fields["head_dim"], fields["head_dim"], fields["intermediate_size"])
    dense_size = sizes(fields, [full] * fields["layers"], number_of_parameters(dense_model), dtype)
    ranks = list(zip(a3["qk_ranks"], a3["ov_ranks"], a3["mlp_ranks"], strict=True))
    factors, merged = a3["factors"], a3.get("merged")
    size = sizes(fields, ranks, number_of_parameters(model), dtype, factors, merged)
    # A and B of a quantised model.
    products = (w.numel() for name, w in model.named_parameters() if name.endswith((".A", ".B")))
    size["flops_per_token"] += 2 * sum(products)
    dense_size |= carried(dense_model)
    base = Arch(**fields, dtype=dtype, weights_sha256="", size=dense_size)
    return {
        "base": base.to_json() | {"weights_sha256": None},
        "size": {"dense": dense_size, "compressed": size},
        "weights_sha256": checkpoint.sha256(),
    }


def require_lengths(folder: Path, a3: dict[str, Any], layers: int) -> None:
    """Raise A3Error unless the config has the sizes of this number of layers."""
    merged = ["merged"] if "merged" in a3 else []
    for key in ("qk_ranks", "ov_ranks", "mlp_ranks", "factors", *merged):
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
