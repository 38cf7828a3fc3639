"""Contiguous pairs are a RoPE of their own: a smaller base and one divisor, and no factors."""

import json

import pytest
import torch
from test_compressed import prepare
from test_export import LLAMA3, angles, compress, logits, read_gguf
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import a3  # noqa: F401
from a3.models.stock import kept_rope, stock
from a3.stages.export.gguf import export_gguf
from a3.stages.export.hf import export_hf

HEAD, THETA = 64, 1e5
ROPES = {
    "default": {"rope_type": "default", "rope_theta": THETA},
    "linear": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0},
}


def frequencies(head_dim, rope):
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=8192)
    return LlamaRotaryEmbedding(config).inv_freq


@pytest.mark.parametrize("name", ROPES)
def test_every_run_of_pairs_has_the_frequencies_that_it_had(name):
    """θ^(-2(a + i)/h) = (θ^(r/h))^(-2i/r) / θ^(2a/h), as transformers computes both, in float32."""
    dense = LlamaConfig(head_dim=HEAD, rope_parameters=ROPES[name], max_position_embeddings=8192)
    every = frequencies(HEAD, ROPES[name])
    for rank in (2, 32, 48, 56, 60, 62):
        for first in range(HEAD // 2 - rank // 2 + 1):
            kept = torch.arange(first, first + rank // 2)
            rope = kept_rope(dense, kept, every)
            plain = "default" if name == "default" and first == 0 else "linear"
            assert (rope["rope_type"], set(rope) <= {"rope_type", "rope_theta", "factor"}) == (
                plain,
                True,
            )
            found = frequencies(rank, rope)
            torch.testing.assert_close(found, every[kept], rtol=1e-6, atol=0)


def test_pairs_with_gaps_or_of_another_scaling_need_factors():
    every = frequencies(HEAD, ROPES["default"])
    dense = LlamaConfig(head_dim=HEAD, rope_parameters=ROPES["default"])
    assert kept_rope(dense, torch.tensor([3, 5]), every)["rope_type"] == "longrope"
    scaled = LlamaConfig(head_dim=HEAD, rope_parameters=LLAMA3)
    kept = torch.arange(4, 32)
    rope = kept_rope(scaled, kept, frequencies(HEAD, LLAMA3))
    assert rope["rope_type"] == "longrope"
    torch.testing.assert_close(
        frequencies(56, rope), frequencies(HEAD, LLAMA3)[kept], rtol=1e-6, atol=0
    )


@pytest.fixture(scope="module", params=["default", "linear"])
def made(request, tmp_path_factory):
    """A model with contiguous pairs, and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    rope = {"rope_type": request.param, "rope_theta": 1e4, "factor": 4.0}
    prepare(folder, "llama", {"rope_parameters": rope, "head_dim": 24})
    compress(folder, "small", qk="uniform-contiguous@12")
    export_hf(folder / "small", folder / "stock")
    return folder


def test_exports_are_plain_and_have_the_same_logits(made, tmp_path):
    expected = logits(made / "small")
    torch.testing.assert_close(logits(made / "stock"), expected, rtol=0, atol=2e-5)
    content = json.loads((made / "stock/config.json").read_text())
    rope = content["rope_parameters"]
    assert rope["rope_type"] in ("default", "linear")
    assert rope["rope_theta"] == content["rope_theta"] == pytest.approx(1e4 ** (12 / 24))
    for of in ("small", "stock"):
        export_gguf(made / of, tmp_path / f"{of}.gguf", "f32")
        fields, tensors = read_gguf(tmp_path / f"{of}.gguf")
        assert "rope_freqs.weight" not in tensors
        assert fields["llama.rope.freq_base"] == pytest.approx(1e4 ** (12 / 24))
        scaled = rope["rope_type"] == "linear"
        assert fields.get("llama.rope.scaling.type") == ("linear" if scaled else None)
        found = torch.from_numpy(angles(fields, tensors)).float()
        torch.testing.assert_close(found, stock(made / "small").frequencies, rtol=1e-6, atol=0)


def test_a_whole_head_is_the_dense_one(made):
    compress(made, "whole", qk="uniform-contiguous@24", ov="xkv@24", mlp="rxx-w@96")
    export_hf(made / "whole", made / "whole-stock")
    torch.testing.assert_close(
        logits(made / "whole-stock"), logits(made / "dense"), atol=1e-5, rtol=0
    )
    rope = json.loads((made / "whole-stock/config.json").read_text())["rope_parameters"]
    assert rope == json.loads((made / "dense/config.json").read_text())["rope_parameters"]
