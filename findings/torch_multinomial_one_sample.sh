#!/usr/bin/env bash
# Guess: one label per row costs no more than two or 64: torch.multinomial(p, 1) reads each row once and draws one
#        number for it, and `replacement` makes no difference for a single sample.
# What happens: for one sample (with or without replacement) torch draws an exponential for every entry and takes the
#        largest quotient: 50 million random numbers for 1024 rows over a vocabulary of 49152. On a CPU that takes some
#        20 times as long as 64 samples with replacement, which it draws from cumulative sums with one uniform each.
#        multinomial(p, 2, replacement=True)[:, :1] has the same distribution as multinomial(p, 1).
# Versions: torch 2.13.0, CPU, one thread.
# Who is hit: labels drawn from a model's own prediction (Fisher information, sampled losses, distillation) and
#        generation on CPUs: a draw for each token of a batch can cost as much as the output layer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/draw.py" <<'PY'
import time
from collections.abc import Callable

import torch

torch.set_num_threads(1)
torch.manual_seed(0)
p = torch.randn(1024, 49152).softmax(-1)


def seconds(run: Callable[[], object]) -> float:
    """CPU time, the best of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


said = {
    "1 sample": seconds(lambda: torch.multinomial(p, 1)),
    "1 sample, replacement": seconds(lambda: torch.multinomial(p, 1, replacement=True)),
    "2 samples, replacement": seconds(lambda: torch.multinomial(p, 2, replacement=True)),
    "64 samples, replacement": seconds(lambda: torch.multinomial(p, 64, replacement=True)),
    "50 million exponentials": seconds(lambda: torch.empty_like(p).exponential_()),
}
print({name: f"{value:.3f} s" for name, value in said.items()})
weights = torch.tensor([0.1, 0.2, 0.7]).expand(100_000, 3)
for draw in (torch.multinomial(weights, 1), torch.multinomial(weights, 2, replacement=True)[:, :1]):
    shares = draw.flatten().bincount(minlength=3) / len(weights)
    print("shares of labels with probability 0.1, 0.2, 0.7:", shares)
    assert (shares - weights[0]).abs().max() < 0.01
one = min(said["1 sample"], said["1 sample, replacement"])
assert one > 5 * max(said["2 samples, replacement"], said["64 samples, replacement"])
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/draw.py"
