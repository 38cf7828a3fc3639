"""The probe: model types without an adapter, from a config to text; and what it has to refuse."""

import json
import warnings

import pytest
import torch
import transformers
from test_compressed import SETTINGS, TEXT
from tiny import run, tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from a3.cli.main import main
from a3.core.errors import A3Error
from a3.models.arch import load_arch, sketch
from a3.models.compressed import compressed_record
from a3.models.families import FAMILIES
from a3.models.probe.probe import Probe, build, probe
from a3.models.probe.table import read_table, row_of
from a3.models.probe.tiny import tiny_config, tiny_content, tiny_model
from a3.models.probe.trial import Trial, gap, logits
from a3.solutions.modes import choose
from a3.solutions.plan import Plan
from a3.stages.approx.approximate import approximate
from a3.stages.approx.spectra import spectra
from a3.stages.collect.collect import collect

TYPES = read_table()["types"]
PROBED = sorted(name for name, row in TYPES.items() if row["by"] not in ("", "adapter"))
# One in so many of the probed types in `make test`; all of them in `make test-families`.
EVERY = 12
# A Llama with other multipliers, temperature by position, sinks, a norm after RoPE, experts and a
# dense first layer, experts with biases, convolutions beside attention, latent attention.
WHOLE = (
    "granite",
    "ministral3",
    "granite_swa",
    "nanochat",
    "dots1",
    "gpt_oss",
    "lfm2",
    "deepseek_v2",
)


def test_the_table_has_every_causal_type_of_transformers():
    """A type that is missing here is new: python docs/probe.py NAME, then docs/generate.py."""
    if transformers.__version__ == read_table()["transformers"]:
        assert set(TYPES) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    new = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(TYPES))
    if new:
        warnings.warn(f"not in the table: {', '.join(new)}", stacklevel=1)


def test_every_row_says_what_is_compressed_or_why_not():
    for name, row in TYPES.items():
        for component, part in row["parts"].items():
            assert part or row["why"].get(component) or row["why"].get("all"), name
    assert {name for name, row in TYPES.items() if row["by"] == "adapter"} == set(FAMILIES)
    assert sum(any(row["parts"].values()) for row in TYPES.values()) >= 100


@pytest.mark.parametrize(
    "model_type",
    [
        name if number % EVERY == 0 else pytest.param(name, marks=pytest.mark.families)
        for number, name in enumerate(sorted(TYPES))
        if name in PROBED or number % EVERY
    ],
)
def test_rows_are_what_a_probe_finds(model_type):
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    found = row_of(model_type)
    assert (found["by"], found["parts"]) == (TYPES[model_type]["by"], TYPES[model_type]["parts"])


def tiny(folder, model_type):
    """A tiny dense model of a type in `folder`, with a tokenizer."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config = tiny_config(model_type, tiny_content(model_type) | {"vocab_size": 300})
    model = tiny_model(config)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return model


def load(folder):
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def solve(folder, out, ratio, modes):
    plan = Plan(choose(modes | {"ratio": ratio}))
    kinds = {kind: folder / "rxx" / f"{kind}.safetensors" for kind in plan.kinds()}
    if not (folder / "rxx").exists():
        (folder / "text.txt").write_text(TEXT)
        collect(folder / "dense", folder / "text.txt", kinds, **SETTINGS)
    approximate(folder / "dense", folder / "rxx", plan, out)
    return load(out)


def cached(model, ids):
    """Numbers in the cache per token, of layers that cache keys."""
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
    kept = [getattr(one, name, None) for one in cache.layers for name in ("keys", "values")]
    return sum(x.numel() for x in kept if isinstance(x, torch.Tensor)) // ids.numel()


@pytest.mark.parametrize("model_type", WHOLE)
def test_types_without_an_adapter_from_config_to_text(tmp_path, model_type):
    dense = tiny(tmp_path / "dense", model_type)
    arch = load_arch(tmp_path / "dense")
    modes = {"qk": "rxx-w-rxx" if arch.rope_layout else "qk", "ov": "xkv", "mlp": "rxx-w"}
    modes |= {c: "dense" for c, fixed in arch.fixed.items() if len(fixed) == arch.layers}
    torch.manual_seed(5)
    # Shorter than the windows, so that all tokens are in the cache.
    ids = torch.randint(2, 300, (2, 7))
    whole = solve(tmp_path, tmp_path / "whole", "0", modes)
    assert gap(logits(whole, ids), logits(dense, ids)) < 1e-3
    small = solve(tmp_path, tmp_path / "small", "0.5", modes)
    assert gap(logits(small, ids), logits(dense, ids)) > 1e-2
    assert small.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 10)
    parameters = [sum(x.numel() for x in model.parameters()) for model in (dense, small)]
    assert sketch(tmp_path / "dense").size == arch.size
    assert arch.size["parameters"] == parameters[0]
    assert arch.size["kv_bytes_per_token"] == 4 * cached(dense, ids)
    size = compressed_record(tmp_path / "small")["size"]["compressed"]
    assert size["parameters"] == parameters[1] < parameters[0]
    assert size["kv_bytes_per_token"] == 4 * cached(small, ids)
    assert size["flops_per_token"] < arch.size["flops_per_token"]


def test_the_better_preset_and_eval_of_a_probed_type(tmp_path):
    """Gradients, elimination, allocation and scores, of a model whose attention is its own."""
    tiny(tmp_path / "dense", "ministral3")
    (tmp_path / "text.txt").write_text(TEXT)
    text = ["--text", tmp_path / "text.txt", "--tokens", "1024", "--block-length", "64"]
    run("compress", tmp_path / "dense", *text, "--preset", "a3-plus", "--ratio", "0.25", "-o",
        tmp_path / "small")  # fmt: skip
    config = json.loads((tmp_path / "small/config.json").read_text())["a3"]
    assert config["own"]["rope_layout"] == "halves"
    assert sum(config["qk_ranks"]) < 64


# What a mistake in a structure would be, by the type whose tiny model shows it.
MISTAKES = {
    "another layout": ("llama", {"rope_layout": "neighbours"}),
    "RoPE of half a head": ("granite", {"rope_share": 0.5}),
    "no gains of 1 + w": ("gemma3_text", {"gain_offset": 0.0}),
    "norms left out": ("qwen3", {"qk_norm": None, "norms": {}}),
    "a norm of all heads": ("olmo2", {"qk_norm": "head"}),
    "sinks left out": ("granite_swa", {"own": False}),
    "temperature left out": ("ministral3", {"own": False}),
    "caps of scores left out": ("vaultgemma", {"own": False}),
    "a layer without RoPE": ("smollm3", {"nope_layers": []}),
    "values and keys exchanged": ("llama", {"projections": "exchanged"}),
    "fused in another order": ("phi3", {"interleave": True}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_structure_is_refuted(tmp_path, mistake):
    model_type, change = MISTAKES[mistake]
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    content = tiny_content(model_type)
    if model_type == "smollm3":
        content |= {"no_rope_layers": [1, 0, 1, 1]}
    config, model = build(model_type, content)
    trial = Trial(model, config, tmp_path, positions=False)
    right = Probe(model, config, trial, None).run().structure
    assert trial.refutes(right) is None
    if change == {"projections": "exchanged"}:
        said = right["projections"]
        change = {"projections": said | {"k": said["v"], "v": said["k"]}}
    assert trial.refutes(right | change) is not None


@pytest.mark.parametrize(
    ("model_type", "component", "said"),
    [
        # The norm of the inner vector sees which channels are there.
        ("bitnet", "mlp", "differ"),
        # A sigmoid gates each dimension of the outputs.
        ("afmoe", "ov", "differ"),
        # LayerNorm of queries and keys.
        ("persimmon", "qk", "normed otherwise"),
        ("deepseek_v2", "qk", "keys and values are made from a latent"),
    ],
)
def test_what_does_not_fit_is_left_with_the_reason(model_type, component, said):
    outcome = probe(model_type)
    assert outcome.structure is not None
    assert not outcome.parts[component]
    assert said in outcome.why[component]


def test_a_type_of_which_nothing_is_confirmed_is_refused(tmp_path):
    config = tiny_config("falcon_mamba", tiny_content("falcon_mamba"))
    tiny_model(config).save_pretrained(tmp_path)
    with pytest.raises(A3Error, match="a probe confirmed none of its parts"):
        load_arch(tmp_path)


def test_attention_that_is_the_familys_own_cannot_be_factored(tmp_path):
    tiny(tmp_path / "dense", "ministral3")
    modes = {"qk": "svd", "ov": "dense", "mlp": "dense"}
    with pytest.raises(A3Error, match="cannot be factored in ministral3"):
        solve(tmp_path, tmp_path / "small", "0.25", modes)


def test_plans_refuse_what_approx_would(tmp_path):
    """Before anything is collected."""
    tiny(tmp_path / "own", "ministral3")
    tiny(tmp_path / "mixture", "dots1")
    row = {"qk": "dense", "ov": "dense", "mlp": "dense", "ratio": "0.25"}
    with pytest.raises(A3Error, match="cannot be factored in ministral3"):
        Plan(choose(row | {"ov": "svd"})).check(tmp_path / "own")
    with pytest.raises(A3Error, match="which tensor routes tokens in dots1"):
        Plan(choose(row | {"mlp": "reap"})).check(tmp_path / "mixture")
    with pytest.raises(A3Error, match=r"compared with others by its logits\. Take hc-smoe"):
        Plan(choose(row | {"mlp": "m-smoe"})).check(tmp_path / "mixture")
    Plan(choose(row | {"mlp": "hc-smoe"})).check(tmp_path / "mixture")
    outputs = {"router_logits": tmp_path / "none.safetensors"}
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(A3Error, match="does not know which tensor routes tokens in dots1"):
        collect(tmp_path / "mixture", tmp_path / "text.txt", outputs, **SETTINGS)


def test_pairs_of_layers_that_stay_do_not_count(tmp_path):
    """Their statistics are zeros, which would make pairs dear that cost nothing."""
    tiny(tmp_path / "dense", "lfm2")
    arch = load_arch(tmp_path / "dense")
    assert 0 < len(arch.fixed["qk"]) < arch.layers
    dropped = [layer for layer in range(arch.layers) if arch.drops_pairs(layer)]
    assert dropped == [layer for layer in range(arch.layers) if layer not in arch.fixed["qk"]]


def test_stages_that_need_more_say_so(tmp_path, capsys):
    tiny(tmp_path / "own", "ministral3")
    tiny(tmp_path / "some", "lfm2")
    low = ["--rxx", tmp_path, "--recipe", "w4a16-int4", "--method", "qera", "--rank", "2"]
    assert main(["quantise", *map(str, [tmp_path / "own", *low, "-o", tmp_path / "low"])]) == 1
    assert "compressed models of ministral3 run its own" in capsys.readouterr().err
    with pytest.raises(A3Error, match=r"spectra: a3 leaves .* of some layers of lfm2"):
        spectra(tmp_path / "some", tmp_path, tmp_path / "spectra.json")


def test_what_stays_in_every_layer_has_no_mode(tmp_path):
    tiny(tmp_path / "dense", "deepseek_v2")
    modes = {"qk": "qk", "ov": "dense", "mlp": "rxx-w"}
    with pytest.raises(A3Error, match=r"a3 leaves qk of deepseek_v2 as it is.*--qk dense"):
        solve(tmp_path, tmp_path / "small", "0.25", modes)


def test_sizes_are_those_of_the_model_and_not_of_the_tiny_one(tmp_path):
    """A model that is larger than the one that was probed, with another ratio of heads."""
    config = tiny_config("granite", tiny_content("granite") | {
        "vocab_size": 300, "hidden_size": 96, "intermediate_size": 112, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 3,
    })  # fmt: skip
    dense = tiny_model(config)
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer(tmp_path / "dense")
    arch = load_arch(tmp_path / "dense")
    assert (arch.heads, arch.kv_heads, arch.layers) == (6, 2, 3)
    assert (arch.head_dim, arch.rope_dims, arch.intermediate_size) == (32, 32, 112)
    whole = solve(tmp_path, tmp_path / "whole", "0", {"qk": "rxx-w-rxx", "ov": "xkv", "mlp": "ls"})
    ids = torch.randint(2, 300, (2, 7))
    assert gap(logits(whole, ids), logits(dense, ids)) < 1e-3


def test_a_probe_shows_no_bars_of_tiny_models(capfd):
    enable_progress_bar()  # which is off in all tests
    try:
        probe("exaone4")
        assert capfd.readouterr().err == ""
        assert is_progress_bar_enabled()
    finally:
        disable_progress_bar()


def test_a_config_is_probed_by_the_command_line(tmp_path, capsys):
    config = tiny_config("exaone4", tiny_content("exaone4"))
    config.save_pretrained(tmp_path)
    run("families", "--probe", tmp_path / "config.json")
    assert "exaone4  qk (3 of 4 layers), ov, mlp" in capsys.readouterr().out
    run("families")
    assert "deepseek_v3" in capsys.readouterr().out
