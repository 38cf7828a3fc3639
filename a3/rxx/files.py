"""safetensors files with a sealed record, written one tensor at a time.

The format (huggingface/safetensors): the length of the header in 8 bytes, the lowest first; the
header, JSON padded with spaces to a multiple of 8 bytes; then the tensors' bytes. The files are the
same, byte for byte, as those of `safetensors.torch.save_file`, which takes all tensors at once.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from a3.core.errors import A3Error
from a3.core.files import seal, unseal, whole_file

# The format's names of types, and bytes of a number. Both are in the order of tensors in a file,
# which is the library's: wider types first, so that all numbers are aligned.
TYPES = {torch.int64: "I64", torch.float64: "F64", torch.uint8: "U8"}

WIDTHS = {"I64": 8, "F64": 8, "U8": 1}


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, list[int]]],
    record: dict[str, Any],
    read: Callable[[str], Tensor],
) -> None:
    """Write a file atomically; `tensors` are types and shapes by name, `read` gives each of them.

    Raises A3Error as `whole_file` does.
    """
    # One key only: the library, of which readers may expect the same bytes, has no order of keys.
    header: dict[str, Any] = {"__metadata__": {"a3": json.dumps(seal(record), sort_keys=True)}}
    order = sorted(tensors, key=lambda name: (list(WIDTHS).index(tensors[name][0]), name))
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + WIDTHS[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in order:
            stream.write(read(name).contiguous().numpy().data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
    """Write tensors that are in memory together, like `write`."""
    types = {name: (TYPES[value.dtype], list(value.shape)) for name, value in tensors.items()}
    write(path, types, record, tensors.__getitem__)


def open_sealed(
    path: Path, absent: str, kind: str = "an Rxx file", again: str = "Collect again."
) -> tuple[Any, dict[str, Any]]:
    """A file and its record; A3Error if it is truncated, damaged, or absent (which says `absent`).

    `kind` and `again` say what was expected, and what to do. The file is as `safe_open` gives it:
    tensors are read when they are asked for.
    """
    try:
        file = safe_open(path, framework="pt")
        record = json.loads(file.metadata()["a3"])
    except FileNotFoundError:
        raise A3Error(f"{path}: no such file. {absent}") from None
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise A3Error(f"{path}: truncated, damaged or not {kind} ({error!r}). {again}") from error
    return file, unseal(record, path)


def types_of(file: Any) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor of an open file by its name, without reading it."""
    slices = {name: file.get_slice(name) for name in sorted(file.keys())}
    return {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}


def sum_hash(value: Tensor) -> str:
    """Hex SHA-256 of a tensor's shape and bytes."""
    digest = hashlib.sha256(repr(tuple(value.shape)).encode())
    digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()
