#!/usr/bin/env bash
# Guess: safe_open maps a file read-only, so its pages belong to the page cache: a limit on a process's private data
#        (RLIMIT_DATA, `ulimit -d`, which some batch systems set) does not count them, and one tensor of a large
#        file can be read under a limit far below the file's size, as with numpy.memmap(mode="r").
# What happens: the file is mapped privately and writable, which Linux counts as data in full when it is mapped,
#        before a byte is read. Opening a 512 MiB file for a tensor of 4 KiB fails under a limit of 300 MiB
#        ("Cannot allocate memory"), where numpy.memmap of the very same file works.
# Versions: safetensors 0.8.0, numpy 2.4.6, torch 2.13.0, CPython 3.11, Linux 5 and newer.
# Who is hit: loaders that read layer by layer so as to stay under a limit, on clusters that enforce it by RLIMIT_DATA
#        (cgroups do not count such pages).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6 torch==2.13.0
cat > "$folder/read.py" <<'PY'
import resource
import sys

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

path, how = sys.argv[1:]
if how == "write":
    save_file({"large": torch.zeros(2**27), "small": torch.ones(2**10)}, path)
    sys.exit()
with open("/proc/self/status") as status:
    data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + 300 * 2**20,) * 2)
if how == "numpy":
    print("numpy.memmap:", np.memmap(path, np.uint8, "r")[-4:].view(np.float32))
else:
    with safe_open(path, "pt") as file:
        print("safe_open:", file.get_tensor("small").sum().item())
PY
python=$folder/venv/bin/python
"$python" "$folder/read.py" "$folder/x.safetensors" write
"$python" "$folder/read.py" "$folder/x.safetensors" numpy
if "$python" "$folder/read.py" "$folder/x.safetensors" safetensors 2> "$folder/error"; then
  echo "safe_open works under the limit now"; exit 1
fi
echo "safe_open: $(tail -n 1 "$folder/error")"
grep -qi "memory" "$folder/error"
