#!/usr/bin/env bash
# Guess: a safetensors file is a pure function of its tensors and metadata, so that equal input gives equal bytes.
#        (The format is deterministic in the order of its tensors, and its documentation recommends hashing.)
# What happens: with two or more metadata keys the header lists them in an order that changes from one process
#        to the next, whatever PYTHONHASHSEED is: the same call gives files of different SHA-256. With one key, or
#        none, the bytes are always the same.
# Versions: safetensors 0.8.0, numpy 2.4.6, CPython 3.11.
# Who is hit: whoever addresses weights by content, caches builds, or compares reproducible runs by hash.
#        Put everything under one metadata key (as JSON), and files are equal again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6
cat > "$folder/once.py" <<'PY'
import hashlib
import sys

import numpy as np
from safetensors.numpy import save

keys = int(sys.argv[1])
metadata = {f"key{i}": str(i) for i in range(keys)}
print(hashlib.sha256(save({"a": np.zeros(4, np.float32)}, metadata)).hexdigest())
PY
count() { # how many different files twelve processes make
  for _ in $(seq 12); do PYTHONHASHSEED=0 "$folder/venv/bin/python" "$folder/once.py" "$1"; done | sort -u | wc -l
}
one=$(count 1)
six=$(count 6)
echo "12 processes, the same tensor: $one different file(s) with 1 metadata key, $six with 6 keys"
[ "$one" = 1 ] && [ "$six" -gt 1 ]
