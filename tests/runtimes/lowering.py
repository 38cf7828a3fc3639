"""Run where a3, torch and ExecuTorch are: lowers several models in one process.

python lowering.py asked.json: a list of [folder, layers, delegate, out]. `layers` of the model are
kept, from the first, or all (0); `delegate` says whether XNNPACK gets what it can compute.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import nn
from torch.export import Dim, export

from a3.models.load import load_model
from a3.stages.export.decoder import Decoder, slots_of

# The most tokens that a call reads, and that the cache has before it: memory is planned for these.
LONGEST = 640
# No size is 0 or 1, or equal to another one, which torch.export would believe.
PAST, LENGTH = 5, 7


class Alone(nn.Module):
    """One text without padding: input_ids (1, L), past (1, G, P, r) each; as `Decoder` returns."""

    def __init__(self, model):
        super().__init__()
        self.decoder = Decoder(model)

    def forward(self, input_ids, past):
        """Logits and cache, positions counted from the cache."""
        new, before = input_ids.shape[1], past[0].shape[2]
        for one in past:
            # Else the lengths of 60 caches get 60 symbols.
            torch._check(one.shape[2] == before)
        mask = torch.ones(1, before + new, dtype=torch.long)
        return self.decoder(input_ids, mask, before + torch.arange(new)[None], past)


@torch.no_grad()
def lower(folder, layers, delegate, out):
    """Write a program."""
    model = load_model(folder, "float32")
    if layers:
        model.model.layers = model.model.layers[:layers]
    past = [x for slot in slots_of(model, folder) for x in slot.empty(1, PAST, model.dtype)]
    new, before = Dim("new", min=1, max=LONGEST), Dim("before", min=0, max=LONGEST)
    exported = export(
        Alone(model).eval(),
        (torch.arange(LENGTH)[None], past),
        dynamic_shapes=({1: new}, [{2: before}] * len(past)),
    )
    partitioner = [XnnpackPartitioner()] if delegate else None
    program = to_edge_transform_and_lower(exported, partitioner=partitioner).to_executorch()
    with out.open("wb") as stream:
        program.write_to_file(stream)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for folder, layers, delegate, out in json.loads(Path(sys.argv[1]).read_text()):
        lower(Path(folder), layers, delegate, Path(out))
