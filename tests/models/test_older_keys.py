"""Folders that a3 writes say RoPE in older keys, too: what reads those alone turns equally."""

import json

import pytest
import torch
from gguf_files import ARCHITECTURES, changed, tiny_gguf
from test_compressed import prepare
from test_gguf import ROPES
from tiny import run
from transformers import AutoConfig, AutoModelForCausalLM

import a3  # noqa: F401
from a3.models.older import older_rope
from a3.solutions.modes import choose
from a3.solutions.plan import Plan
from a3.stages.approx.approximate import approximate
from a3.stages.export.hf import export_hf

WITHOUT_ROPE = ("gpt2", "bloom")


@torch.inference_mode()
def logits(folder):
    ids = torch.arange(5, 45)[None]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def require_both(folder):
    """The keys change nothing where both are read, and say the same where one is."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    expected, before = AutoConfig.from_pretrained(folder).rope_parameters, logits(folder)
    newer = {key: value for key, value in content.items() if not key.startswith("rope_")}
    path.write_text(json.dumps(newer | {"rope_parameters": content["rope_parameters"]}))
    assert AutoConfig.from_pretrained(folder).rope_parameters == expected
    older = {key: value for key, value in content.items() if key != "rope_parameters"}
    path.write_text(json.dumps(older))
    torch.testing.assert_close(logits(folder), before, rtol=0, atol=0)
    path.write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch not in WITHOUT_ROPE])
def test_folders_of_gguf_files_have_them(tmp_path, arch):
    run("model", tiny_gguf(tmp_path, arch), "-o", tmp_path / "back")
    content = require_both(tmp_path / "back")
    assert content["rope_theta"] == {"gemma3": 1e6}.get(arch, 1e4)
    assert content["head_dim"] == (32 if "head_dim" in ARCHITECTURES[arch][1] else 16)
    if arch == "gemma3":
        assert content["rope_local_base_freq"] == 1e4


@pytest.mark.parametrize("name", ROPES)
def test_scalings_have_them(tmp_path, name):
    keys, tensors, _ = ROPES[name]
    path = changed(tiny_gguf(tmp_path, "llama"), tmp_path / "x.gguf", keys, tensors)
    run("model", path, "-o", tmp_path / "back")
    content = require_both(tmp_path / "back")
    plain = content["rope_parameters"]["rope_type"] == "default"
    assert content.get("rope_scaling") == (None if plain else content["rope_parameters"])


def test_models_without_rope_have_none(tmp_path):
    run("model", tiny_gguf(tmp_path, "gpt2"), "-o", tmp_path / "back")
    assert not [
        key for key in json.loads((tmp_path / "back/config.json").read_text()) if "rope" in key
    ]


@pytest.mark.parametrize("mode", ["uniform-global", "uniform-contiguous"])
def test_exports_have_them(tmp_path, mode):
    prepare(tmp_path, "llama", {})
    modes = {"qk": f"{mode}@12", "ov": "xkv@12", "mlp": "rxx-w@64", "ratio": "-"}
    approximate(tmp_path / "dense", tmp_path / "rxx", Plan(choose(modes)), tmp_path / "small")
    export_hf(tmp_path / "small", tmp_path / "stock")
    content = require_both(tmp_path / "stock")
    assert content["head_dim"] == 12


def test_rope_parameters_without_a_type_are_the_default():
    assert older_rope({"rope_parameters": {"rope_theta": 5.0}}) == {"rope_theta": 5.0}
