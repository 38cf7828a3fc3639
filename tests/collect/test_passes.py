"""Layer by layer, up and down: the same bytes as passes over the whole model, and after a kill."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_compressed import MODELS, TEXT, kinds_of, redraw
from tiny import tiny_model

from a3.core.errors import A3Error
from a3.models.arch import load_arch
from a3.models.layerwise import Layerwise, layerwise
from a3.models.load import load_model
from a3.rxx.container import Accumulator
from a3.rxx.kinds import GRADIENT_BLOCKS, KINDS
from a3.stages.collect import fisher, gradients
from a3.stages.collect.collect import calibration_blocks, collect
from a3.stages.collect.hooks import attach_all

CUT = {"tokens": 640, "block_length": 64, "seed": 0, "bos": True}
RUN = CUT | {"dtype": "float32", "device": "cpu"}
VARIANTS = {
    "llama": ("llama", {"num_hidden_layers": 3}),
    "llama-tied": MODELS["llama-tied"],
    **{name: MODELS[name] for name in ("gpt2", "gpt_neox", "falcon", "bloom", "gpt_neo", "opt")},
    **{name: MODELS[name] for name in ("gemma2", "gemma3", "olmo2", "mixtral")},
}


def prepare(folder, name):
    """A tiny model of a family and a text."""
    family, config = VARIANTS[name]
    tiny_model(folder / "dense", family, **config)
    redraw(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    return folder / "dense"


def outputs_in(folder, kinds):
    return {kind: folder / f"{kind}.safetensors" for kind in kinds}


def whole(model, arch, kinds, blocks):
    """Statistics by hooks on the whole model, and `loss.backward()`."""
    sums = {kind: Accumulator(kind, arch.heads_of(KINDS[kind].site)) for kind in kinds}
    by_form = {"fisher": {}, "gradient": {}, "factors": {}}
    forward = {}
    for kind, accumulator in sums.items():
        by_form.get(KINDS[kind].form, forward)[kind] = accumulator
    sampled = by_form["gradient"] | by_form["factors"]
    trunk, layers = model.base_model, range(arch.layers)
    handles = [handle for i in layers for handle in attach_all(arch, forward, trunk, i)]
    with torch.no_grad():
        for block in blocks:
            model(block[None], use_cache=False)
    for handle in handles:
        handle.remove()

    places = {kind: fisher.projections(arch, kind) for kind in by_form["fisher"]}
    for block in blocks:
        model.zero_grad()
        model(block[None], labels=block[None], use_cache=False).loss.backward()
        for kind in places:
            for i in layers:
                found = [fisher.own(trunk, arch, i, projection) for projection in places[kind]]
                rows = torch.stack([fisher.power(*one, arch) for one in found])
                sums[kind].add_sum(i, rows.reshape(arch.statistic_shape(KINDS[kind])))

    model.requires_grad_(False)
    for i in layers:
        for accumulator in sampled.values():
            gradients.attach(trunk, arch, i, accumulator)
    model.get_input_embeddings().register_forward_hook(lambda *a: a[2].requires_grad_(True))
    for block in blocks[::GRADIENT_BLOCKS]:
        logits = model(block[None], use_cache=False).logits[0].float()
        labels = gradients.draw(logits.detach(), seed=int(block.sum()))
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return {kind: accumulator.tensors for kind, accumulator in sums.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_statistics_are_those_of_passes_over_the_whole_model(tmp_path, name):
    dense = prepare(tmp_path, name)
    arch = load_arch(dense)
    kinds = kinds_of(arch)
    blocks = calibration_blocks(dense, tmp_path / "text.txt", **CUT)
    expected = whole(load_model(dense, "float32"), arch, kinds, blocks)
    collect(dense, tmp_path / "text.txt", outputs_in(tmp_path, kinds), **RUN, stream=True)
    for kind in kinds:
        found = load_file(tmp_path / f"{kind}.safetensors")
        assert found.keys() == expected[kind].keys()
        for key, value in expected[kind].items():
            assert torch.equal(found[key], value), (kind, key)
