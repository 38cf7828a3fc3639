"""Layer by layer, up and down: the same bytes as passes over the whole model, and after a kill."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_compressed import MODELS, TEXT, kinds_of, redraw
from tiny import BLOCK, run, tiny_model
from torch.nn.functional import cross_entropy

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.core.mapped import mapped
from a3.models.arch import describe, load_arch
from a3.models.layerwise import Layerwise, Streamed, layerwise
from a3.models.load import load_model
from a3.rxx.container import Accumulator
from a3.rxx.kinds import GRADIENT_BLOCKS, KINDS
from a3.stages.collect import collect as stage
from a3.stages.collect import fisher, gradients
from a3.stages.collect.collect import calibration_blocks, collect
from a3.stages.collect.hooks import attach_all
from a3.stages.collect.state import State

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


def collect_whole(model, arch, kinds, blocks, out):
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
    for kind, accumulator in sums.items():
        accumulator.save(out / f"{kind}.safetensors", {})


@pytest.mark.parametrize("name", VARIANTS)
def test_statistics_are_those_of_passes_over_the_whole_model(tmp_path, name):
    dense = prepare(tmp_path, name)
    arch = load_arch(dense)
    kinds = kinds_of(arch)
    blocks = calibration_blocks(dense, tmp_path / "text.txt", **CUT)
    collect_whole(load_model(dense, "float32"), arch, kinds, blocks, tmp_path / "whole")
    collect(dense, tmp_path / "text.txt", outputs_in(tmp_path, kinds), **RUN, stream=True)
    places = tmp_path, tmp_path / "whole"
    for kind in kinds:
        found, expected = (load_file(path / f"{kind}.safetensors") for path in places)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), (kind, key)


# --- perplexity ---


def scores(model, text, *more):
    out = model.parent / "ppl.json"
    run("eval", "ppl", model, "--text", text, *BLOCK, *more, "-o", out)
    return read_record(out)["block_nll"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_perplexity_layer_by_layer_is_that_of_the_whole_model(tmp_path, name, dtype):
    dense, text = prepare(tmp_path, name), tmp_path / "text.txt"
    settings = ["--tokens", "256", "--dtype", dtype]
    expected = scores(dense, text, *settings, "--no-stream")
    assert len(set(expected)) == 4
    assert scores(dense, text, *settings, "--stream") == expected


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3", "mixtral"])
def test_compressed_models_are_read_layer_by_layer(tmp_path, name):
    """Factors, other biases and norms, experts of different sizes."""
    dense, text = prepare(tmp_path, name), tmp_path / "text.txt"
    mlp = "rxx-w" if name == "mixtral" else "svd-llm"
    modes = ["--qk", "rxx-w-rxx@0.25", "--ov", "identity@0.5", "--mlp", f"{mlp}@0.25"]
    settings = ["--tokens", "256"]
    run("compress", dense, *modes, *settings, *BLOCK, "--text", text, "-o", tmp_path / "small")
    expected = scores(tmp_path / "small", text, *settings, "--no-stream")
    assert expected != scores(dense, text, *settings)
    assert scores(tmp_path / "small", text, *settings, "--stream") == expected


def test_what_does_not_fit_is_scored_layer_by_layer(tmp_path, monkeypatch):
    dense, text = prepare(tmp_path, "llama"), tmp_path / "text.txt"
    expected = scores(dense, text, "--tokens", "256")
    monkeypatch.setattr("a3.models.layerwise.memory_at_hand", lambda: 0)
    monkeypatch.setattr("a3.models.load.load_whole", None)
    assert scores(dense, text, "--tokens", "256") == expected


# --- one layer at a time ---


@pytest.mark.parametrize("name", VARIANTS)
def test_one_layer_at_a_time_has_weights(tmp_path, name):
    """And of embedding and head only what is used, unless they are one."""
    dense = prepare(tmp_path, name)
    model = Streamed(dense, load_arch(dense), "float32", "cpu")

    def there():
        return {n for n, w in model.model.named_parameters() if not w.is_meta}

    embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    assert there() == set()
    with model.entrance():
        assert not embedding.weight.is_meta
        assert head.weight.is_meta != (head.weight is embedding.weight)
        model.record(torch.arange(8))
        assert not any(".layer." in n for n in there())
    with model.layer(1):
        assert there() == {n for n, _ in model.model.named_parameters() if ".1.layer." in n}
    with model.exit():
        assert not head.weight.is_meta
        assert embedding.weight.is_meta != (head.weight is embedding.weight)
    assert there() == set()


def test_a_tensor_that_is_missing_is_named(tmp_path):
    dense = prepare(tmp_path, "llama")
    tensors = load_file(dense / "model.safetensors")
    lost = "model.layers.1.input_layernorm.weight"
    arch = load_arch(dense)
    save_file({n: t for n, t in tensors.items() if n != lost}, dense / "model.safetensors")
    with (
        pytest.raises(A3Error, match=r"no tensor for layers\.1\.input_layernorm\.weight"),
        Streamed(dense, arch, "float32", "cpu").layer(1),
    ):
        pass
    save_file(
        {n: t for n, t in tensors.items() if n != "lm_head.weight"}, dense / "model.safetensors"
    )
    with (
        pytest.raises(A3Error, match=r"no tensor for lm_head\.weight"),
        Streamed(dense, arch, "float32", "cpu").entrance(),
    ):
        pass


# --- after a kill ---

KINDS_OF_ALL_PASSES = ("q_blocks", "down_diagonal", "attention_fisher", "mlp_gradient")

# Embedding, three layers up, head, three layers down, and the last two once more: a child for each
# step kills itself when that step is to be noted as done, before or after.
STOPS = ((0, "after"), (2, "before"), (5, "after"), (7, "before"), (12, "before"))
KILLED = """
import json, os, signal, sys
from pathlib import Path
from a3.stages.collect.collect import collect
from a3.stages.collect.state import State

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
outputs = {kind: folder / "out" / f"{kind}.safetensors" for kind in settings.pop("kinds")}
write = State.write
for step, when in settings.pop("stops"):
    child = os.fork()
    if not child:
        def killed(self):
            for moment in ("before", "after"):
                if self.done == step and when == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                if moment == "before":
                    write(self)

        State.write = killed
        text, state = folder / "text.txt", folder / "state"
        collect(folder / "dense", text, outputs, **settings, state=state)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert json.loads(Path(folder, "state/steps.json").read_text())["done"] <= step
"""


def test_after_a_kill_a_collection_goes_on(tmp_path):
    dense, text = prepare(tmp_path, "llama"), tmp_path / "text.txt"
    whole, again = (outputs_in(tmp_path / name, KINDS_OF_ALL_PASSES) for name in ("whole", "out"))
    collect(dense, text, whole, **RUN)
    words = json.dumps(RUN | {"kinds": KINDS_OF_ALL_PASSES, "stops": STOPS})
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), words], check=True)
    assert read_record(tmp_path / "state/steps.json")["done"] == 11
    collect(dense, text, again, **RUN, state=tmp_path / "state")
    for kind in KINDS_OF_ALL_PASSES:
        assert again[kind].read_bytes() == whole[kind].read_bytes()
    assert not (tmp_path / "state").exists()


def test_no_step_is_done_twice(tmp_path, monkeypatch):
    dense, text = prepare(tmp_path, "llama"), tmp_path / "text.txt"
    ran, run_layer, stop = [], Layerwise.run, [4]

    def layer(self, index, hidden):
        ran.append(index)
        if len(ran) == stop[0]:
            raise KeyboardInterrupt
        return run_layer(self, index, hidden)

    monkeypatch.setattr(Layerwise, "run", layer)
    outputs, settings = outputs_in(tmp_path, ("q_blocks",)), RUN | {"tokens": 192}
    with pytest.raises(KeyboardInterrupt):
        collect(dense, text, outputs, **settings, state=tmp_path / "state")
    assert ran == [0, 0, 0, 1]
    collect(dense, text, outputs, **settings, state=tmp_path / "state")
    assert ran[4:] == [1, 1, 1, 2, 2, 2]


def test_a_state_of_other_settings_is_refused(tmp_path, monkeypatch):
    dense, text = prepare(tmp_path, "llama"), tmp_path / "text.txt"
    outputs, state = outputs_in(tmp_path, ("q_blocks",)), tmp_path / "state"
    monkeypatch.setattr("a3.stages.collect.collect.save", None)
    with pytest.raises(TypeError):
        collect(dense, text, outputs, **RUN, state=state)
    with pytest.raises(A3Error, match="state: begun with seed 0, and now it is 1"):
        collect(dense, text, outputs, **RUN | {"seed": 1}, state=state)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("mine")
    with pytest.raises(A3Error, match=r"mine: holds notes and no steps\.json"):
        collect(dense, text, outputs, **RUN, state=tmp_path / "mine")
    assert (tmp_path / "mine/notes").read_text() == "mine"


def test_too_little_disk_is_refused_at_once(tmp_path):
    with pytest.raises(A3Error, match=r"hidden: cannot write .* GiB: .*Free some space"):
        mapped(tmp_path / "hidden", (2**50,), torch.float32)
    assert not (tmp_path / "hidden").exists()


def test_hidden_states_need_no_cleaning_up_after_a_kill(tmp_path):
    """A file without a name goes with its process."""
    state = State(tmp_path, None)
    states = state.tensor("hidden", (2, 3), torch.float32)
    states.fill_(1.0)
    assert states.sum() == 6.0
    assert not list(tmp_path.iterdir())


def test_a_collection_without_a_state_leaves_no_file_after_a_kill(tmp_path, monkeypatch):
    dense, temporary, left, save = prepare(tmp_path, "llama"), tmp_path / "t", [], stage.save

    def seen(*arguments):
        left.extend(path for path in temporary.rglob("*") if path.is_file())
        save(*arguments)

    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(stage, "save", seen)
    outputs = outputs_in(tmp_path / "rxx", ["down_input", "v_blocks", "mlp_gradient"])
    collect(dense, tmp_path / "text.txt", outputs, **RUN)
    assert left == []
    assert list(temporary.iterdir()) == []
    assert all(path.is_file() for path in outputs.values())


@pytest.mark.parametrize("stream", [False, True])
def test_the_loss_has_no_part_of_routers(tmp_path, stream):
    """A config may add one that keeps all experts in use: it is of training only."""
    tiny_model(tmp_path, "mixtral", num_local_experts=4, output_router_logits=True)
    model = layerwise(tmp_path, describe(tmp_path), "float32", "cpu", stream)
    block = torch.arange(5, 45)
    with torch.no_grad():
        with model.entrance():
            model.record(block)
            hidden = model.enter(block)
        for number in range(len(model.layers)):
            with model.layer(number):
                hidden = model.run(number, hidden)
        with model.exit():
            out = model.leave(hidden, labels=block[None])
    torch.testing.assert_close(out.loss, cross_entropy(out.logits[0, :-1], block[1:]))
