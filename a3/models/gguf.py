"""Reads GGUF files; the whole file is checked before any of its content is used.

Other libraries trust every count and length in the header. With a damaged header they loop or
allocate without end, or return the weights of another tensor. A GGUF file has no checksum.
"""

import mmap
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from a3.core.errors import A3Error
from a3.models.gguf_keys import FILE, OWN, TEMPLATE, TEXT, checked
from a3.numerics.finite import require_finite

# Each scalar type of the header as struct has it.
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

STRING, ARRAY = 8, 9

# The code makes lists of these lengths, so they are limited.
COUNTS = (".block_count", ".expert_count")

# Types of matrices; integer types are not weights.
INTEGERS = {GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64", "F64")}


class Header:
    """Reads the header of a GGUF file in order; A3Error beyond the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.place = 0

    def fail(self, why: str) -> A3Error:
        """The error for a damaged file."""
        return A3Error(f"{self.path}: not a whole GGUF file: {why}. Fetch it again.")

    def skip(self, count: int) -> int:
        """Skip `count` bytes and return where they start."""
        start, self.place = self.place, self.place + count
        if self.place > len(self.data):
            raise self.fail(f"{count} bytes expected at {start}, it has {len(self.data)}")
        return start

    def number(self, form: str) -> Any:
        """One little-endian number."""
        return struct.unpack_from(f"<{form}", self.data, self.skip(struct.calcsize(f"<{form}")))[0]

    def string(self) -> str:
        """A string, preceded by its length."""
        start = self.skip(self.number("Q"))
        try:
            return self.data[start : self.place].decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"the text at {start} is not UTF-8") from error

    def value(self, code: int) -> Any:
        """A value."""
        if code == STRING:
            return self.string()
        if code != ARRAY:
            return self.number(self.form(code))
        inner, count = self.number("I"), self.number("Q")
        if inner == STRING:
            return [self.string() for _ in range(count)]
        form = self.form(inner)
        start = self.skip(count * struct.calcsize(f"<{form}"))
        return list(struct.unpack_from(f"<{count}{form}", self.data, start))

    def form(self, code: int) -> str:
        """A scalar type as struct has it."""
        if code not in FORMS:
            raise self.fail(f"type {code} of a value at {self.place}")
        return FORMS[code]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `shape` as torch has it, `start` and `end` in bytes of the file."""

    shape: tuple[int, ...]
    dtype: GGMLQuantizationType
    start: int
    end: int


@dataclass(frozen=True)
class Gguf:
    """A GGUF file: the values of its header and where its tensors lie."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Place]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the code that runs it."""
        return self.needed("general.architecture")

    def of_file(self, key: str, default: Any = None) -> Any:
        """A value of the file or its tokenizer; raises A3Error for one that is not as expected."""
        expected = TEXT if key.startswith(f"{TEMPLATE}.") else FILE[key]
        if key not in self.values:
            return default
        return checked(self.path, key, self.values[key], expected)

    def own(self, key: str, default: Any = None) -> Any:
        """A value of the architecture, by its name without it; raises A3Error as `of_file` does."""
        expected, key = OWN[key], f"{self.architecture}.{key}"
        if key not in self.values:
            return default
        return checked(self.path, key, self.values[key], expected)

    def needed(self, key: str) -> Any:
        """A required value of the architecture or the file."""
        value = self.of_file(key) if key in FILE else self.own(key)
        if value is None:
            name = key if key in FILE else f"{self.architecture}.{key}"
            words = (FILE | OWN)[key].words
            raise A3Error(f"{self.path}: {name} is missing, expected {words}. Fetch it again.")
        return value

    def tensor(self, name: str) -> Tensor:
        """A tensor, dequantised to float32; raises A3Error for one that is not finite."""
        place = self.tensors[name]
        data = np.memmap(self.path, np.uint8, "r", place.start, (place.end - place.start,))
        rows = data.reshape(*place.shape[:-1], -1)
        value = torch.from_numpy(np.array(dequantize(rows, place.dtype), np.float32))
        require_finite(value, f"{self.path}: {name}", "numbers. Fetch it again.")
        return value.reshape(place.shape)


def read_gguf(path: Path) -> Gguf:
    """The header of a GGUF file of version 2 or 3.

    Raises A3Error unless header and tensors are complete, the tensors' data follow one another, and
    the file holds a whole model: not one of several files and not an adapter.
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
        count, pairs = header.number("Q"), header.number("Q")
        values: dict[str, Any] = {}
        for _ in range(pairs):
            key = header.string()
            if key in values:
                raise header.fail(f"the key {key!r} stands twice")
            values[key] = header.value(header.number("I"))
            if key.endswith(COUNTS) and not is_count(values[key], count):
                raise header.fail(f"{key!r} is {values[key]}, and it has {count} tensors")
        file = Gguf(path, values, {})
        require_whole_model(file)
        alignment = file.of_file("general.alignment", 32)
        return replace(file, tensors=tensor_places(header, count, alignment))


def is_count(value: Any, most: int) -> bool:
    """Whether a value is an integer from 0 to a limit."""
    return isinstance(value, int) and 0 <= value <= most


def require_whole_model(file: Gguf) -> None:
    """Raise A3Error for a file that is not a complete model."""
    if (count := file.of_file("split.count", 0)) > 1:
        raise A3Error(
            f"{file.path}: file {file.of_file('split.no', 0) + 1} of {count} that hold one model. "
            "Merge them with llama.cpp's own tool: llama-gguf-split --merge FIRST-FILE.gguf "
            "WHOLE.gguf"
        )
    if (what := file.of_file("general.type", "model")) != "model":
        raise A3Error(
            f"{file.path}: general.type is {what!r}, expected a model. Name the file of a whole "
            "model."
        )
    file.needed("general.architecture")


def tensor_places(header: Header, count: int, alignment: int) -> dict[str, Place]:
    """Where the tensors lie that a header lists; A3Error if they are not whole."""
    places: dict[str, Place] = {}
    end = last = 0
    for _ in range(count):
        name, dimensions = header.string(), header.number("I")
        if not 1 <= dimensions <= 4 or name in places:
            raise header.fail(f"tensor {name!r} has {dimensions} dimensions, or stands twice")
        shape = tuple(reversed([header.number("Q") for _ in range(dimensions)]))
        code, offset = header.number("I"), header.number("Q")
        if code not in iter(GGMLQuantizationType) or offset != end:
            raise header.fail(f"tensor {name!r} is of type {code} at {offset}, expected at {end}")
        dtype = GGMLQuantizationType(code)
        block, width = GGML_QUANT_SIZES[dtype]
        if dtype in INTEGERS or shape[-1] % block:
            raise header.fail(f"tensor {name!r}, {shape}, is of type {dtype.name}")
        last = end + prod(shape) // block * width
        places[name] = Place(shape, dtype, end, last)
        end = rounded(last, alignment)
    start = rounded(header.place, alignment)
    if start + last > len(header.data):
        raise header.fail(f"it ends after {len(header.data)} bytes, before its last tensor does")
    return {
        name: Place(one.shape, one.dtype, start + one.start, start + one.end)
        for name, one in places.items()
    }


def rounded(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple
