"""Experts of other forms: without gates (Nemotron-H), and such as get all tokens at once (Llama 4).

Their statistics, by the family's own matrices; that they compute the same is in tests/models.
"""

import pytest
import torch
from test_compressed import TEXT
from test_probe import load, tiny
from torch.nn.functional import cross_entropy

from a3.models.arch import load_arch
from a3.models.load import load_tokenizer
from a3.rxx.container import Rxx
from a3.rxx.kinds import KINDS
from a3.stages.collect.collect import collect
from a3.stages.collect.gradients import draw
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

CUT = {"tokens": 256, "block_length": 32, "seed": 0, "bos": True}


def of_each(experts, hidden, index, weight):
    """What each expert's last matrix reads (t, n): up alone, and the routing weight of an output.

    transformers has Nemotron-H's in this form.
    """
    for number, up in enumerate(experts.up_proj):
        token, place = torch.where(index == number)
        yield experts.act_fn(hidden[token] @ up.T) * weight[token, place, None]


def of_all(experts, hidden):
    """The same of Llama 4's, whose inputs have the routing weight: 0 where a token is not."""
    for x, both in zip(hidden.chunk(len(experts.down_proj)), experts.gate_up_proj, strict=True):
        gate, up = (x[x.norm(dim=1) > 0] @ both).chunk(2, dim=1)
        yield experts.act_fn(gate) * up


INPUTS = {"nemotron_h": of_each, "llama4_text": of_all}


@pytest.fixture(scope="module", params=INPUTS)
def mixture(request, tmp_path_factory):
    """A folder with a tiny mixture, `dense`, its statistics, and the type."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny(folder / "dense", request.param)
    (folder / "text.txt").write_text(TEXT)
    outputs = {kind: folder / f"{kind}.safetensors" for kind in ("down_diagonal", "mlp_gradient")}
    running = {"dtype": "float32", "device": "cpu"}
    collect(folder / "dense", folder / "text.txt", outputs, **CUT, **running)
    return folder, request.param


def blocks_of(folder):
    tokenizer = load_tokenizer(folder / "dense")
    return token_blocks(load_documents(folder / "text.txt"), tokenizer, **CUT)


def places(arch):
    """The layers with experts, and the names of those."""
    layers = [layer for layer in range(arch.layers) if arch.solves("mlp", layer)]
    return {layer: arch.adapter.experts_module(layer) for layer in layers}


def near(found, expected):
    atol = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_statistics_are_of_what_the_last_matrix_reads(mixture):
    folder, model_type = mixture
    model, arch = load(folder / "dense"), load_arch(folder / "dense")
    squares, counts = {}, {}

    def hook_of(layer):
        def hook(experts, inputs):
            for number, h in enumerate(INPUTS[model_type](experts, *inputs)):
                key = layer, number
                squares[key] = squares.get(key, 0) + h.double().square().sum(0)
                counts[key] = counts.get(key, 0) + len(h)

        return hook

    for layer, name in places(arch).items():
        model.get_submodule(name).register_forward_pre_hook(hook_of(layer))
    with torch.inference_mode():
        for block in blocks_of(folder):
            model(block[None], use_cache=False)
    assert squares
    rxx = Rxx(folder / "down_diagonal.safetensors", "down_diagonal")
    shape = arch.statistic_shape(KINDS["down_diagonal"])
    for (layer, number), expected in squares.items():
        near(rxx.R(layer, shape, number) * CUT["tokens"], expected)
        assert rxx.counts(layer, arch.experts)[number] == counts[layer, number]
    assert sum(counts.values()) == CUT["tokens"] * len(places(arch)) * arch.experts_per_token


def test_the_gradient_of_each_token_counts_once(mixture):
    folder, _ = mixture
    model, arch = load(folder / "dense"), load_arch(folder / "dense")
    d, sums = arch.hidden_size, {}

    def hook_of(layer):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            output.register_hook(lambda g: add(layer, g.reshape(-1, d).double()))

        return hook

    def add(layer, g):
        sums[layer] = sums.get(layer, 0) + g.T @ g

    for layer, name in places(arch).items():
        model.get_submodule(name.rpartition(".")[0]).register_forward_hook(hook_of(layer))
    rxx = Rxx(folder / "mlp_gradient.safetensors", "mlp_gradient")
    step = CUT["tokens"] // rxx.tokens
    for block in blocks_of(folder)[::step]:
        scores = model(block[None], use_cache=False).logits[0]
        labels = draw(scores.detach(), seed=int(block.sum()))
        cross_entropy(scores, labels, reduction="sum").backward()
    assert sums
    for layer, expected in sums.items():
        near(rxx.R(layer, (d, d)) * rxx.tokens, expected)
