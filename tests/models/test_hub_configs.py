"""Contents of config.json as model hubs have them, and those that a probe must refuse first."""

import io
import json
import time

import pytest
import torch
from transformers import PreTrainedConfig

from a3.core.errors import A3Error
from a3.models.arch import known_family, sketch
from a3.models.built import build
from a3.models.families.measure import experts_per_token
from a3.models.load import load_config
from a3.models.probe.probe import probe
from a3.models.probe.table import row_of_config
from a3.models.probe.tiny import tiny_content

# Of DeepSeek-V3: latent attention, from whose keys the class derives others (head_dim).
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 5,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip

# Of Phi-3.5-MoE: factors for each of the 64 pairs of RoPE.
PHI_MOE = {
    "architectures": ["PhiMoEForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM"},
    "bos_token_id": 1, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 4096,
    "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": True,
    "max_position_embeddings": 131072, "model_type": "phimoe", "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 3, "num_key_value_heads": 8,
    "num_local_experts": 16, "original_max_position_embeddings": 4096,
    "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0 + pair / 2 for pair in range(64)], "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0 + pair / 64 for pair in range(64)],
        "short_mscale": 1.243163121016122, "type": "longrope",
    },
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 32064,
}  # fmt: skip

# Of Hunyuan-A13B: lists with a number for each layer.
HUNYUAN = {
    "architectures": ["HunYuanMoEV1ForCausalLM"], "attention_bias": False,
    "attention_head_dim": 128, "bos_token_id": 1, "eos_token_id": 127960, "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 3072, "max_position_embeddings": 32768,
    "mlp_bias": False, "model_type": "hunyuan_v1_moe", "moe_drop_tokens": False,
    "moe_intermediate_size": [3072] * 3, "moe_layer_num_skipped": 0, "moe_topk": [8, 8, 8],
    "norm_type": "rms", "num_attention_heads": 32, "num_experts": 64, "num_hidden_layers": 3,
    "num_key_value_heads": 8, "num_shared_expert": [1] * 3, "pad_token_id": 127961,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "type": "dynamic",
    },
    "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "use_mixed_mlp_moe": True, "use_qk_norm": True, "vocab_size": 128167,
}  # fmt: skip

# Of Jamba: attention in one layer of a few, experts in every second.
JAMBA = {
    "architectures": ["JambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 1,
    "attn_layer_period": 2, "bos_token_id": 1, "eos_token_id": 2, "expert_layer_offset": 1,
    "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 16,
    "mamba_dt_rank": 256, "mamba_expand": 2, "mamba_proj_bias": False,
    "max_position_embeddings": 262144, "model_type": "jamba", "num_attention_heads": 32,
    "num_experts": 16, "num_experts_per_tok": 2, "num_hidden_layers": 4,
    "num_key_value_heads": 8, "output_router_logits": False, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_mamba_kernels": False, "vocab_size": 65536,
}  # fmt: skip


def written(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("content", "active", "whole"),
    [
        pytest.param(DEEPSEEK_V3, 8, "mlp", id="deepseek_v3"),
        pytest.param(PHI_MOE, 2, "qk ov mlp", id="phimoe"),
        pytest.param(HUNYUAN, 8, "qk ov mlp", id="hunyuan_v1_moe"),
        pytest.param(JAMBA, 2, "qk ov mlp", id="jamba"),
    ],
)
def test_configs_of_hubs_are_probed_and_described(tmp_path, content, active, whole):
    arch = sketch(written(tmp_path, content))
    assert arch.layers == content["num_hidden_layers"]
    assert arch.experts_per_token == active
    assert arch.size["parameters"] > 1e9
    solved = {c for c, fixed in arch.fixed.items() if len(fixed) < arch.layers}
    assert solved == set(whole.split())


def with_code(folder):
    """A config of a type without a causal class, and code for one that leaves a marker."""
    content = {
        "model_type": "vit", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 80, "vocab_size": 128, "_name_or_path": str(folder),
        "auto_map": {"AutoModelForCausalLM": "theirs.Theirs"},
    }  # fmt: skip
    marker = folder / "marker"
    written(folder, content)
    (folder / "theirs.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n\n\nclass Theirs:\n    pass\n"
    )
    return marker


@pytest.mark.parametrize(
    "read",
    [
        known_family,
        sketch,
        lambda folder: row_of_config(folder / "config.json"),
        lambda folder: build(folder, load_config(folder)),
        lambda folder: probe("vit", load_config(folder).to_dict()),
    ],
    ids=["known_family", "sketch", "a3 families --probe", "build", "probe"],
)
def test_code_that_comes_with_a_model_never_runs(tmp_path, monkeypatch, read):
    """Whoever answers "y" to transformers' question would run it."""
    marker = with_code(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    with pytest.raises(A3Error):
        read(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        DEEPSEEK_V3 | {"num_hidden_layers": 10**7},
        {"model_type": "llama", "num_hidden_layers": 10**12},
        {"model_type": "gpt_neo", "num_layers": 10**12},
        {"model_type": "gemma3", "text_config": {"num_hidden_layers": 1e12}},
    ],
    ids=["probed", "with an adapter", "by another key", "in another"],
)
def test_more_layers_than_any_model_has_are_refused_at_once(tmp_path, content):
    start = time.process_time()
    with pytest.raises(A3Error, match=r"layers is 1.*at most 1000"):
        sketch(written(tmp_path, content))
    with pytest.raises(A3Error, match=r"layers is 1.*at most 1000"):
        row_of_config(tmp_path / "config.json")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("said", [[], "two", ["two"], None])
def test_experts_per_token_that_are_no_number_are_refused(said):
    with pytest.raises(A3Error, match="the number of experts per token"):
        experts_per_token(PreTrainedConfig(moe_topk=said))


def test_a_probe_leaves_the_random_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    probe("llama")
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_with_an_indexer_stays_its_own():
    """In large blocks numbers would not show that the indexer is missing, but its tensors do."""
    content = tiny_content("minimax_m3_vl_text")
    for blocks in (2, 64):
        outcome = probe("minimax_m3_vl_text", content | {"index_topk_blocks": blocks})
        assert outcome.structure is not None
        assert outcome.structure["own"]
