"""Hybrids, and other types whose files or classes are unlike memory, from a config to text."""

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_compressed import TEXT
from test_probe import load, tiny
from test_without_a3 import python_without_a3
from tiny import run
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from a3.core.errors import A3Error
from a3.models.arch import load_arch
from a3.models.checkpoint import Checkpoint
from a3.models.compressed import compressed_record
from a3.models.layerwise import layerwise
from a3.models.probe.probe import probe
from a3.models.probe.trial import SAME, gap, logits

# By type, what does not take the preset's mode: latent attention stays, and scores with a norm that
# queries and keys share; scores without RoPE have a mode of their own.
LATENT = ["--qk", "dense", "--ov", "dense"]
HYBRIDS = {
    "bailing_hybrid": LATENT,
    "falcon_h1": [],
    "kimi_linear": LATENT,
    "llama4_text": ["--qk", "dense"],
    "nemotron_h": ["--qk", "qk"],
    "olmo_hybrid": [],
}
IDS = torch.arange(2, 16).view(2, 7)

# What a user without a3 does with the folder of each type.
SCRIPT = """
import importlib.util, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

assert importlib.util.find_spec("a3") is None
options = {"trust_remote_code": True, "dtype": torch.float32, "attn_implementation": "eager"}
options |= {"experts_implementation": "eager"}
found, work = {}, Path(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.inference_mode():
        found[folder] = model(torch.arange(2, 16).view(2, 7), use_cache=False).logits
save_file(found, work / "logits.safetensors")
"""


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    """The folder of a type, with a tiny model, `dense`, and `small`, which `a3 compress` made."""
    made = {}

    def folder_of(model_type):
        if model_type not in made:
            folder = made[model_type] = tmp_path_factory.mktemp(model_type)
            tiny(folder / "dense", model_type)
            (folder / "text.txt").write_text(TEXT)
            text = ["--text", folder / "text.txt", "--tokens", "128", "--block-length", "32"]
            modes = ["--preset", "a3-plus", *HYBRIDS[model_type]]
            run("compress", folder / "dense", *text, *modes, "--ratio", "0.3", "-o",
                folder / "small")  # fmt: skip
        return made[model_type]

    return folder_of


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_from_a_config_to_text(hybrids, model_type, tmp_path):
    """The written model, the loaded one and the one saved again are the same, and make text."""
    folder = hybrids(model_type)
    size = compressed_record(folder / "small")["size"]
    small = load(folder / "small")
    assert size["compressed"]["parameters"] == sum(x.numel() for x in small.parameters())
    assert size["compressed"]["parameters"] < size["dense"]["parameters"]
    assert size["compressed"]["flops_per_token"] < size["dense"]["flops_per_token"]
    found = logits(small, IDS)
    assert found.isfinite().all()
    assert small.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 10)
    small.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path), IDS), found, rtol=0, atol=0)


def test_without_a3_they_compute_the_same(hybrids, tmp_path):
    folders = {str(hybrids(model_type) / "small"): model_type for model_type in HYBRIDS}
    python = python_without_a3(tmp_path / "venv")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-I", "-c", SCRIPT, tmp_path, *folders],
        env={"PATH": os.environ["PATH"]} | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for folder, found in load_file(tmp_path / "logits.safetensors").items():
        assert gap(found, logits(load(folder), IDS)) < SAME, folders[folder]


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_tensors_have_the_names_and_values_in_memory(hybrids, model_type):
    """Whatever files call them; experts that files have one by one stay so."""
    folder = hybrids(model_type) / "dense"
    checkpoint, memory = Checkpoint(folder, "model"), load(folder).state_dict()
    alone = {name for name in checkpoint.names() if ".experts." in name}
    stacked = {name for name in memory if ".experts." in name}
    assert set(checkpoint.names()) - alone == memory.keys() - stacked
    for name in memory.keys() - stacked:
        assert checkpoint.shape(name) == tuple(memory[name].shape)
        torch.testing.assert_close(checkpoint.tensor(name), memory[name], rtol=0, atol=0)


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_they_run_layer_by_layer_from_files(hybrids, model_type):
    folder = hybrids(model_type) / "dense"
    model = layerwise(folder, load_arch(folder), "float32", "cpu", stream=True)
    with model.entrance():
        model.record(IDS[0])
        hidden = model.enter(IDS[0])
    for number in range(len(model.layers)):
        with torch.no_grad(), model.layer(number):
            hidden = model.run(number, hidden)
    with torch.no_grad(), model.exit():
        found = model.leave(hidden).logits
    assert gap(found, logits(load(folder), IDS[:1])) < SAME


def test_a_tensor_in_memory_may_be_of_several_files(hybrids, tmp_path):
    dense = hybrids("olmo_hybrid") / "dense"
    stored = load_file(dense / "model.safetensors")
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    where = {key: f"model-{'q_conv1d' in key}.safetensors" for key in stored}
    for file in set(where.values()):
        save_file({key: stored[key] for key in stored if where[key] == file}, tmp_path / file)
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    name = "model.layers.0.linear_attn.conv1d.weight"
    expected = Checkpoint(dense, "model").tensor(name)
    torch.testing.assert_close(Checkpoint(tmp_path, "model").tensor(name), expected)


def test_two_stored_tensors_of_one_name_are_refused(hybrids, tmp_path):
    dense = hybrids("nemotron_h") / "dense"
    stored = load_file(dense / "model.safetensors")
    key = "backbone.norm_f.weight"
    save_file(stored | {key.replace("backbone", "model"): stored[key].clone()},
              tmp_path / "model.safetensors")  # fmt: skip
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    with pytest.raises(A3Error, match=r"backbone\.norm_f\.weight and model\.norm_f\.weight are"):
        Checkpoint(tmp_path, "model")


def test_buffers_that_no_file_has_are_the_familys(hybrids):
    """transformers passes by the modules that compute them, in classes that are not its own."""
    folder = hybrids("falcon_h1")
    found, expected = (dict(load(folder / n).named_buffers()) for n in ("small", "dense"))
    names = [name for name in expected if name.endswith("mup_vector")]
    assert names
    for name in names:
        torch.testing.assert_close(found[name], expected[name])


def content_of(model_type, **keys):
    return CONFIG_MAPPING[model_type].from_dict(keys).to_dict()


def test_experts_that_read_a_latent_stay():
    """Those of Nemotron 3 Super; their attention is compressed."""
    types = ["linear_attention", "moe", "full_attention", "moe"]
    outcome = probe("nemotron_h", content_of("nemotron_h", layer_types=types, moe_latent_size=96))
    assert outcome.parts == {"qk": "1 of 4", "ov": "1 of 4", "mlp": ""}
    assert "their inputs are not 64 wide" in outcome.why["mlp"]


def test_sizes_in_a_dictionary_of_an_older_config_become_small():
    """Of Kimi Linear's folders, whose class takes them over."""
    linear = {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 128, "num_heads": 320}
    content = content_of("kimi_linear", linear_attn_config=linear, num_hidden_layers=4)
    assert probe("kimi_linear", content).parts == {"qk": "", "ov": "", "mlp": "3 of 4"}


def test_types_whose_layers_share_weights_are_refused():
    outcome = probe("zamba2")
    assert outcome.structure is None
    assert "layers 1 and 3 share shared_transformer.self_attn.q_proj.weight" in outcome.why["qk"]
