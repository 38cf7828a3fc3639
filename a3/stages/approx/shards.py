"""Shards on disk: ranges of layers, each solved by one job."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from a3.core.errors import A3Error
from a3.core.files import SEAL, read_record, sha256, whole_file, write_record
from a3.core.shards import require_all
from a3.models.checkpoint import Checkpoint
from a3.models.packing import in_dtype


@dataclass(frozen=True)
class Shard:
    """The description of a shard: its plan, provenance, and each layer's report and seconds.

    `dtype` is the one that the whole model is written in, None for the dense model's dtypes.
    `content_sha256` is the hash of the tensors' file.
    """

    number: str
    dtype: str | None
    said: dict[str, Any]
    layers: list[dict[str, Any]]
    seconds: list[dict[str, float]]
    content_sha256: str


def write_shard(path: Path, tensors: dict[str, Tensor], **said: Any) -> None:
    """Write the tensors of some layers to `path`, in the dtype of their description, which is
    written beside it in JSON.
    """
    if said["dtype"]:
        tensors = in_dtype(tensors, said["dtype"])
    with whole_file(path) as temporary:
        save_file(dict(sorted(tensors.items())), temporary, {"format": "pt"})
    write_record(path.with_suffix(".json"), asdict(Shard(**said, content_sha256=sha256(path))))


def read_shard(path: Path) -> Shard:
    """The description of the shard in the file `path`; only the header of the file is read.

    Later readers check the weights against the hash in the description. Raises A3Error if
    the file or the JSON beside it is missing, truncated, damaged or of another kind.
    """
    beside = path.with_suffix(".json")
    said = {key: value for key, value in read_record(beside).items() if key != SEAL}
    if said.keys() != {field.name for field in fields(Shard)}:
        raise A3Error(
            f"{beside}: holds the keys {sorted(said)}, which are not those of a shard. Make it "
            "with a3 approx --shard."
        )
    if not path.is_file():
        raise A3Error(f"{path}: no such file. Make the shard again with a3 approx --shard.")
    Checkpoint.open(path)
    return Shard(**said)


def read_shards(paths: list[Path]) -> list[Shard]:
    """The descriptions of all shards of one model, in order.

    Raises A3Error as `read_shard` does, and if a shard is missing, occurs twice, or was made with
    other settings.
    """
    shards = [read_shard(path) for path in paths]
    numbers = [shard.number for shard in shards]
    require_all(numbers, paths[0].parent, "Make what is missing with a3 approx --shard.")
    for path, shard in zip(paths, shards, strict=True):
        if shard.said != shards[0].said:
            raise A3Error(
                f"{path}: made with other modes, statistics or versions than {paths[0]}. Make the "
                "older one again."
            )
    return shards
