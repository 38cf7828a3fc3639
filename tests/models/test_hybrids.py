"""Hybrids: recurrent layers beside attention, from a config to text, and files unlike memory."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_compressed import TEXT
from test_probe import load, tiny
from test_without_a3 import python_without_a3
from tiny import run
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from a3.core.errors import A3Error
from a3.models.arch import load_arch
from a3.models.checkpoint import Checkpoint
from a3.models.compressed import compressed_record
from a3.models.layerwise import layerwise
from a3.models.probe.trial import logits

# By type, what does not take the preset's mode: latent attention stays, and scores without RoPE have
# a mode of their own.
LATENT = ["--qk", "dense", "--ov", "dense"]
HYBRIDS = {
    "bailing_hybrid": LATENT,
    "nemotron_h": ["--qk", "qk"],
    "olmo_hybrid": [],
}
IDS = torch.arange(2, 16).view(2, 7)


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request, tmp_path_factory):
    """A folder with a tiny model of a type, `dense`, and `small`, as `a3 compress` makes it."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny(folder / "dense", request.param)
    (folder / "text.txt").write_text(TEXT)
    modes = ["--preset", "a3-plus", *HYBRIDS[request.param]]
    text = ["--text", folder / "text.txt", "--tokens", "512", "--block-length", "64"]
    run("compress", folder / "dense", *text, *modes, "--ratio", "0.3",
        "-o", folder / "small")  # fmt: skip
    return folder


def test_from_a_config_to_text(hybrid, tmp_path):
    """The written model, the loaded one and the one saved again are the same, and make text."""
    size = compressed_record(hybrid / "small")["size"]
    small = load(hybrid / "small")
    assert size["compressed"]["parameters"] == sum(x.numel() for x in small.parameters())
    assert size["compressed"]["parameters"] < size["dense"]["parameters"]
    assert size["compressed"]["flops_per_token"] < size["dense"]["flops_per_token"]
    found = logits(small, IDS)
    assert found.isfinite().all()
    assert small.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 10)
    small.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path), IDS), found, rtol=0, atol=0)
