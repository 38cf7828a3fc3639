"""Compressed folders in vLLM by a3's plugin, without an export: tiny models and SmolLM2.

They are as a3-plus makes them: ranks by layer, QK and OV of other sizes, RoPE pairs by group.
"""

import json

import numpy as np
import pytest
from asking import answers_of
from smollm2 import continued, logits_of, perplexity, row, scored
from tiny import small_model, tiny_llama

SCORED, PROMPT, NEW = 512, 48, 40
TOKENS = list(range(5, 65))
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
# Heads of 40, so that layers differ in the head size that vLLM takes, 64 and 32.
MODELS = {
    "llama": ("llama", {"rope_parameters": ROPE, "tie_word_embeddings": True}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "ministral": ("ministral", WINDOW),
}
REFUSED = {
    "factored": (("--mlp", "svd"), "some of its matrices are factored"),
    "biased": (("--mlp", "flap"), "its down projections have a bias"),
}
HEAD = {"head_dim": 40}
# Dense models; vLLM has no kernel for such heads on CPUs.
HEADS = {48: True, 40: False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of each tiny model."""
    place = tmp_path_factory.mktemp("vllm")
    plus = ("--preset", "a3-plus")
    found = {
        name: small_model(place / name, family, HEAD | config, plus)
        for name, (family, config) in MODELS.items()
    }
    for name, (modes, _) in REFUSED.items():
        found[f"refused {name}"] = small_model(place / f"refused-{name}", "llama", HEAD, modes)
    for size in HEADS:
        found[size] = tiny_llama(place / str(size), head_dim=size)
    return found


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory):
    """What vLLM says of each tiny model: logits or an error."""
    names = list(folders)
    asked = {"tokens": TOKENS, "prompt": 8, "greedy": 4, "more": [str(folders[n]) for n in names]}
    found = answers_of("vllm", folders[48], asked, tmp_path_factory.mktemp("answers"))
    return {
        name: found.get(f"logits_{number}", str(found.get(f"error_{number}")))
        for number, name in enumerate(names)
    }


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_have_the_logits_of_transformers(folders, answers, name):
    a3 = json.loads((folders[name] / "config.json").read_text())["a3"]
    sizes = {max(ranks) > 32 for ranks in zip(a3["qk_ranks"], a3["ov_ranks"], strict=True)}
    assert len(sizes) == 2
    assert not a3["same_pairs"]
    worst = np.abs(answers[name] - logits_of(folders[name], TOKENS)).max()
    print(f"{name}: largest difference {worst:.2g}")
    assert worst < 2e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_plugin_lacks_is_refused_with_the_reason(folders, answers, name):
    assert REFUSED[name][1] in answers[f"refused {name}"]
    assert str(folders[f"refused {name}"]) in answers[f"refused {name}"]


@pytest.mark.parametrize("size", HEADS)
def test_heads_of_ordinary_models(folders, answers, size):
    if HEADS[size]:
        assert np.abs(answers[size] - logits_of(folders[size], TOKENS)).max() < 2e-5
    else:
        assert f"Unsupported CPU attention configuration: head_dim={size}" in answers[size]


def test_smollm2_is_served_as_a3_plus_makes_it(preset, tmp_path, record_property):
    small, block = preset("a3-plus"), scored(SCORED)
    asked = {"tokens": block[0].tolist(), "prompt": PROMPT, "greedy": NEW}
    found = answers_of("vllm", small, asked, tmp_path)
    logits, greedy = logits_of(small, asked["tokens"]), continued(small, block, PROMPT, NEW)
    name = "SmolLM2-135M, a3-plus at 0.2, its own folder"
    record_property("measured", row(name, found, logits, block, greedy))
    assert np.abs(found["logits"] - logits).max() < 2e-3
    assert perplexity(found["logits"], block) == pytest.approx(perplexity(logits, block), rel=1e-4)
    assert found["in_two"] < 2e-3
    assert found["greedy"].tolist() == greedy
