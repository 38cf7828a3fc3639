"""Tensors in files: the system keeps in memory what it has room for."""

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from a3.core.errors import A3Error


def mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, np.memmap]:
    """A tensor of this shape in a file, with the content that the file has, and its map to flush.

    A new file takes its room on the disk at once; raises A3Error if there is not enough.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise A3Error(
            f"{path}: cannot write {size / 2**30:.1f} GiB: {error.strerror}. Free some space, or "
            "set TMPDIR to another folder."
        ) from error
    content = np.memmap(path, np.uint8, "r+", shape=(size,))
    return torch.from_numpy(content).view(dtype).view(shape), content
