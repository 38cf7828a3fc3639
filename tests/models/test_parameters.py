"""Parameters are those of the model that transformers loads, not all numbers that files hold."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import run, tiny_model
from transformers import AutoModelForCausalLM

import a3  # noqa: F401
from a3.artifacts.places import Place
from a3.artifacts.runs import Run
from a3.core.files import read_record
from a3.core.records import Record
from a3.models.arch import load_arch, sketch
from a3.models.load import count_parameters
from a3.models.sizes import projection_weights
from a3.stages.export.inspect import inspect

GPT2 = {"n_inner": 96}
TIED = {"tie_word_embeddings": True}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 96, "num_local_experts": 4}
MASK = torch.ones(1, 1, 512, 512).tril()


def masks(folder, tensors):
    """As the published GPT-2 has them, float32."""
    return {f"transformer.h.{i}.attn.bias": MASK.clone() for i in range(2)} | {
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)
    }


def bare_masks(folder, tensors):
    """The same, saved from the trunk alone: no names begin with its own."""
    found = tensors | masks(folder, tensors)
    tensors.clear()
    return {name.removeprefix("transformer."): value for name, value in found.items()}


def frequencies(folder, tensors):
    """As Llama's first checkpoints have them."""
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    return {name.format(i): torch.arange(8.0) for i in range(2)}


def fewer_layers(folder, tensors):
    """ShortGPT's layers are dropped in the config alone."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    return {}


def same_head(folder, tensors):
    return {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def other_head(folder, tensors):
    return {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}


def something_else(folder, tensors):
    """What no model has."""
    return {"value_head.weight": torch.ones(7, 64), "model.layers.0.extra": torch.ones(9)}


def nothing(folder, tensors):
    return {}


CASES = {
    "masks": ("gpt2", GPT2, masks),
    "bare masks": ("gpt2", GPT2, bare_masks),
    "tied masks": ("gpt2", GPT2 | TIED, masks),
    "frequencies": ("llama", {}, frequencies),
    "fewer layers": ("llama", {}, fewer_layers),
    "same head": ("llama", TIED, same_head),
    "other head": ("llama", TIED, other_head),
    "something else": ("llama", {}, something_else),
    "experts": ("mixtral", MOE, nothing),
}


def made(folder, case, shards=1):
    """A dense folder of a case, in so many files."""
    family, config, added = CASES[case]
    tiny_model(folder, family, **config)
    tensors = load_file(folder / "model.safetensors")
    extra = added(folder, tensors)
    tensors |= extra
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    names = ["model.safetensors"] if shards == 1 else names
    where = {key: names[i % shards] for i, key in enumerate(sorted(tensors))}
    for name in names:
        of = {key: tensors[key] for key in where if where[key] == name}
        save_file(of, folder / name, {"format": "pt"})
    if shards > 1:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return extra


def loaded(folder):
    """Parameters of the model that transformers makes of a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_sizes_are_those_of_the_models(tmp_path, case, shards):
    """In arch.json, approx.json, the card and `a3 inspect`; and nothing else is copied."""
    dense, small = tmp_path / "dense", tmp_path / "small"
    extra = made(tmp_path / "source", case, shards)
    run("model", tmp_path / "source", "-o", dense)
    mlp = "dense" if case == "experts" else "svd"
    modes = ["--qk", "dense", "--ov", "identity", "--mlp", mlp, "--ratio", "0.25"]
    run("approx", dense, "--rxx", tmp_path, *modes, "-o", small)
    right = {"dense": loaded(dense), "compressed": loaded(small)}
    record = read_record(small / "approx.json")
    assert {kind: size["parameters"] for kind, size in record["size"].items()} == right
    assert load_arch(dense).size["parameters"] == load_arch(tmp_path / "source").size["parameters"]
    assert f"| {right['dense']:,} | {right['compressed']:,} |" in (small / "README.md").read_text()
    for folder, kind in ((dense, "dense"), (small, "compressed")):
        assert f"parameters      {right[kind]:,}" in inspect(folder)
        assert count_parameters(folder) == right[kind]
    kept = {name for path in small.glob("*.safetensors") for name in load_file(path)}
    if case != "other head":
        # What config.json alone tells, for `a3 plan`.
        assert sketch(tmp_path / "source").size["parameters"] == right["dense"]
    heads = {"lm_head.weight"}
    if case != "bare masks":
        assert kept & extra.keys() <= heads
    assert not [name for name in kept if "mask" in name or name.endswith(("attn.bias", "extra"))]


@pytest.mark.parametrize("case", ["fewer layers", "same head", "frequencies", "masks"])
def test_bits_of_quantised_models_are_of_the_weights_that_there_are(tmp_path, case):
    """W4A16 with rank 2 has 4 and some bits a weight, A and B count, and the tables agree."""
    source, small, low = (tmp_path / name for name in ("source", "small", "low"))
    made(source, case)
    run("model", source, "-o", tmp_path / "dense")
    (tmp_path / "text.txt").write_text("A river moves towards an ocean or a lake. " * 60)
    kinds = ("attention_input", "o_proj_input", "mlp_input", "down_input", "down_diagonal")
    collecting = ["--text", tmp_path / "text.txt", "--tokens", "256", "--block-length", "64"]
    for of, rxx in ((tmp_path / "dense", "rxx"), (small, "rxx-small")):
        if of == small:
            modes = ["--qk", "dense", "--ov", "dense", "--mlp", "rxx", "--ratio", "0.25"]
            run("approx", tmp_path / "dense", "--rxx", tmp_path / "rxx", *modes, "-o", small)
        outputs = [tmp_path / rxx / f"{kind}.safetensors" for kind in kinds]
        run("collect", of, *collecting, "-o", *outputs)
        recipe = ["--recipe", "w4a16-int4", "--method", "qera", "--rank", "2"]
        shutil.rmtree(low, ignore_errors=True)
        run("quantise", of, "--rxx", tmp_path / rxx, *recipe, "-o", low)
        record = read_record(low / "approx.json")
        size = record["size"]["compressed"]
        assert size["parameters"] == loaded(low) == count_parameters(low)
        repair = sum(
            value.numel()
            for name, value in load_file(low / "model.safetensors").items()
            if name.endswith((".A", ".B"))
        )
        assert size["parameters"] - count_parameters(of) == repair > 0
        bits, weights = (
            sum(said[key] for said in record["matrices"].values()) for key in ("bits", "weights")
        )
        # Counted by the dense weights; of the compressed model a quarter of the MLP is gone.
        matrices = record["base"]["layers"] * (
            12288 if "llama" in record["base"]["family"] else 16384
        )
        mlp = projection_weights(record["base"]) - matrices
        missing = 0 if of == tmp_path / "dense" else mlp // 4
        assert weights == matrices + mlp - missing
        if not missing:
            assert size["bits_per_weight"] == bits / weights
        assert 3 < size["bits_per_weight"] < 8
    dense = Run(Place("m"), Record.read(tmp_path / "dense/arch.json"), {}, {})
    small_run = Run(
        Place("m", "c", "dense", "dense", "rxx", "0.25"), Record.read(small / "approx.json"), {}, {}
    )
    assert dense.bits_per_weight(dense) == 32
    assert 20 < small_run.bits_per_weight(dense) < 32


def test_biases_that_a_mode_adds_and_factors_count(tmp_path):
    tiny_model(tmp_path / "dense", "llama")
    (tmp_path / "text.txt").write_text("A river moves towards an ocean or a lake. " * 60)
    outputs = [tmp_path / f"{kind}.safetensors" for kind in ("down_diagonal", "down_mean")]
    collecting = ["--text", tmp_path / "text.txt", "--tokens", "256", "--block-length", "64"]
    run("collect", tmp_path / "dense", *collecting, "-o", *outputs)
    for mode, parameters in (("flap", 2 * (3 * 64 * 72 + 64)), ("svd", 2 * 3 * 29 * (64 + 96))):
        out, modes = tmp_path / mode, ["--qk", "dense", "--ov", "dense", "--mlp", mode]
        run("approx", tmp_path / "dense", "--rxx", tmp_path, *modes, "--ratio", "0.25", "-o", out)
        size = read_record(out / "approx.json")["size"]
        assert size["compressed"]["parameters"] == loaded(out)
        rest = size["dense"]["parameters"] - 2 * 3 * 64 * 96
        assert size["compressed"]["parameters"] == rest + parameters
