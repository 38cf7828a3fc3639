"""Where outputs of attention and MLP are normed, inputs are summed by their share of them, too."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_compressed import MODELS, redraw
from tiny import document, tiny_model
from transformers import AutoModelForCausalLM

from a3.core.errors import A3Error
from a3.models.arch import load_arch
from a3.models.load import load_tokenizer
from a3.rxx import kinds
from a3.rxx.container import Rxx, merge
from a3.rxx.kinds import KINDS, stored_bytes
from a3.solutions.modes import PRESETS, choose
from a3.solutions.plan import Plan
from a3.stages.approx.allocate import allocate
from a3.stages.collect.collect import collect
from a3.stages.collect.hooks import NORM_EPS
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

CUT = {"block_length": 32, "tokens": 128, "seed": 0, "bos": True}
RUN = CUT | {"dtype": "float32", "device": "cpu"}
NORMED = ("gemma2", "gemma3", "olmo2", "glm4")


def prepared(folder, name):
    """A model and a text."""
    family, config = MODELS[name]
    tiny_model(folder / "dense", family, **config)
    redraw(folder / "dense")
    (folder / "text.jsonl").write_text("".join(map(document, range(20))))
    return folder / "dense", folder / "text.jsonl"


def sums_by_hooks(dense, text):
    """By kind and layer, Σ xᵀx of the inputs of o and down, and of these over outputs' rms."""
    arch, model, sums = load_arch(dense), AutoModelForCausalLM.from_pretrained(dense), {}

    def add(key, x, y):
        x = x.detach().double().reshape(-1, x.shape[-1])
        power = y.detach().double().reshape(len(x), -1).square().mean(-1, keepdim=True)
        share = x / (power + NORM_EPS).sqrt()
        known = sums.setdefault(key, [0, 0])
        sums[key] = [known[0] + x.T @ x, known[1] + share.T @ share]

    for layer in range(arch.layers):
        for kind, projection in (("o_proj_input", "o"), ("down_input", "down")):
            model.base_model.get_submodule(arch.module(layer, projection)).register_forward_hook(
                lambda _, x, y, key=(kind, layer): add(key, x[0], y)
            )
    for block in token_blocks(load_documents(text), load_tokenizer(dense), **CUT):
        model(block[None], use_cache=False)
    return sums


@pytest.mark.parametrize("name", [*NORMED, "llama-biased"])
def test_inputs_are_summed_by_their_share_of_normed_outputs(tmp_path, name):
    dense, text = prepared(tmp_path, name)
    outputs = {kind: tmp_path / f"{kind}.safetensors" for kind in ("o_proj_input", "down_input")}
    collect(dense, text, outputs, **RUN)
    expected = sums_by_hooks(dense, text)
    assert expected
    for (kind, layer), (plain, share) in expected.items():
        rxx, shape = Rxx(outputs[kind], kind), tuple(plain.shape)
        near = {"rtol": 1e-4, "atol": 1e-6 * plain.abs().max().item()}
        torch.testing.assert_close(rxx.R(layer, shape) * rxx.tokens, plain, **near)
        if name not in NORMED:
            with pytest.raises(A3Error, match="Collect"):
                rxx.R(layer, shape, normed=True)
            continue
        near = {"rtol": 1e-4, "atol": 1e-6 * share.abs().max().item()}
        torch.testing.assert_close(rxx.R(layer, shape, normed=True) * rxx.tokens, share, **near)


def test_shards_join_to_both_sums(tmp_path):
    dense, text = prepared(tmp_path, "gemma3")
    paths = {name: tmp_path / name / "down_input.safetensors" for name in ("all", "0of2", "1of2")}
    for name, path in paths.items():
        path.parent.mkdir()
        shard = None if name == "all" else name
        collect(dense, text, {"down_input": path}, shard=shard, **RUN)
    whole, *shards = (Rxx(path, "down_input") for path in paths.values())
    merge(shards, tmp_path / "down_input.safetensors")
    joined, n = Rxx(tmp_path / "down_input.safetensors", "down_input"), 96
    for normed in (False, True):
        found, expected = (one.R(1, (n, n), normed=normed) for one in (joined, whole))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.max().item())


def test_what_is_stored_is_what_was_announced(tmp_path):
    dense, text = prepared(tmp_path, "gemma3")
    for kind in ("down_input", "mlp_gradient", "o_proj_input", "mlp_input"):
        collect(dense, text, {kind: tmp_path / f"{kind}.safetensors"}, **RUN)
        file = tmp_path / f"{kind}.safetensors"
        tensors = load_file(file).values()
        assert sum(x.nbytes for x in tensors) == stored_bytes(vars(load_arch(dense)), kind)


def test_layers_that_make_nothing_and_gradients_of_earlier_versions(tmp_path, monkeypatch):
    dense, text = prepared(tmp_path, "gemma3")
    tensors = load_file(dense / "model.safetensors")
    for name, value in tensors.items():
        if "layers.0" in name and ("o_proj" in name or "down_proj" in name):
            value.zero_()
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    plan = Plan(choose(PRESETS["a3-plus"] | {"ratio": "0.3"}))
    (tmp_path / "rxx").mkdir()
    outputs = {kind: tmp_path / f"rxx/{kind}.safetensors" for kind in plan.kinds()}
    collect(dense, text, outputs, **RUN)
    allocate(dense, tmp_path / "rxx", plan, tmp_path / "ranks.json")
    # As an earlier version collected: gradients that no norm weighed, and inputs with one sum.
    monkeypatch.setattr(kinds, "NORMED_OUTPUTS", ())
    old = {kind: path for kind, path in outputs.items() if KINDS[kind].form == "gradient"}
    collect(dense, text, old, **RUN)
    monkeypatch.undo()
    with pytest.raises(A3Error, match=r"gradient.safetensors: tokens are not weighed .* Collect"):
        allocate(dense, tmp_path / "rxx", plan, tmp_path / "ranks.json")
