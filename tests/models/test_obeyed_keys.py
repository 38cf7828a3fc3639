"""Keys of a config that a family's own code ignores, or obeys, and what a3 takes a model to be."""

import json
import re

import pytest
import torch
from test_compressed import MODELS, compress, emulate, load, logits, needs, prepare, redraw, tokens
from tiny import tiny_model

from a3.core.errors import A3Error
from a3.models.arch import load_arch
from a3.models.families import FAMILIES
from a3.models.load import load_config
from a3.models.stock import stock
from a3.stages.approx.approximate import repack

ROPE = [case for case, (family, _) in MODELS.items() if FAMILIES[family].rope_layout]
# Of some families only one model: others differ in what has nothing to do with RoPE.
ROPE = [case for case in ROPE if "-" not in case or case in ("llama-wide-heads", "falcon-gqa")]
# Families whose code turns no more of a head than the key says.
PARTIAL = ("glm", "glm4", "gpt_neox", "phi", "phi3", "stablelm")
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


def same_as_dense(folder, atol=2e-5):
    """Compare the logits of a dense model and of one of full ranks made of it."""
    repack(folder / "dense", folder / "small")
    ids = tokens(folder)
    expected = logits(load(folder / "dense"), ids)
    torch.testing.assert_close(logits(load(folder / "small"), ids), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("case", ROPE)
@pytest.mark.parametrize("place", ["root", "rope_parameters"])
def test_a_part_of_a_head_is_rotated_where_the_code_does_it(tmp_path, case, place):
    family, config = MODELS[case]
    needs(family)
    half = {"partial_rotary_factor": 0.5, "rotary_pct": 0.5}
    extra = half if place == "root" else {"rope_parameters": DEFAULT | half}
    if family == "gptj":
        extra |= {"rotary_dim": 8}
    tiny_model(tmp_path / "dense", family, **config | extra)
    redraw(tmp_path / "dense")
    arch = load_arch(tmp_path / "dense")
    partial = family in (*PARTIAL, "gptj")
    assert arch.rope_dims == (8 if partial else arch.head_dim)
    same_as_dense(tmp_path)


@pytest.mark.parametrize("family", ["llama", "cohere", "phi"])
def test_cut_models_with_the_key_equal_their_emulation(tmp_path, family):
    prepare(tmp_path, family, {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}})
    small = compress(tmp_path, tmp_path / "small", "0.5", ov="dense", mlp="dense")
    emulated, ids = load(tmp_path / "dense"), tokens(tmp_path)
    emulate(emulated, tmp_path, "0.5", ("qk",))
    torch.testing.assert_close(logits(small, ids), logits(emulated, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", {"rope_type": "proportional", "partial_rotary_factor": 0.5}),
        ("gemma3_text", {"rope_type": "proportional", "partial_rotary_factor": 0.5}),
        ("gpt_neox", {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.25}),
    ],
)
def test_scaled_rope_with_the_key(tmp_path, family, rope):
    rope = DEFAULT | rope
    config = {}
    if family == "gemma3_text":
        config = MODELS["gemma3"][1]
        rope = {kind: rope for kind in config["layer_types"]}
    tiny_model(tmp_path / "dense", family, **config | {"rope_parameters": rope})
    redraw(tmp_path / "dense")
    same_as_dense(tmp_path)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        # The tables are made for half a head, and the code turns a whole one.
        ("llama", {"rope_parameters": DEFAULT | {"rope_type": "linear", "factor": 4.0}}),
        # Tables for a whole one, and the code turns half a head.
        ("phi", {"rope_parameters": DEFAULT | {"rope_type": "proportional"}}),
        # As wide as all heads together.
        ("gptj", {"rotary_dim": 0}),
        # Tables of the head size that the key says, heads of that which the hidden size says.
        ("stablelm", {"head_dim": 24}),
    ],
)
def test_what_transformers_itself_cannot_run_is_refused(tmp_path, family, config):
    if "rope_parameters" in config:
        config["rope_parameters"]["partial_rotary_factor"] = 0.5
    tiny_model(tmp_path, family, **config)
    with pytest.raises(
        A3Error, match=r"config\.json: transformers' own code cannot run this model"
    ):
        load_arch(tmp_path)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        # Heads are as wide as the hidden size says, whatever the key.
        ("gpt_neox", {"head_dim": 24}),
        ("opt", MODELS["opt"][1] | {"head_dim": 24}),
        ("bloom", {"num_key_value_heads": 1, "attention_bias": False}),
        ("mistral", {"attention_bias": True, "mlp_bias": True, "query_pre_attn_scalar": 7}),
        ("qwen2", {"attention_bias": False, "qk_norm": True}),
        ("gptj", {"rotary_dim": 8, "rope_theta": 100.0}),
        # Gemma 2 caps scores by it, Gemma 3 does not.
        ("gemma3_text", MODELS["gemma3"][1] | {"attn_logit_softcapping": 0.5}),
        ("gemma2", MODELS["gemma2"][1] | {"attn_logit_softcapping": 0.5}),
    ],
)
def test_other_keys_count_as_in_the_familys_code(tmp_path, family, config):
    tiny_model(tmp_path / "dense", family, **config)
    redraw(tmp_path / "dense")
    # What `tiny_model` writes may have left the key out.
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    same_as_dense(tmp_path)


@pytest.mark.parametrize(
    ("method", "value", "said"),
    [
        ("scaling", 0.5, "self_attn.scaling to be 0.5, and transformers' own code makes it 0.25"),
        ("kv_heads", 4, r"k_proj.weight to be (64, 64), and .* makes it (32, 64)"),
        ("intermediate_size", 80, r"gate_proj.weight to be (80, 64)"),
        ("biases", dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True), "q_proj.bias"),
    ],
)
def test_an_adapter_that_is_wrong_about_a_model_is_seen(tmp_path, monkeypatch, method, value, said):
    tiny_model(tmp_path, "llama")
    monkeypatch.setattr(type(FAMILIES["llama"]), method, lambda *_: value)
    with pytest.raises(A3Error, match=re.sub(r"[()]", r"\\\g<0>", said)):
        load_arch(tmp_path)


def test_an_export_has_no_key_that_other_kinds_of_rope_obey(tmp_path):
    tiny_model(tmp_path / "dense", "llama", partial_rotary_factor=0.5)
    content = json.loads((tmp_path / "dense" / "config.json").read_text())
    content["partial_rotary_factor"] = 0.5
    (tmp_path / "dense" / "config.json").write_text(json.dumps(content))
    assert load_config(tmp_path / "dense").rope_parameters["partial_rotary_factor"] == 0.5
    made = stock(tmp_path / "dense")
    assert "partial_rotary_factor" not in json.dumps(made.content)
    assert made.head_dim == 16
