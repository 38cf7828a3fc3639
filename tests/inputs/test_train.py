"""Models that are made here: K/V heads repeated, and small ones trained on a text."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import LINES, VOCABULARY, tiny_llama, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from a3.cli.main import main
from a3.core.errors import A3Error
from a3.core.files import load_yaml, sha256
from a3.experiments.config import CATALOGUE, complete
from a3.experiments.rows import check_row
from a3.stages.inputs.model import resolve_model
from a3.stages.inputs.train import rate, read_recipe, train, unigram_loss
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

CONFIG = {
    "model_type": "gpt2",
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "attn_pdrop": 0.0,
}
RECIPE = {
    "config": CONFIG,
    "text": "lines",
    "vocab_size": VOCABULARY,
    "steps": 80,
    "batch_size": 4,
    "block_length": 16,
    "learning_rate": 3e-2,
    "seed": 0,
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES * 20))
    return path


def recipe(**changes):
    return {"source": {"train": RECIPE | changes}}


def run(spec, text, out):
    train(read_recipe(spec["source"]), text, out)
    return out


# --- repeat_kv ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.inference_mode()
def test_repeated_heads_give_the_same_logits(tmp_path, family):
    base = tiny_model(tmp_path / "base", family)
    resolve_model({"repeat_kv": "base"}, tmp_path / "mha", base=base)
    arch = json.loads((tmp_path / "mha" / "arch.json").read_text())
    assert (arch["attention"], arch["kv_heads"]) == ("mha-rope", 4)
    ids = torch.arange(24)[None] % VOCABULARY
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "mha")]
    dense, repeated = (model(ids).logits for model in models)
    assert dense.std() > 0.1
    assert torch.equal(dense, repeated)
    assert AutoTokenizer.from_pretrained(tmp_path / "mha")("river")["input_ids"]


@pytest.mark.parametrize(
    ("family", "config"), [("phi3", {}), ("gpt2", {}), ("llama", {"num_key_value_heads": 4})]
)
def test_only_separate_projections_of_fewer_heads_are_repeated(tmp_path, family, config):
    base = tiny_model(tmp_path / "base", family, **config)
    with pytest.raises(A3Error, match=rf"base: {family} with 4 query heads"):
        resolve_model({"repeat_kv": "base"}, tmp_path / "mha", base=base)
    assert not (tmp_path / "mha").exists()


def test_the_command_line_asks_for_the_base(tmp_path, capsys):
    source = json.dumps({"source": {"repeat_kv": "tiny"}})
    command = ["model", source, "-o", str(tmp_path / "mha")]
    assert main(command) == 1
    assert "the model 'tiny', found none. Give it with --base" in capsys.readouterr().err
    assert main([*command, "--base", str(tiny_llama(tmp_path / "tiny"))]) == 0
    assert main(["compress", source, "--ratio", "0.2", "-o", str(tmp_path / "small")]) == 1
    assert "Give it with --base" in capsys.readouterr().err


# --- train ----------------------------------------------------------------------------------------


def test_a_model_is_trained_and_compressed_like_any_other(tmp_path, text, capsys):
    spec, out, dense = json.dumps(recipe()), tmp_path / "trained", tmp_path / "dense"
    assert main(["train", spec, "--text", str(text), "-o", str(out)]) == 0
    assert "80 steps of 4 blocks of 16: 5120 tokens" in capsys.readouterr().out
    record = json.loads((out / "train.json").read_text())
    assert len(record["losses"]) == 80
    assert record["loss"] < record["unigram_loss"] < math.log(VOCABULARY)
    assert main(["model", spec, "--base", str(out), "-o", str(dense)]) == 0
    assert json.loads((dense / "arch.json").read_text())["attention"] == "mha"
    assert not (dense / "train.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(dense)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode(tokenizer("Ünknown river")["input_ids"]) == "Ünknown river"
    command = ["compress", str(dense), "--qk", "qk", "--ratio", "0.5", "-o", str(tmp_path / "s")]
    assert main([*command, "--text", str(text), "--tokens", "64", "--block-length", "16"]) == 0


def test_a_model_is_trained_on_the_tokens_that_its_folder_gives(tmp_path, text):
    """Qwen 2's class, which transformers takes whatever the folder names, has its own rules."""
    config = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config |= {"max_position_embeddings": 16}
    out = run(recipe(config=config, steps=2), text, tmp_path / "out")
    tokenizer, documents = AutoTokenizer.from_pretrained(out), load_documents(text)
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    blocks = token_blocks(documents, tokenizer, 16, 2 * 4 * 16, 0, bos=True)
    report = json.loads((out / "train.json").read_text())
    assert report["unigram_loss"] == pytest.approx(unigram_loss(blocks[:, 1:]))


def test_experts_are_balanced_in_training_only(tmp_path, text):
    """The loss of the router is added where the recipe asks for it, and nothing of it stays."""
    config = {"model_type": "mixtral", "hidden_size": 32, "intermediate_size": 16}
    config |= {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    balanced = {"output_router_logits": True, "router_aux_loss_coef": 10.0}
    first = []
    for more in ({}, balanced):
        spec = recipe(config=config | more, steps=2)
        out = run(spec, text, tmp_path / str(len(first)))
        assert not json.loads((out / "config.json").read_text())["output_router_logits"]
        first.append(json.loads((out / "train.json").read_text())["losses"][0])
    # Of two of four experts the router's loss is 2, or a little more.
    assert 19 < first[1] - first[0] < 40


def test_the_same_recipe_gives_the_same_bytes(tmp_path, text):
    """Also in another process, whose hashes have another seed; another seed of ours does not."""
    first = run(recipe(), text, tmp_path / "first")
    command = [sys.executable, "-m", "a3", "train", json.dumps(recipe()), "--text", str(text)]
    subprocess.run([*command, "--threads", "1", "-o", str(tmp_path / "again")], check=True)
    names = sorted(path.name for path in first.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "train.json"} <= set(names)
    for name in names:
        assert sha256(first / name) == sha256(tmp_path / "again" / name), name
    other = run(recipe(seed=1), text, tmp_path / "other")
    assert sha256(other / "model.safetensors") != sha256(first / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": CONFIG | {"n_layers": 2}}, r"gpt2 has no key 'n_layers'.*mean 'n_layer'"),
        ({"config": CONFIG | {"model_type": "gpt5000"}}, "gpt5000"),
        ({"config": CONFIG | {"n_head": 3}}, r"divisible"),
        ({"config": CONFIG | {"n_head": "two"}}, r"'n_head' expected int"),
        ({"block_length": 32}, "block_length is 32, and the config has 16 positions"),
        ({"vocab_size": 5000}, r"vocabulary of \d+, expected 5000"),
        ({"learning_rate": 1e30}, r"the loss of step \d+ is (nan|inf); .* Lower learning_rate"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path, text, changes, message):
    with pytest.raises(A3Error, match=message):
        run(recipe(**changes), text, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("source", [{"path": "x"}, {"train": {"steps": 2}}])
def test_only_a_whole_recipe_can_be_trained(source):
    with pytest.raises(A3Error, match="expected train with the keys batch_size, block_length"):
        read_recipe(source)


def test_the_rate_rises_and_falls():
    rates = [rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.01


# --- configuration --------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
SCHEMA = load_yaml(ROOT / "workflow" / "schemas" / "config.schema.yaml")


def configuration(**models):
    return {"experiments": "x.tsv", "models": {name: {"source": s} for name, s in models.items()}}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"repeat_kvs": "smollm2-135m"}, r"'repeat_kvs' at models\.new\.source.*mean 'repeat_kv'"),
        ({"train": RECIPE | {"step": 3}}, r"'step' at models\.new\.source\.train.*mean 'steps'"),
        ({"train": RECIPE | {"steps": 0}}, r"models\.new\.source\.train\.steps: 0 is less"),
        ({"train": RECIPE | {"config": {}}}, r"models\.new\.source\.train\.config: 'model_type'"),
        ({"train": RECIPE}, r"models\.new\.source\.train\.text names the text 'lines'"),
        ({"repeat_kv": "none"}, r"models\.new\.source\.repeat_kv names the model 'none'"),
        ({"repeat_kv": "smollm2-135m-mha"}, r"'smollm2-135m-mha', whose heads are repeated"),
    ],
)
def test_a_wrong_source_is_named(source, message):
    with pytest.raises(A3Error, match=message):
        complete(configuration(new=source), SCHEMA)


def test_the_catalogue_follows_the_schema():
    catalogue = load_yaml(CATALOGUE)
    complete({"experiments": "x.tsv"} | catalogue, SCHEMA)
    trained = [m["source"] for m in catalogue["models"].values() if "train" in m["source"]]
    assert len(trained) == 5
    assert all(read_recipe(source) for source in trained)


def test_the_pages_sources_follow_the_schema():
    block, *_ = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "docs/experiments.md").read_text(), re.DOTALL
    )
    models = complete({"experiments": "x.tsv"} | yaml.safe_load(block), SCHEMA)["models"]
    assert read_recipe(models["my-gpt2"]["source"]).config["model_type"] == "gpt2"


def test_text_of_training_is_not_scored_unnoticed():
    """Neither of a trained model nor of one that is made from it."""
    scored = {"text": "wikipedia-summaries", "tokens": 256}
    config = configuration(
        mqa={"train": RECIPE | {"text": "sotu"}}, mha={"repeat_kv": "mqa"}, hub={"path": "x"}
    ) | {
        "calibrations": {"c": {"text": "c4", "tokens": 256}},
        "perplexity": {"p": scored},
        "evaluate": {"perplexity": ["p"]},
    }
    whole = complete(config, SCHEMA)
    row = {"calibration": "c", "qk": "qk", "ov": "xkv", "mlp": "rxx", "ratio": "0.2"}
    for model in ("mqa", "mha"):
        with pytest.raises(A3Error, match=r"model 'mqa' uses the text 'sotu'.*Add 'sotu' to texts"):
            check_row({"model": model, **row}, whole, "row 1")
    check_row({"model": "hub", **row}, whole, "row 1")


def test_the_table_of_attention_types_can_be_built(tmp_path):
    """The four trained models and the repeated heads come from rules, each from its own text."""
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1"]
    command += ["--configfile", "config/config.yaml", "config/studies/attention/config.yaml"]
    command += ["--config", f"results={tmp_path}/results"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE))
    assert (jobs["train"], jobs["model"], jobs["collect_together"]) == ("4", "6", "6")
    assert re.search(r"rule train:\n +input: \S+/texts/wiki-articles/docs.jsonl\n", done.stdout)
    base = rf"{tmp_path}/results/models/smollm2-135m/arch.json"
    assert re.search(rf"rule model:\n +input: {base}", done.stdout)
