"""GGUF files, checked whole before transformers reads them.

The library that it uses believes every count and length of the header: a damaged one makes it loop
or allocate without end, or take the weights of another tensor. A GGUF file has no checksum.
"""

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import AutoModelForCausalLM, PreTrainedModel

from a3.errors import A3Error
from a3.models.load import load_config, load_whole

# Bytes of each scalar type of the header.
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
UINT32, STRING, ARRAY = 4, 8, 9
# Lists as long as these numbers are made of them.
COUNTS = (".block_count", ".expert_count")
# Weights that the file may lack: tied ones, and those that transformers makes itself.
SPARE = 1.5


class Header:
    """Reads the header of a GGUF file in order; A3Error where it goes beyond the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.place = 0

    def fail(self, why: str) -> A3Error:
        """The error for a damaged file."""
        return A3Error(f"{self.path}: not a whole GGUF file: {why}. Fetch it again.")

    def skip(self, count: int) -> int:
        """Go over `count` bytes; where they start."""
        start, self.place = self.place, self.place + count
        if self.place > len(self.data):
            raise self.fail(f"{count} bytes expected at {start}, it has {len(self.data)}")
        return start

    def number(self, form: str) -> int:
        """One little-endian integer."""
        return struct.unpack_from(f"<{form}", self.data, self.skip(struct.calcsize(f"<{form}")))[0]

    def string(self) -> bytes:
        """A string, its length before it."""
        start = self.skip(self.number("Q"))
        return self.data[start : self.place]

    def value(self, kind: int) -> int | None:
        """Go over a value; returns it where it is an unsigned number of 32 bits."""
        if kind == UINT32:
            return self.number("I")
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner == STRING:
                for _ in range(count):
                    self.string()
            else:
                self.skip(count * self.width(inner))
        else:
            self.skip(self.width(kind))
        return None

    def width(self, kind: int) -> int:
        """Bytes of a scalar."""
        if kind not in WIDTHS:
            raise self.fail(f"type {kind} of a value at {self.place}")
        return WIDTHS[kind]


def check_gguf(path: Path) -> int:
    """Number of weights in a GGUF file of version 2 or 3.

    Raises A3Error unless header and tensors are there whole, and each tensor's data follows the
    one's before it.
    """
    if path.stat().st_size == 0:
        raise A3Error(f"{path}: an empty file, expected a GGUF file. Fetch it again.")
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        header = Header(path, data)
        start = header.data[: header.skip(4) + 4]
        if start != b"GGUF" or header.number("I") not in (2, 3):
            raise header.fail("it does not start with GGUF and version 2 or 3")
        tensors, pairs = header.number("Q"), header.number("Q")
        found: dict[bytes, Any] = {}
        for _ in range(pairs):
            key = header.string()
            if key in found:
                raise header.fail(f"the key {key!r} stands twice")
            found[key] = header.value(header.number("I"))
            counted = key.decode(errors="replace").endswith(COUNTS)
            if counted and not 0 <= (found[key] or 0) <= tensors:
                raise header.fail(f"{key!r} is {found[key]}, and it has {tensors} tensors")
        return check_tensors(header, tensors, found.get(b"general.alignment") or 32)


def check_tensors(header: Header, count: int, alignment: int) -> int:
    """Number of weights of the tensors that a header lists; A3Error where they are not whole."""
    weights = end = last = 0
    for _ in range(count):
        name, dimensions = header.string(), header.number("I")
        if dimensions > 4:
            raise header.fail(f"tensor {name!r} has {dimensions} dimensions")
        size = prod(header.number("Q") for _ in range(dimensions))
        kind, offset = header.number("I"), header.number("Q")
        if kind not in iter(GGMLQuantizationType) or offset != end:
            raise header.fail(f"tensor {name!r} is of type {kind} at {offset}, expected at {end}")
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        weights += size
        last = end + size // block * width
        end = rounded(last, alignment)
    if rounded(header.place, alignment) + last > len(header.data):
        raise header.fail(f"it ends after {len(header.data)} bytes, before its last tensor does")
    return weights


def rounded(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def load_gguf(path: Path) -> PreTrainedModel:
    """The model of a GGUF file, float32.

    Raises A3Error for a damaged file, one that transformers cannot read, one that lacks weights,
    and weights that are not finite.
    """
    check_size(path, check_gguf(path))
    model = load_whole(path.parent, gguf_file=path.name, dtype=torch.float32)
    for name, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise A3Error(f"{path}: {name} holds NaN or Inf, expected numbers. Fetch it again.")
    return model


def check_size(path: Path, weights: int) -> None:
    """Raise A3Error where the header describes a model that is larger than the file's weights."""
    config = load_config(path.parent, gguf_file=path.name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    # What the libraries say of a header that they cannot read is of any type.
    except Exception as error:
        raise A3Error(
            f"{path}: cannot be read as a model ({type(error).__name__}: {error}). Fetch it again."
        ) from error
    described = sum(value.numel() for value in model.parameters())
    if described > SPARE * weights:
        raise A3Error(
            f"{path}: its header describes {described:,} weights, it has {weights:,}. Fetch it "
            "again."
        )
