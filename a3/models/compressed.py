"""What is known of a compressed folder: by its approx.json, or by its config and tensors alone.

transformers saves a compressed model (`save_pretrained`, so after any training or merging) without
approx.json. Families, shapes and sizes are in config.json and the tensors; the errors that
compression made, its modes and its calibration are then unknown.
"""

from pathlib import Path
from typing import Any

from a3.errors import A3Error
from a3.files import read_record
from a3.models import arch
from a3.models.arch import Arch, CompressedArch, check_count
from a3.models.checkpoint import Checkpoint
from a3.models.families import FAMILIES
from a3.models.load import load_config, load_whole, number_of_parameters
from a3.models.stock import dense_config
from a3.sizes import sizes


def compressed_record(folder: Path) -> dict[str, Any]:
    """The content of a compressed folder's approx.json, or as much of it as the folder itself says.

    That is `base`, the shapes of the dense model (its weights_sha256 is None), `size`, dense and
    compressed, and weights_sha256. Raises A3Error where a file is not the recorded one, and where
    the tensors are not those that the config describes.
    """
    checkpoint = Checkpoint(folder)
    path = folder / "approx.json"
    return read_record(path) if path.exists() else described(folder, checkpoint)


def described(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """`compressed_record` of a folder that has no approx.json."""
    config = load_config(folder)
    check_count(folder / "config.json", "layers", config.num_hidden_layers, len(checkpoint.names()))
    # Without weights; refuses sizes that the tensors do not have.
    model = load_whole(folder, device_map="meta")
    a3, dense = config.a3, dense_config(folder)
    require_lengths(folder, a3, config.num_hidden_layers)
    family = FAMILIES[a3["family"]]
    fields, dense_model = arch.described(folder, family, dense)
    # Any matrix of attention: which of them are products of two, the modes have decided.
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
    """Raise A3Error unless the config says the sizes of so many layers."""
    for key in ("qk_ranks", "ov_ranks", "mlp_ranks", "factors"):
        if len(a3[key]) != layers:
            raise A3Error(
                f"{folder / 'config.json'}: a3.{key} has {len(a3[key])} items, and "
                f"num_hidden_layers is {layers}. Save or build the model again."
            )


def compressed_arch(folder: Path) -> CompressedArch:
    """`CompressedArch` of a folder; raises A3Error as `compressed_record` does."""
    record, of_parts = compressed_record(folder), load_config(folder).a3
    own = {
        "head_dim": max(of_parts["ov_ranks"]),
        "weights_sha256": record["weights_sha256"],
        "size": record["size"]["compressed"],
    }
    if not record["base"]["experts"]:
        own["intermediate_size"] = max(of_parts["mlp_ranks"])
    return CompressedArch(**record["base"] | own)
