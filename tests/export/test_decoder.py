"""The cache as a list of tensors: what `a3 export onnx` traces."""

import pytest
import torch
from test_compressed import prepare
from test_export import compress
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import a3  # noqa: F401
from a3.core.errors import A3Error
from a3.stages.export.decoder import Decoder, slots_of
from a3.stages.export.onnx_config import config_of


def test_text_in_two_calls_has_the_logits_of_one(tmp_path):
    prepare(tmp_path, "llama", {})
    compress(tmp_path, "small", qk="rxx-w-rxx@8", ov="xkv@12")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    slots = slots_of(model, tmp_path / "small")
    assert [(slot.heads, slot.key, slot.value) for slot in slots] == [(2, 8, 12)] * 2
    decoder, past = Decoder(model), [x for slot in slots for x in slot.empty(1, 0, torch.float32)]
    ids, found = torch.arange(5, 25)[None], []
    with torch.inference_mode():
        expected = model(ids).logits
        for start, end in ((0, 12), (12, 20)):
            places = torch.arange(start, end)[None]
            mask = torch.ones(1, end, dtype=torch.long)
            logits, *past = decoder(ids[:, start:end], mask, places, past)
            found.append(logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-5)
    assert [x.shape for x in past[:2]] == [(1, 2, 20, 8), (1, 2, 20, 12)]


def test_recurrent_layers_are_refused(tmp_path):
    tiny_model(tmp_path / "m", "mamba", state_size=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with pytest.raises(A3Error, match="not one of keys and values in every layer"):
        slots_of(model, tmp_path / "m")


def test_the_graphs_config_names_no_path(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "dense", "llama"))
    assert model.config._name_or_path == str(tmp_path / "dense")
    content = config_of(model, slots_of(model, tmp_path), "model.onnx", "fp32", False)
    assert content["model_type"] == "llama"
    assert str(tmp_path) not in str(content)
