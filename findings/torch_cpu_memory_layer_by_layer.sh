#!/usr/bin/env bash
# Guess: who reads a model tensor by tensor, converts each to float32, keeps a vector of statistics and drops the rest
#        needs the memory of one tensor and of the vectors: freed memory is used again for the next tensor of that size.
# What happens: torch asks for aligned memory (posix_memalign). glibc looks for a hole somewhat larger than what such
#        a block needs, so a freed block does not serve the next one of its size, and each kept vector splits a hole.
#        Blocks under 32 MiB stay with the process: its memory grows by some 60 MiB for each layer of a
#        2048-wide model, with under 1 MiB in use. malloc_trim(0) gives all of it back. The same in NumPy (malloc), or
#        with MALLOC_MMAP_THRESHOLD_=1048576, stays flat. gc.collect() does nothing, since nothing is referenced.
# Versions: torch 2.13.0, numpy 2.4.6, glibc 2.36 (Debian 12), CPU, one thread.
# Who is hit: loaders and compressors that go layer by layer so that a large model fits into a memory limit: killed
#        for memory after some dozen layers, which looks like a leak of references.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/layers.py" <<'PY'
import ctypes
import gc
import platform
import sys

import numpy as np
import torch

torch.set_num_threads(1)
name, library, flat = sys.argv[1:]
ROWS = (2048, 512, 512, 2048, 5632, 5632, 5632)
stored = [torch.ones(rows, 2048, dtype=torch.bfloat16) for rows in ROWS]
arrays = [np.ones((rows, 2048), np.float16) for rows in ROWS]


def anonymous() -> float:
    """Memory of this process that belongs to no file, in MiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))


def statistics(number: int) -> torch.Tensor | np.ndarray:
    """Read (copy), convert and reduce one tensor."""
    if library == "torch":
        return stored[number].clone().float().amax(dim=0)
    return arrays[number].copy().astype(np.float32).max(axis=0)


start, kept, seen = anonymous(), [], []
for _ in range(16):
    kept += [statistics(number) for number in range(len(ROWS))]
    gc.collect()
    seen.append(anonymous() - start)
used = sum(vector.nbytes for vector in kept) / 2**20
ctypes.CDLL(None).malloc_trim(0)
trimmed = anonymous() - start
print(f"{name}, {' '.join(platform.libc_ver())}: {used:.1f} MiB kept; MiB more than at the start, after each layer:")
print(f"    {[round(value) for value in seen]}, after malloc_trim {trimmed:.0f}")
assert trimmed < 20
if flat == "flat":
    assert max(seen) < 60
else:
    assert seen[-1] > 300 and seen[-1] > seen[7] + 150
PY
python=$folder/venv/bin/python
export OMP_NUM_THREADS=1
"$python" "$folder/layers.py" "torch" torch grows
"$python" "$folder/layers.py" "NumPy" numpy flat
MALLOC_MMAP_THRESHOLD_=1048576 "$python" "$folder/layers.py" "torch, fixed threshold" torch flat
