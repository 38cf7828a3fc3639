"""a3 heal: training lowers the loss, changes the layers' weights and no more, and can be killed."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny import document, run, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import a3
from a3.cli.main import main
from a3.models.arch import load_arch
from a3.models.compressed import compressed_arch
from a3.models.layerwise import layerwise
from a3.models.load import load_tokenizer
from a3.stages.heal import training
from a3.stages.heal.distil import WARMUP, Distillation, schedule
from a3.stages.heal.fresh import HELD_OUT, fresh_text
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

BLOCKS = ["--block-length", "32", "--threads", "1"]
ROW = {"qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w"}
# With fused projections, transposed matrices, capped logits, experts, no RoPE, a tied head.
FAMILIES = {
    "llama": ("llama", ROW, {}),
    "llama-tied": ("llama", ROW, {"tie_word_embeddings": True, "attention_bias": True}),
    "llama-factors": ("llama", dict.fromkeys(ROW, "svd-llm"), {}),
    "phi3": ("phi3", ROW, {}),
    "gpt2": ("gpt2", ROW | {"qk": "qk", "mlp": "rxx"}, {"n_inner": 96}),
    "gemma2": ("gemma2", ROW, {"head_dim": 16, "final_logit_softcapping": 5.0}),
    "mixtral": ("mixtral", ROW, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
MANY = ("mixtral", ROW, {"num_local_experts": 32, "num_experts_per_tok": 1})


def made(folder, family="llama"):
    """A dense model, its compressed one and a text, in a folder."""
    model_type, modes, config = FAMILIES.get(family, MANY)
    tiny_model(folder / "dense", model_type, **config)
    (folder / "text.jsonl").write_text("".join(map(document, range(60))))
    words = [word for component, mode in modes.items() for word in (f"--{component}", mode)]
    compress = ["compress", folder / "dense", *words, "--ratio", "0.5", *BLOCKS, "--tokens", "512"]
    run(*compress, "--text", folder / "text.jsonl", "-o", folder / "small")
    return folder


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return made(tmp_path_factory.mktemp("models"))


@pytest.fixture
def home(once, tmp_path, monkeypatch):
    """A working folder with a dense model, its compressed one and a text."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*others, tokens=640, out="healed"):
    words = ["heal", "small", "--teacher", "dense", "--text", "text.jsonl", *BLOCKS]
    return [*words, "--tokens", str(tokens), "--learning-rate", "1e-3", *others, "-o", out]


def distillation(folder):
    """The two models of a folder, to be trained."""
    dense, small = folder / "dense", folder / "small"
    models = (small, compressed_arch(small)), (dense, load_arch(dense))
    student, teacher = (layerwise(path, arch, "float32", "cpu", False) for path, arch in models)
    return Distillation(student, teacher, 1e-3, "float32")


def content(folder):
    """Files of a folder, but for the seconds that it took."""
    files = [path for path in folder.iterdir() if path.name != "timing.json"]
    return {path.name: path.read_bytes() for path in files}


def record(folder):
    return json.loads((folder / "approx.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss_and_changes_the_layers_alone(family, tmp_path, monkeypatch):
    monkeypatch.chdir(made(tmp_path, family))
    run(*command(tokens=1280))
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("small", "healed")
    )
    said = record(tmp_path / "healed")
    assert said["healed"]["loss_after"] < 0.9 * said["healed"]["loss_before"]
    assert (said["healed"]["steps"], said["healed"]["tokens"]) == (40, 1280)
    assert {name: (x.shape, x.dtype) for name, x in before.items()} == {
        name: (x.shape, x.dtype) for name, x in after.items()
    }
    layers = re.compile(r"\.(layers|h)\.\d+\.")
    for name in before:
        trained = layers.search(name) and not name.endswith("rope_pairs")
        # Routers of experts that all tokens reach may have no gradient; all else must move.
        if not name.endswith("gate.weight") or not trained:
            assert torch.equal(before[name], after[name]) is not bool(trained), name
    own = ("config.json", "tokenizer.json")
    own += ("modeling_a3.py", "attention_a3.py", "experts_a3.py", "own_attention_a3.py")
    same = {name: (tmp_path / "small" / name).read_bytes() for name in own}
    assert {name: (tmp_path / "healed" / name).read_bytes() for name in own} == same
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert loaded(torch.arange(5, 40)[None]).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_whole_models(family, tmp_path):
    folder = made(tmp_path, family)
    dense, small, one = folder / "dense", folder / "small", distillation(folder)
    blocks = torch.randint(0, 300, (2, 300), generator=torch.Generator().manual_seed(0))
    one.prepare(blocks[0])
    found = sum(one.divergence(block, 2) for block in blocks) / 2
    gradients = {name: weight.grad for name, weight in one.weights.items()}
    whole, target = (AutoModelForCausalLM.from_pretrained(path) for path in (small, dense))
    logs = [model(blocks, use_cache=False).logits.log_softmax(-1) for model in (whole, target)]
    loss = nn.functional.kl_div(*logs, log_target=True, reduction="sum") / blocks.numel()
    loss.backward()
    assert found == pytest.approx(loss.item(), rel=1e-4)
    assert one.measure(blocks) == pytest.approx(found, rel=1e-6)
    for name, weight in whole.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-6)
    layers = [name for name, _ in whole.named_parameters() if re.search(r"\.(layers|h)\.\d", name)]
    assert sorted(gradients) == sorted(layers)


def test_a_run_killed_again_and_again_gives_the_same_bytes(home, monkeypatch, capfd):
    run(*command(out="straight"))
    monkeypatch.setattr(training, "SECONDS_BETWEEN_SAVES", 0)
    for steps in (3, 4, 13):
        assert killed(command(), "training.safetensors", steps)
        assert (home / "healed.a3-work/training.safetensors").is_file()
        assert not (home / "healed").exists()
    # Once more when all is written but the work folder.
    assert killed(command(), "healed", 1)
    run(*command())
    assert "goes on after step 20 of 20" in capfd.readouterr().out
    assert content(home / "healed") == content(home / "straight")
    assert not (home / "healed.a3-work").exists()
    # A second time: the same result in its place.
    run(*command())
    assert content(home / "healed") == content(home / "straight")


def test_experts_that_no_token_reaches_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(made(tmp_path, "many-experts"))
    monkeypatch.setattr(training, "SECONDS_BETWEEN_SAVES", 0)
    run(*command(tokens=96, out="straight"))
    assert killed(command(tokens=96), "training.safetensors", 2)
    run(*command(tokens=96))
    assert content(tmp_path / "healed") == content(tmp_path / "straight")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("small", "healed")]
    stayed = [name for name in files[0] if torch.equal(*(tensors[name] for tensors in files))]
    assert any(".experts." in name for name in stayed)


def killed(words, name, times):
    """Run a command in a process that SIGKILL ends when it has written a file so many times."""
    if not (child := os.fork()):
        replace, left = os.replace, [times]

        def write(source, target):
            replace(source, target)
            left[0] -= os.path.basename(target) == name  # noqa: PTH119
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = write
        os._exit(main(words))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_another_command_is_refused_and_fresh_starts_over(home, capsys, monkeypatch):
    monkeypatch.setattr(training, "SECONDS_BETWEEN_SAVES", 0)
    assert killed(command(), "training.safetensors", 3)
    assert main(command("--batch-size", "2")) == 1
    said = capsys.readouterr().err
    assert "healed.a3-work: was made for another command: batch_size is 1, now 2" in said
    run(*command("--batch-size", "2", "--fresh"))
    assert record(home / "healed")["healed"]["steps"] == 10


def test_blocks_are_those_that_the_calibration_has_not_seen(home):
    statistics = record(home / "small")["provenance"]["statistics"]
    tokenizer = load_tokenizer(home / "small")
    # a3 compress has written the documents anew: other bytes, the same text.
    assert {one["tokens"] for one in statistics.values()} == {512}
    text = fresh_text(home / "text.jsonl", statistics, tokenizer, 32, True)
    assert text.skipped == 512 // 32
    documents = load_documents(home / "text.jsonl")
    whole = token_blocks(documents, tokenizer, 32, 10**6, 0, bos=True)
    assert torch.equal(text.held_out(), whole[16 : 16 + HELD_OUT])
    assert torch.equal(text.training(5), whole[16 + HELD_OUT :][:5])
    assert torch.equal(text.training(10**6), whole[16 + HELD_OUT :])
    # Blocks of another length, and none twice: 16 blocks of 31 tokens and BOS are 496 tokens.
    assert fresh_text(home / "text.jsonl", statistics, tokenizer, 100, True).skipped == 6
    (home / "other.txt").write_text("A river moves towards an ocean or a lake. " * 60)
    assert fresh_text(home / "other.txt", statistics, tokenizer, 32, True).skipped == 0
    assert fresh_text(home / "text.jsonl", {}, tokenizer, 32, True).skipped == 0
    run(*command(tokens=64))
    said = record(home / "healed")["provenance"]
    assert (said["seed"], said["skipped_blocks"], said["text"]) == (0, 16, "text.jsonl")
    # The loss of the first step is that of the first block to train on, before training.
    one = distillation(home)
    one.prepare(whole[0])
    losses = [one.measure(blocks) for blocks in (text.training(1), text.held_out())]
    found = record(home / "healed")["healed"]
    assert losses == pytest.approx([found["losses"][0], found["loss_before"]], rel=1e-6)


def test_a_budget_in_minutes_is_kept(home):
    run(*[*command("--minutes", "0.05", tokens=10**6)])
    said = record(home / "healed")["healed"]
    seconds = json.loads((home / "healed/timing.json").read_text())["seconds"]
    assert said["steps"] > 1 + training.TIMED
    assert 1 < seconds < 9
    # Whichever comes first.
    run(*command("--minutes", "60"))
    assert record(home / "healed")["healed"]["steps"] == 20


def test_the_learning_rate_rises_and_falls():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[:WARMUP] == [schedule(step, None) for step in range(WARMUP)]
    assert max(rates) == rates[WARMUP - 1] == 1
    assert rates[WARMUP - 1 :] == sorted(rates[WARMUP - 1 :], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_bfloat16_computes_in_it_and_stores_what_the_folder_has(home):
    model = AutoModelForCausalLM.from_pretrained(home / "dense").bfloat16()
    tokenizer = AutoTokenizer.from_pretrained(home / "dense")
    texts = [json.loads(document(number))["text"] for number in range(60)]
    small = a3.compress(
        model, tokenizer, texts, ratio=0.5, tokens=512, block_length=32, progress=False
    )
    sizes = {"tokens": 640, "block_length": 32, "learning_rate": 1e-3}
    healed = a3.heal(small, model, tokenizer, texts, **sizes, dtype="bfloat16", progress=False)
    assert {weight.dtype for weight in healed.parameters()} == {torch.bfloat16}
    before, after, target = (
        one(torch.arange(5, 40)[None]).logits.float().log_softmax(-1)
        for one in (small, healed, model)
    )
    losses = [
        nn.functional.kl_div(x, target, log_target=True, reduction="sum").item()
        for x in (before, after)
    ]
    assert losses[1] < losses[0]


def test_a_card_and_inspect_say_that_it_was_trained(home, capfd):
    run(*command())
    run("inspect", "healed")
    said = capfd.readouterr().out
    assert "trained" in said
    assert "20 steps, 640 tokens of text.jsonl" in said
    card = (home / "healed/README.md").read_text()
    assert "without training" not in card
    assert "Training after compression (a3 heal): 20 steps, 640 tokens of text.jsonl" in card
    assert "without training" in (home / "small/README.md").read_text()


def test_a_trained_model_is_quantised_like_others_and_not_after_that(home, capsys):
    run(*command())
    inputs = ("attention_input", "o_proj_input", "mlp_input", "down_input")
    rxx = [f"rxx/{kind}.safetensors" for kind in inputs]
    run("collect", "healed", "--text", "text.jsonl", "--tokens", "256", *BLOCKS, "-o", *rxx)
    run("quantise", "healed", "--rxx", "rxx", "--method", "none", "-o", "low")
    assert record(home / "low")["healed"] == record(home / "healed")["healed"]
    assert main(["heal", "low", *command(out="again")[2:]]) == 1
    assert "low: quantised, and training would undo the rounding" in capsys.readouterr().err


REFUSED = {
    "a dense model": ({1: "dense"}, "dense: a dense model. Name a folder that a3 compress"),
    "trained already": ({1: "healed"}, "healed: trained already (a3 heal)"),
    "a compressed teacher": ({3: "small"}, "small: compressed by a3; the teacher is the dense"),
    "another vocabulary": ({3: "other"}, "other: another vocabulary than small: "),
    "other rows": ({3: "rows"}, "rows: predicts 320 tokens, small 300"),
    "a short text": ({5: "short.txt"}, "short.txt: 4 blocks of 32 tokens, expected more than 4"),
    "no text": ({5: "none.txt"}, "none.txt: no such file"),
    "float16": ({7: "32", 8: "--dtype", 9: "float16"}, "invalid choice: 'float16'"),
    "no minutes": ({8: "--minutes", 9: "0"}, "expected a number above 0, found '0'"),
    "its own input": ({15: "small"}, "small: is an input and would be overwritten"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused(name, home, capsys):
    changes, message = REFUSED[name]
    run(*command(tokens=32))
    tiny_model(home / "rows", "llama", vocab_size=320)
    shutil.copytree(home / "dense", home / "other")
    tokenizer = json.loads((home / "other/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (home / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    (home / "short.txt").write_text("A river moves. " * 12)
    words = command(out="new")
    for place, word in changes.items():
        words[place] = word
    capsys.readouterr()
    assert main(words) == 1
    assert message in capsys.readouterr().err
    assert not (home / "new").exists()
    assert not (home / "new.a3-work").exists()


def test_other_weights_of_the_same_vocabulary_teach_with_a_warning(home, capfd):
    tiny_model(home / "dense", "llama", seed=1)
    run(*command(tokens=32))
    assert "heal: warning: dense has other weights" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_says_what_to_do(home, capsys):
    assert main([*command("--learning-rate", "1e30"), "--fresh"]) == 1
    assert "Lower the learning rate, which is 1e+30" in capsys.readouterr().err
    assert not (home / "healed").exists()
