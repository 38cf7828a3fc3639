"""a3 export dense: compressed models in the dense model's shapes, and compressed further."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_compressed import prepare
from test_export import MODELS
from transformers import AutoModelForCausalLM, AutoTokenizer

import a3  # noqa: F401
from a3.cli.main import main
from a3.models.arch import load_arch

KINDS = {
    **MODELS,
    "opt": ("opt", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
}
CALIBRATION = ["--tokens", 256, "--block-length", 64]


def run(*words):
    assert main([str(word) for word in words]) == 0


def compress(folder, model, out, *words):
    text = folder / "text.txt"
    text.write_text("some words of a text, " * 200)
    run("compress", model, *words, "--text", text, *CALIBRATION, "-o", out)
    return out


def logits(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", KINDS)
def test_the_logits_are_those_of_the_compressed_model(tmp_path, name):
    prepare(tmp_path, *KINDS[name])
    dense, step = tmp_path / "dense", tmp_path / "step"
    qk = "qk@12" if name == "opt" else "fisher@0.25"
    words = ["--qk", qk, "--ov", "joint@10", "--mlp", "obs@0.4"]
    small = compress(tmp_path, dense, tmp_path / "small", *words)
    run("export", "dense", small, "-o", step)
    ids = torch.randint(0, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(step, ids), logits(small, ids), rtol=0, atol=1e-6)
    assert load_arch(step).size == load_arch(dense).size
    assert shapes(step) == shapes(dense)
    assert len(AutoTokenizer.from_pretrained(step)) == len(AutoTokenizer.from_pretrained(dense))
    if name == "llama":
        # What was dropped is dropped again first, which costs nothing.
        again = compress(tmp_path, step, tmp_path / "again", *words)
        torch.testing.assert_close(logits(again, ids), logits(small, ids), rtol=0, atol=1e-3)
        reports = json.loads((again / "approx.json").read_text())["layers"]
        assert all(report["mlp"]["relative_error"] < 1e-6 for report in reports)


def shapes(folder):
    return {name: tuple(W.shape) for name, W in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize(
    ("family", "changes", "mlp", "says"),
    [
        ("qwen3", {}, "rxx-w@0.5", "its queries and keys are normed"),
        ("mixtral", {}, "rxx-w@0.5", "it has experts"),
        ("gpt2", {}, "rxx-w@0.5", "does not lay out q, k, v and o as gpt2 does"),
        ("llama", {}, "svd@0.5", "some of its matrices are two factors"),
        ("llama", {}, "flap@0.5", "its down projections have a bias"),
    ],
)
def test_what_has_no_such_form_is_refused(tmp_path, capsys, family, changes, mlp, says):
    prepare(tmp_path, family, changes)
    words = ["--qk", "dense", "--ov", "dense", "--mlp", mlp]
    small = compress(tmp_path, tmp_path / "dense", tmp_path / "small", *words)
    assert main(["export", "dense", str(small), "-o", str(tmp_path / "step")]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "step").exists()


def test_a_dense_model_is_refused(tmp_path, capsys):
    prepare(tmp_path, "llama", {})
    dense = str(tmp_path / "dense")
    assert main(["export", "dense", dense, "-o", str(tmp_path / "step")]) == 1
    assert "a dense model already" in capsys.readouterr().err
