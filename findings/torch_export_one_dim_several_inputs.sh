#!/usr/bin/env bash
# Guess: one Dim object given to several inputs of torch.export.export means one size, so the program has one symbol
#        for it, as it has when the inputs are added to each other.
# What happens: where the sizes meet only with something added (caches that new tokens are appended to), each input
#        keeps a symbol of its own: four caches, five symbols in range_constraints instead of two, in strict mode too.
#        That the sizes are equal is only a check at run time. torch._check(one.shape[0] == first.shape[0]) in forward
#        makes them one symbol.
# Versions: torch 2.13.0.
# Who is hit: exports of decoders with a cache: the program does not know that its layers' caches are of one
#        length, and states as many free sizes as there are keys and values.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/symbols.py" <<'PY'
import torch
from torch import nn
from torch.export import Dim, export

CACHES = 4


class Added(nn.Module):
    """The caches meet as they are."""

    def forward(self, new, caches):
        return sum(caches) + new.sum()


class Appended(nn.Module):
    """They meet with new tokens appended."""

    def forward(self, new, caches):
        return sum(torch.cat([one, new]) for one in caches)


class Checked(Appended):
    """The same, after a check of their sizes."""

    def forward(self, new, caches):
        for one in caches[1:]:
            torch._check(one.shape[0] == caches[0].shape[0])
        return super().forward(new, caches)


def inputs(*sizes):
    return torch.ones(7), [torch.ones(size) for size in sizes]


for kind, symbols in ((Added, 1), (Appended, CACHES), (Checked, 1)):
    for strict in (False, True):
        dims = {0: Dim("new", min=1, max=640)}, [{0: Dim("past", min=0, max=640)}] * CACHES
        program = export(kind(), inputs(5, 5, 5, 5), dynamic_shapes=dims, strict=strict)
        shapes = [node.meta["val"].shape[0] for node in program.graph.nodes if node.op == "placeholder"]
        print(f"{kind.__name__}, {strict=}: new {shapes[0]}, caches {shapes[1:]},", program.range_constraints)
        assert len(set(map(str, shapes[1:]))) == symbols
        assert len(program.range_constraints) == 1 + symbols
        call = program.module()
        call(*inputs(9, 9, 9, 9))
        try:
            call(*inputs(9, 9, 9, 8))
        except AssertionError as error:
            print("   caches of unequal sizes:", str(error).splitlines()[0])
        else:
            raise SystemExit("unequal sizes are taken now")
PY
"$folder/venv/bin/python" "$folder/symbols.py"
