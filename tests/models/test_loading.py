"""What transformers offers for its own models, on compressed ones of a few families."""

from functools import partial

import pytest
import torch
from test_compressed import logits, tokens
from test_without_a3 import small
from transformers import AutoModelForCausalLM

# RoPE, kept pairs that differ; windows and normed heads; Conv1D and biases; kept pairs all alike.
FEW = ["llama", "gemma3", "gpt2", "cohere2"]


@pytest.fixture(scope="module", params=FEW)
def folder(request, tmp_path_factory):
    """A compressed folder, float32."""
    work = tmp_path_factory.mktemp(request.param)
    small(work, request.param)
    return work / "small"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture
def quick_compile(monkeypatch):
    """Compile without the code generator: the same graphs, in seconds."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_compiles_to_one_graph(folder, quick_compile):
    model, ids = load(folder), tokens(folder)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=0, atol=1e-5)


def test_flex_attention_with_padding_equals_the_default(folder, quick_compile):
    if folder.parent.name.startswith("gpt2"):
        with pytest.raises(ValueError, match="flex_attention"):
            load(folder, attn_implementation="flex_attention")
    if not folder.parent.name.startswith("gemma3"):
        pytest.skip("one family is enough for the time that it takes")
    mask, ids = torch.ones(2, 48, dtype=torch.long), tokens(folder)
    mask[0, :7] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    flex = load(folder, attn_implementation="flex_attention")
    with torch.inference_mode():
        found, expected = (
            model(ids, **inputs).logits[mask.bool()] for model in (flex, load(folder))
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_every_parameter_gets_a_gradient(folder):
    model, ids = load(folder), tokens(folder)
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad.isfinite().all(), name
        # Queries and keys in front of a softmax feel no shift of all keys.
        if not name.endswith("k_proj.bias"):
            assert weight.grad.abs().max() > 0, name


def test_bfloat16_logits_and_cache(folder):
    half, ids = load(folder, dtype=torch.bfloat16), tokens(folder)
    with torch.inference_mode():
        out = half(ids, use_cache=True)
    expected = logits(load(folder), ids)
    assert out.logits.dtype == torch.bfloat16
    assert {layer.keys.dtype for layer in out.past_key_values.layers} == {torch.bfloat16}
    assert (out.logits - expected).norm() < 0.05 * expected.norm()


def test_sharded_files_and_weights_on_disk(folder, tmp_path):
    model, ids = load(folder), tokens(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole = load(tmp_path / "shards", device_map="auto")
    torch.testing.assert_close(logits(whole, ids), logits(model, ids), rtol=0, atol=0)
    offload = {"max_memory": {"cpu": "130KB"}, "offload_folder": tmp_path / "offload"}
    spread = load(tmp_path / "shards", device_map="auto", **offload)
    assert "disk" in spread.hf_device_map.values()
    torch.testing.assert_close(logits(spread, ids), logits(model, ids), rtol=0, atol=1e-6)
