"""What a model's folder says of how it is run changes no figure: not decoding, not tokenising."""

import json

import pytest
from safetensors.torch import load_file
from test_harness import metrics, write_task
from tiny import BLOCK, document, run, tiny_llama
from transformers import GenerationConfig

from a3.cli.main import main
from a3.core.files import read_json, read_record
from a3.stages.evaluate.generation import generation

PROMPT = "A river is a"
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8},
    "metric_list": metrics("chrf"),
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    # Of log-likelihoods, so that any change shows.
    "metric_list": metrics("brier_score"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("options")
    tiny_llama(found / "dense")
    (found / "text.jsonl").write_text("".join(map(document, range(30))))
    (found / "written").mkdir()
    (found / "choice").mkdir()
    write_task(found / "written/task.yaml", **WRITTEN)
    write_task(found / "choice/task.yaml", **CHOICE)
    calibration = ["--text", found / "text.jsonl", "--tokens", "512", *BLOCK]
    run("compress", found / "dense", "--ratio", "0.25", *calibration, "-o", found / "small")
    # It holds the folder's files to their hashes; what is changed here is meant.
    (found / "small/approx.json").unlink()
    return found


# --- decoding -------------------------------------------------------------------------------------


def said(model, out):
    generation(model, out, prompt=PROMPT, new_tokens=20, dtype="float32", device="cpu")
    return read_json(out)["token_ids"]


def unusual(plain):
    """A value of each of generation_config.json's options that is not the default one."""
    first = [[token] for token in plain[:3]]
    return {
        "early_stopping": True,
        "max_time": 1e-9,
        "stop_strings": ["a", " "],
        "do_sample": True,
        "use_mtp": True,
        "use_cache": False,
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto"},
        "bad_words_ids": first,
        "sequence_bias": [[[5], 9.0]],
        "exponential_decay_length_penalty": [1, 5.0],
        "suppress_tokens": plain[:3],
        "begin_suppress_tokens": plain[:1],
        "forced_bos_token_id": 7,
        "forced_eos_token_id": 7,
        "watermarking_config": {"greenlist_ratio": 0.1, "bias": 9.0},
        "num_assistant_tokens_schedule": "heuristic",
        "assistant_ensemble_weight": 0.5,
        "speculation_type": "dflash",
        "compile_config": {"mode": "default"},
        "continuous_batching_config": {},
        "dola_layers": "high",
        "constraints": [1],
        "force_words_ids": [[5]],
        "top_p": 0.3,
        "min_p": 0.3,
        "top_h": 0.3,
        "typical_p": 0.3,
        "temperature": 0.3,
        "penalty_alpha": 0.6,
        "transformers_version": "1.0",
        "renormalize_logits": True,
        "remove_invalid_values": True,
        "token_healing": True,
        "output_attentions": True,
        "output_hidden_states": True,
        "output_scores": True,
        "output_logits": True,
        "return_dict_in_generate": True,
        "is_assistant": True,
        "disable_compile": True,
        "low_memory": True,
        "_from_model_config": True,
    }


@pytest.mark.parametrize("name", ["dense", "small"])
def test_no_option_of_the_generation_config_counts(folder, tmp_path, name):
    """Each of transformers' own, set to something else: 3, where nothing better is known."""
    path = folder / name / "generation_config.json"
    before = path.read_text()
    try:
        plain = said(folder / name, tmp_path / "out.json")
        options = set(vars(GenerationConfig())) - {"eos_token_id"}
        changed = {}
        values = dict.fromkeys(options, 3) | unusual(plain) | {"custom_generate": "who/code"}
        # One by one of the dense model; together, all that can be, of the small one.
        for each in [{k: v} for k, v in values.items()] if name == "dense" else [values]:
            path.write_text(json.dumps(json.loads(before) | each))
            found = said(folder / name, tmp_path / "out.json")
            changed |= each if found != plain else {}
    finally:
        path.write_text(before)
    assert len(options) > 60
    assert len(plain) > 5
    assert changed == {}


def test_a_text_ends_with_any_of_the_end_tokens(folder, tmp_path, capsys):
    """A number, a list, none (config.json's), one that never comes; nothing else."""
    path = folder / "dense/generation_config.json"
    before = path.read_text()
    plain = said(folder / "dense", tmp_path / "out.json")
    fourth = plain.index(plain[4])
    try:
        for end, length in (
            (plain[4], fourth + 1),
            ([plain[4], 1], fourth + 1),
            (None, len(plain)),
        ):
            path.write_text(json.dumps(json.loads(before) | {"eos_token_id": end}))
            assert said(folder / "dense", tmp_path / "out.json") == plain[:length]
        path.write_text(json.dumps(json.loads(before) | {"eos_token_id": [299]}))
        assert len(said(folder / "dense", tmp_path / "out.json")) == 20
        path.unlink()
        assert said(folder / "dense", tmp_path / "out.json") == plain
        words = ["eval", "generation", folder / "dense", "--prompt", PROMPT, "-o", tmp_path / "x"]
        for content in ('{"eos_token_id": [[1]]}', '{"eos_token_id": "1"}', "[]"):
            path.write_text(content)
            assert main([str(word) for word in words]) == 1
            assert "generation_config.json: " in capsys.readouterr().err
    finally:
        path.write_text(before)


# --- configs and tokenizers -----------------------------------------------------------------------

CONFIG = [
    {"attn_implementation": "eager", "output_attentions": True},
    {"_attn_implementation": "flash_attention_2"},
    {"attn_implementation": "flash_attention_2", "torch_dtype": "float16", "dtype": "bfloat16"},
    {"return_dict": False, "use_cache": False, "output_hidden_states": True},
    {"pruned_heads": {"0": [1]}, "chunk_size_feed_forward": 3, "attention_dropout": 0.5},
    {"do_sample": True, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "max_length": 5},
    {"task_specific_params": {"text-generation": {"do_sample": True}}, "prefix": "Hello "},
    {"tie_word_embeddings": True, "is_decoder": True, "gradient_checkpointing": True},
    {"custom_generate": "x", "auto_map": {"AutoModelForCausalLM": "x.Y"}},
]
TOKENIZER = [
    {"padding_side": "right", "truncation_side": "left", "pad_to_multiple_of": 16},
    {"padding": "max_length", "truncation": True, "max_length": 8, "stride": 2},
    {"model_max_length": 8},
    {"clean_up_tokenization_spaces": True, "spaces_between_special_tokens": True},
    {"add_bos_token": False, "add_eos_token": True, "return_token_type_ids": True},
]
# Written into tokenizer.json by whoever trained it with them on.
CUT = {
    "truncation": {
        "direction": "Right",
        "max_length": 6,
        "strategy": "LongestFirst",
        "stride": 0,
    },
    "padding": {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "</s>",
    },
}


def figures(folder, model, out):
    """All that is measured of a model: bytes of statistics, losses, tokens, scores."""
    scoring = ["--text", folder / "text.jsonl", "--tokens", "256", *BLOCK]
    run("eval", "ppl", model, *scoring, "-o", out / "ppl.json")
    found = {"ppl": read_record(out / "ppl.json")["block_nll"]}
    found["generation"] = said(model, out / "said.json")
    for name in ("written", "choice"):
        task = ["--task", name, "--yaml", folder / name / "task.yaml"]
        run("eval", "harness", model, *task, "-o", out / f"{name}.json")
        record = read_record(out / f"{name}.json")
        found[name] = (record["value"], record["item_scores"])
    if model.name == "dense":
        run("collect", model, *scoring, "-o", out / "rxx/v_blocks.safetensors")
        tensors = load_file(out / "rxx/v_blocks.safetensors")
        found["rxx"] = {key: each.tolist() for key, each in tensors.items()}
    return found


def merged(options):
    return {key: value for each in options for key, value in each.items()}


@pytest.mark.parametrize("name", ["dense", "small"])
def test_how_a_folder_wants_to_be_run_changes_no_figure(folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr("a3.stages.evaluate.harness.BOOTSTRAPS", 0)
    model = folder / name
    expected = figures(folder, model, tmp_path)
    changes = {"config.json": CONFIG, "tokenizer_config.json": TOKENIZER, "tokenizer.json": [CUT]}
    if name == "small":
        changes = {file: [merged(options)] for file, options in changes.items()}
    for file, options in changes.items():
        path = model / file
        before = path.read_text()
        for each in options:
            path.write_text(json.dumps(json.loads(before) | each))
            try:
                found = figures(folder, model, tmp_path)
            finally:
                path.write_text(before)
            assert found == expected, (file, each)
