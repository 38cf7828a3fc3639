#!/usr/bin/env bash
# Guess: a TorchDispatchMode only sees operations; the compiler is imported by who compiles. So a counter of operations
#        costs some microseconds for each, like a TorchFunctionMode.
# What happens: the class wraps __torch_dispatch__ so that the compiler skips it, and the wrapper imports torch._dynamo
#        when the mode sees its first operation: some 800 modules, a second of CPU time and 70 MB, in a program that
#        never compiles. FlopCounterMode does the same. A mode that defines the class method
#        _should_skip_dynamo (private), returning False, does not.
# Versions: torch 2.13.0, CPU.
# Who is hit: command-line tools, worker processes and tests that count operations or memory: the first
#        measured operation seems to take a second, and its memory belongs to the import.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/mode.py" <<'PY'
import sys
import time

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class Plain(TorchDispatchMode):
    """Passes each operation on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Skipping(TorchDispatchMode):
    """The same, but not wrapped for the compiler."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Function(TorchFunctionMode):
    """The same a level higher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def resident() -> float:
    """Memory of this process that belongs to no file, in MiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))


MODES = {"plain": Plain, "skipping": Skipping, "function": Function, "flops": lambda: FlopCounterMode(display=False)}
which = sys.argv[1]
x = torch.ones(2)
mode = MODES[which]()
assert "torch._dynamo" not in sys.modules
modules, memory, start = len(sys.modules), resident(), time.process_time()
with mode:
    x + 1
taken = time.process_time() - start
modules, memory = len(sys.modules) - modules, resident() - memory
print(f"{which}: {taken:.4f} s, {modules} modules, {memory:.0f} MiB at the first operation")
imported = "torch._dynamo" in sys.modules
assert imported == (which in ("plain", "flops"))
assert taken > 0.2 if imported else taken < 0.1
PY
for mode in plain flops skipping function; do "$folder/venv/bin/python" "$folder/mode.py" "$mode"; done
