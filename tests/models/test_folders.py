"""Folders as users have them: adapters, quantised, half there, wrapped, trained and saved again."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_compressed import MODELS
from test_export import read_gguf
from tiny import document, run, tiny_llama, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from a3.cli.main import main
from a3.core.errors import A3Error
from a3.models import arch
from a3.models.arch import describe
from a3.models.checkpoint import Checkpoint
from a3.models.compressed import compressed_record
from a3.models.load import load_whole
from a3.models.readable import OBJECTS, require_readable
from a3.stages.approx.approximate import repack
from a3.stages.export.inspect import inspect

B = ["--tokens", "256", "--block-length", "64"]
INPUTS = ("attention_input", "o_proj_input", "mlp_input", "down_input")
PREFIX = "model.layers.0.self_attn.q_proj"
Q = f"{PREFIX}.weight"
LORA = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 4}
# Sizes alike in all layers, so that the family's own code can run it.
UNIFORM = ["--qk", "uniform-global@12", "--ov", "xkv@12", "--mlp", "rxx-w@0.25"]
INT4 = {"W": "int4/32", "A": "int8/32", "B": "int8/32"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """`dense`, a text, and `small`, compressed so that it can be exported."""
    work = tmp_path_factory.mktemp("folders")
    tiny_llama(work / "dense")
    (work / "text.jsonl").write_text("".join(map(document, range(60))))
    text = ["--text", work / "text.jsonl", *B]
    run("compress", work / "dense", *UNIFORM, *text, "-o", work / "small")
    return work


@pytest.fixture
def model(work, tmp_path):
    """A copy of the dense folder that may be spoilt."""
    return shutil.copytree(work / "dense", tmp_path / "model")


def commands(model, text, out):
    """Every command that takes a model's folder."""
    text = ["--text", text, *B]
    rxx = ["--rxx", out]
    low = ["--recipe", "w4a8", "--method", "none"]
    yield from (
        ["model", model, "-o", out / "model"],
        ["model", '{"source": {"repeat_kv": "m"}}', "--base", model, "-o", out / "repeated"],
        ["compress", model, "--ratio", "0.2", *text, "-o", out / "compressed"],
        ["collect", model, *text, "-o", out / "attention_input.safetensors"],
        ["approx", model, *rxx, "--ratio", "0.2", "-o", out / "approx"],
        ["losses", model, *rxx, "--preset", "a3-plus", "-o", out / "l.safetensors"],
        ["allocate", model, *rxx, "--preset", "a3-plus", "--ratio", "0.2", "-o", out / "r.json"],
        ["spectra", model, *rxx, "-o", out / "spectra.json"],
        ["surgery", model, "--mode", "pca-shared-kv", "--size", "variance@0.5", "-o", out / "s"],
        ["plan", model, "--ratio", "0.2"],
        ["inspect", model],
        ["quantise", model, *rxx, *low, "-o", out / "low"],
        ["card", model, "--dense", out / "d.json", "--compressed", out / "c.json"],
        ["export", "hf", model, "-o", out / "hf"],
        ["export", "gguf", model, "--type", "f32", "-o", out / "m.gguf"],
        ["convert", model, "-o", out / "converted"],
        ["eval", "ppl", model, *text, "-o", out / "ppl.json"],
        ["eval", "harness", model, "--task", "boolq", "-o", out / "harness.json"],
        ["eval", "generation", model, "--prompt", "A river", "-o", out / "generation.json"],
        ["eval", "speed", model, "-o", out / "speed.json"],
    )


def refused_by_all(model, work, tmp_path, capsys, said):
    """Assert that every command refuses a folder in the same sentence, and leaves nothing."""
    out = tmp_path / "out"
    out.mkdir()
    before = {path.name for path in model.iterdir()}
    for words in commands(model, work / "text.jsonl", out):
        assert main(list(map(str, words))) == 1, words
        error = capsys.readouterr().err
        assert re.search(said, error), (words, error)
        assert len(error.strip().splitlines()) == 1, error
    assert list(out.iterdir()) == []
    assert {path.name for path in model.iterdir()} == before


def put(model, files):
    """Put files into a folder: text, JSON, or tensors."""
    for name, content in files.items():
        path = model / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(content, path, {"format": "pt"})
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


def rewrite(model, change, **config):
    """Change the tensors of a folder, given by their names, and its config."""
    tensors = load_file(model / "model.safetensors")
    changed = {name: value.clone() for name, value in change(tensors).items()}
    save_file(changed, model / "model.safetensors", {"format": "pt"})
    path = model / "config.json"
    if config:
        path.write_text(json.dumps(json.loads(path.read_text()) | config))


# --- configs ---


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("generation_config.json", {"eos_token_id": "1"}, "eos_token_id is '1', expected a token"),
        ("generation_config.json", "{", r"generation_config\.json: not valid JSON"),
    ],
)
def test_a_wrong_config_is_refused_by_every_command(
    work, model, tmp_path, capsys, name, content, says
):
    put(model, {name: content})
    refused_by_all(model, work, tmp_path, capsys, f"{says}|nothing to convert")


@pytest.mark.parametrize("name", OBJECTS)
def test_what_is_no_object_is_named(model, name):
    for content, says in (("[]", "found list"), ("null", "found None"), ("{", "not valid JSON")):
        (model / name).write_text(content)
        with pytest.raises(A3Error, match=f"{re.escape(str(model / name))}: {says}"):
            require_readable(model)


# --- adapters ---


ADAPTER = {"x.lora_A.weight": torch.zeros(4, 64)}
ALONE = {"adapter_config.json": LORA, "adapter_model.safetensors": ADAPTER}


@pytest.mark.parametrize("beside", [True, False])
def test_an_unmerged_adapter_is_refused_by_every_command(work, model, tmp_path, capsys, beside):
    if not beside:
        shutil.rmtree(model)
    put(model, ALONE)
    merge = r"an unmerged adapter \(LORA\).*merge it first.*some/base.*merge_and_unload\(\)"
    refused_by_all(model, work, tmp_path, capsys, merge)


MERGE = r"merge_and_unload\(\)\.save_pretrained"
KINDS = {
    "weights alone": ({"adapter_model.safetensors": ADAPTER}, MERGE),
    "pickled": ({"adapter_config.json": LORA, "adapter_model.bin": ""}, MERGE),
    "pickled alone": ({"adapter_model.bin": ""}, MERGE),
    "config alone": ({"adapter_config.json": LORA}, MERGE),
    "shards": ({"adapter_model-00001-of-00002.safetensors": ADAPTER}, MERGE),
    "mlx": ({"adapters.safetensors": ADAPTER}, MERGE),
    "IA3": ({"adapter_config.json": LORA | {"peft_type": "IA3"}}, rf"\(IA3\).*{MERGE}"),
    "LoHa": ({"adapter_config.json": LORA | {"peft_type": "LOHA"}}, rf"\(LOHA\).*{MERGE}"),
    "prompt": ({"adapter_config.json": LORA | {"peft_type": "PROMPT_TUNING"}}, "cannot be merged"),
    "prefix": ({"adapter_config.json": LORA | {"peft_type": "PREFIX_TUNING"}}, "cannot be merged"),
    "p-tuning": ({"adapter_config.json": LORA | {"peft_type": "P_TUNING"}}, "cannot be merged"),
    "adapters": (
        {
            "adapter_config.json": {
                "config": {"architecture": "lora"},
                "model_class": "LlamaForCausalLM",
                "model_name": "some/base",
            },
            "pytorch_adapter.bin": "",
        },
        r"\(lora\).*library `adapters`: load some/base.*merge_adapter",
    ),
    "not an object": ({"adapter_config.json": []}, MERGE),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beside", [True, False])
def test_adapters_of_every_kind_are_refused(model, kind, beside):
    files, said = KINDS[kind]
    if not beside:
        shutil.rmtree(model)
    put(model, files)
    with pytest.raises(A3Error, match=rf"an unmerged adapter.*{said}"):
        require_readable(model)
    # What transformers reads without a checkpoint of ours before: of a GGUF file beside it.
    with pytest.raises(A3Error, match="an unmerged adapter"):
        load_whole(model, gguf_file="model.gguf")


def test_adapters_below_a_folder_are_named_and_those_below_a_model_are_nobodys(model, tmp_path):
    put(model, {f"checkpoint-10/{name}": content for name, content in ALONE.items()})
    require_readable(model)
    shutil.copytree(model / "checkpoint-10", tmp_path / "run" / "checkpoint-10")
    with pytest.raises(A3Error, match=r"adapter \(LORA\), checkpoint-10/adapter_config\.json"):
        require_readable(tmp_path / "run")


@pytest.mark.parametrize("name", ["base_layer.weight", "lora_A.default.weight", "loras.x.lora_A"])
def test_an_adapter_among_the_models_own_tensors_is_refused(model, name):
    rewrite(model, lambda tensors: tensors | {f"{PREFIX}.{name}": torch.zeros(4, 64)})
    with pytest.raises(A3Error, match=rf"unmerged adapter among its tensors \({PREFIX}\.{name}"):
        Checkpoint(model)


# --- quantised ---


def few_bits(**tensors):
    """Tensors in the place of W_q, by what follows its module's name."""
    return {f"{PREFIX}.{name.replace('__', '.')}": value for name, value in tensors.items()}


INT32, UINT8 = torch.zeros(8, 64, dtype=torch.int32), torch.zeros(2048, 1, dtype=torch.uint8)
INT8, SCALE = torch.zeros(64, 64, dtype=torch.int8), torch.ones(64, 1)
BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_"
# Tensors that replace W_q, what config.json says, and the method that is named.
QUANTISED = {
    "gptq": (few_bits(qweight=INT32, qzeros=INT32, scales=SCALE, g_idx=INT32), "gptq", "gptq"),
    "gptq, unsaid": (few_bits(qweight=INT32, scales=SCALE), None, "GPTQ or AWQ"),
    "awq": (few_bits(qweight=INT32, qzeros=INT32, scales=SCALE), "awq", "awq"),
    "fp8": (few_bits(weight=INT8.to(torch.float8_e4m3fn), weight_scale_inv=SCALE), "fp8", "fp8"),
    "fp8, unsaid": (few_bits(weight=INT8.to(torch.float8_e5m2)), None, "F8_E5M2 numbers"),
    "fp8, scaled": (few_bits(weight=torch.ones(64, 64), weight_scale=SCALE), None, "fp8 or int8"),
    "nf4": (few_bits(weight=UINT8, weight__absmax=SCALE), "bitsandbytes", "bitsandbytes"),
    "int8": (few_bits(weight=INT8, SCB=SCALE), None, "bitsandbytes"),
    "packed": (few_bits(weight_packed=INT32, weight_scale=SCALE), None, "compressed-tensors"),
    "ct": (few_bits(weight=INT8, weight_scale=SCALE), "compressed-tensors", "compressed-tensors"),
    "hqq": (few_bits(W_q=UINT8, scale=SCALE), None, "HQQ"),
    "torchao": (few_bits(_weight_qdata=INT8, _weight_scale=SCALE), None, "torchao"),
    "quanto": (few_bits(weight___data=INT8, weight___scale=SCALE), None, "quanto"),
    "mxfp4": ({f"{BLOCKS}blocks": UINT8, f"{BLOCKS}scales": UINT8}, "mxfp4", "mxfp4"),
    "mlx": (few_bits(weight=INT32.to(torch.uint32), scales=SCALE, biases=SCALE), None, "MLX"),
    "bytes": (few_bits(weight=UINT8), None, "U8 numbers"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_every_quantised_checkpoint_is_called_so(model, kind):
    tensors, said, method = QUANTISED[kind]
    config = {} if said is None else {"quantization_config": {"quant_method": said}}

    def change(dense):
        return {name: value for name, value in dense.items() if name != Q} | tensors

    rewrite(model, change, **config)
    with pytest.raises(A3Error, match=rf"quantised \({method}.*\); dequantise it first: "):
        Checkpoint(model)


def test_a_quantised_model_is_refused_in_one_sentence_by_every_command(
    work, model, tmp_path, capsys
):
    tensors = QUANTISED["gptq"][0]
    rewrite(model, lambda dense: tensors, quantization_config={"quant_method": "gptq"})
    refused_by_all(model, work, tmp_path, capsys, r"quantised \(gptq\); dequantise it first")


@pytest.mark.parametrize("said", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {}])
def test_a_config_that_says_quantised_above_plain_weights_says_what_to_delete(
    work, model, tmp_path, capsys, said
):
    rewrite(model, lambda dense: dense, quantization_config=said)
    refused_by_all(model, work, tmp_path, capsys, "Delete quantization_config from it")


def test_what_is_no_quantisation_is_read(model):
    # GPT-2's masks are bytes; transformers writes null where there was a quantisation once.
    mask = {"transformer.h.0.attn.bias": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}
    rewrite(model, lambda dense: dense | mask, quantization_config=None)
    require_readable(model)


def test_a_config_alone_says_that_its_weights_are_quantised(model, capsys):
    rewrite(model, lambda dense: dense, quantization_config={"quant_method": "awq"})
    (model / "model.safetensors").unlink()
    assert main(["plan", str(model), "--ratio", "0.2"]) == 1
    assert "quantised (awq); dequantise it first" in capsys.readouterr().err


# --- names, and what is not there ---


PREFIXES = {
    "base_model.model.": r"'base_model\.model\.' in place of '' \(peft: ",
    "module.": r"'module\.' in place of '' \(DataParallel",
    "_orig_mod.": r"'_orig_mod\.' in place of '' \(torch\.compile",
    "language_model.": r"'language_model\.' in place of '' \(of a model of several modalities",
    "wrapped.": r"'wrapped\.' in place of '' \(rename them\)",
}


@pytest.mark.parametrize("prefix", [*PREFIXES, "model.language_model."])
def test_names_with_a_wrappers_prefix_are_shown(work, model, tmp_path, capsys, prefix):
    inner = prefix == "model.language_model."
    said = PREFIXES.get(prefix, r"'model\.language_model\.' in place of 'model\.' \(of a model of")

    def change(dense):
        return {
            name.replace("model.", prefix, 1) if inner else prefix + name: value
            for name, value in dense.items()
        }

    rewrite(model, change)
    text = ["--text", work / "text.jsonl", *B]
    for words in (
        ["inspect", model],
        ["compress", model, "--ratio", "0.2", *text, "-o", tmp_path / "small"],
        ["eval", "ppl", model, *text, "-o", tmp_path / "ppl.json"],
    ):
        assert main(list(map(str, words))) == 1
        assert re.search(f"its names begin with {said}", capsys.readouterr().err)


def test_a_tensor_or_a_layer_that_is_missing_is_named_and_no_prefix_blamed(model):
    rewrite(model, lambda dense: {name: value for name, value in dense.items() if name != Q})
    said = rf"no tensor '{Q}' in its safetensors\. There are 20 others.*not whole"
    with pytest.raises(A3Error, match=said):
        Checkpoint(model).tensor(Q)
    with pytest.raises(A3Error, match=rf"expected shape for {Q}\. There are 20 others"):
        load_whole(model)
    rewrite(model, lambda dense: dense | {Q: torch.ones(32, 64)})
    with pytest.raises(A3Error, match=rf"no tensor of the expected shape for {Q}\. Fetch"):
        load_whole(model)


def test_shards_and_links_that_are_not_there_are_named(work, model, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    dense.save_pretrained(model, max_shard_size="100KB")
    require_readable(model)
    last = max(model.glob("*.safetensors"))
    last.rename(tmp_path / "aside")
    with pytest.raises(A3Error, match=rf"index\.json: names {last.name}, which are missing"):
        require_readable(model)
    (tmp_path / "aside").rename(last)
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(A3Error, match="is a shard, and there is no"):
        require_readable(model)
    source = shutil.copytree(work / "dense", tmp_path / "source")
    run("model", source, "-o", tmp_path / "made")
    source.rename(tmp_path / "moved")
    with pytest.raises(A3Error, match=r"a link to .*source/model\.safetensors, which is not there"):
        require_readable(tmp_path / "made")


# --- what a3 made itself ---


def test_a_compressed_model_is_called_so_where_a_dense_one_is_wanted(work, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    wants_dense = (
        "model",
        "compress",
        "approx",
        "losses",
        "allocate",
        "spectra",
        "surgery",
        "plan",
    )
    for words in commands(work / "small", work / "text.jsonl", tmp_path / "out"):
        if words[0] in wants_dense:
            assert main(list(map(str, words))) == 1
            error = capsys.readouterr().err
            assert f"{work / 'small'}: compressed by a3 already (llama)" in error, words
    assert list((tmp_path / "out").iterdir()) == []


# --- saved again ---


def save_again(folder, out, **options):
    """A folder as transformers saves it."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out, **options)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


@pytest.mark.parametrize(
    "name", ["gpt2", "gemma2", "falcon", "phi3", "mixtral", "mpt", "qwen3", "llama-tied"]
)
def test_config_and_tensors_say_the_shapes_and_sizes_that_approx_json_says(tmp_path, name):
    family, config = MODELS[name]
    tiny_model(tmp_path / "dense", family, **config)
    repack(tmp_path / "dense", tmp_path / "whole")
    said = compressed_record(tmp_path / "whole")
    found = compressed_record(save_again(tmp_path / "whole", tmp_path / "again"))
    assert found["base"] == said["base"] | {"weights_sha256": None}
    assert found["size"] == said["size"]
    assert found["weights_sha256"] == Checkpoint(tmp_path / "again").sha256()


@pytest.mark.parametrize("modes", [["svd", "svd", "svd"], ["abs-w", "identity", "dense"]])
def test_sizes_of_products_and_of_smaller_heads_are_those_of_approx_json(work, tmp_path, modes):
    options = [word for pair in zip(("--qk", "--ov", "--mlp"), modes, strict=True) for word in pair]
    text = ["--text", work / "text.jsonl", *B]
    run("compress", work / "dense", *options, "--ratio", "0.3", *text, "-o", tmp_path / "small")
    said = compressed_record(tmp_path / "small")
    found = compressed_record(save_again(tmp_path / "small", tmp_path / "again"))
    assert found["size"] == said["size"]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("a3.mlp_ranks", [], r"a3\.mlp_ranks has 0 items, and num_hidden_layers is 2"),
        ("a3.qk_ranks", [8, 8], "no tensor of the expected shape"),
        ("a3.family", "mamba", "cannot read it"),
        ("num_attention_heads", 10**9, "not the config of a compressed llama"),
        ("num_hidden_layers", 10**9, "1000000000 layers, but the safetensors hold"),
    ],
)
def test_sizes_that_the_tensors_do_not_have_are_refused(work, tmp_path, path, value, said):
    again = tmp_path / "again"
    repack(work / "dense", tmp_path / "whole")
    save_again(tmp_path / "whole", again)
    config = json.loads((again / "config.json").read_text())
    key = path.removeprefix("a3.")
    (config["a3"] if key != path else config)[key] = value
    (again / "config.json").write_text(json.dumps(config))
    with pytest.raises(A3Error, match=said):
        compressed_record(again)


def collect_inputs(model, text, out):
    """The statistics by which a model is quantised."""
    outputs = [out / f"{kind}.safetensors" for kind in INPUTS]
    run("collect", model, "--text", text, *B, "-o", *outputs)
    return out


def low_precision(model, rxx, out, method="qera", products=None, **formats):
    """Quantise a model with the formats of its matrices."""
    layers = [{"match": r".*_proj", **INT4, **formats}]
    recipe = json.dumps({"layers": layers, "products": products or {}})
    ranked = [] if method == "none" else ["--rank", "4"]
    options = ["--recipe", recipe, "--method", method, *ranked]
    run("quantise", model, "--rxx", rxx, *options, "-o", out)
    return out


def logits(folder):
    """Of some tokens, computed in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    torch.manual_seed(0)
    return model(torch.randint(2, 300, (2, 40))).logits


@pytest.fixture(scope="module")
def recovered(work, tmp_path_factory):
    """`small` after a step of training and with four more tokens, as transformers saves it."""
    folder = tmp_path_factory.mktemp("recovered")
    model = AutoModelForCausalLM.from_pretrained(work / "small")
    model.resize_token_embeddings(304)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = torch.randint(2, 300, (2, 32))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(folder / "again", max_shard_size="200KB")
    AutoTokenizer.from_pretrained(work / "small").save_pretrained(folder / "again")
    collect_inputs(folder / "again", work / "text.jsonl", folder / "rxx")
    low_precision(folder / "again", folder / "rxx", folder / "low")
    return folder


def test_a_recovered_model_is_inspected_scored_timed_and_quantised(work, recovered, capsys):
    again, low = recovered / "again", recovered / "low"
    assert not (again / "approx.json").exists()
    assert len(list(again.glob("*.safetensors"))) > 1
    said = inspect(again)
    model = AutoModelForCausalLM.from_pretrained(again)
    assert f"{sum(p.numel() for p in model.parameters()):,} (" in said
    assert "12 of 16" in said
    assert "modes, errors and calibration are unknown" in said
    record = json.loads((low / "approx.json").read_text())
    assert record["approx"] is None
    assert record["provenance"]["weights_sha256"] == Checkpoint(again).sha256()
    assert not record.keys() & {"modes", "layers"}
    scores = {}
    for name, folder in {"dense": work / "dense", "again": again, "low": low}.items():
        scores[name] = recovered / f"{name}.json"
        text = ["--text", work / "text.jsonl", *B]
        run("eval", "ppl", folder, *text, "-o", scores[name])
    speed = ["--prompt", "16", "--new-tokens", "4", "--repeats", "1", "-o", recovered / "s.json"]
    run("eval", "speed", work / "dense", again, *speed)
    for name, folder in {"again": again, "low": low}.items():
        run("card", folder, "--dense", scores["dense"], "--compressed", scores[name])
        card = (folder / "README.md").read_text()
        assert f"{json.loads(scores[name].read_text())['perplexity']:.2f} ±" in card
        assert "perhaps fine-tuned" in card
        assert "without training" not in card
    assert "modes and errors are unknown" in (again / "README.md").read_text()
    assert (
        "Low precision, simulated (values are rounded, nothing runs faster): 14 matrices"
        in (low / "README.md").read_text()
    )
    run("card", again, "--dense", scores["dense"], "--compressed", scores["again"])
    own = (again / "README.md").read_text()
    words = ["card", again, "--dense", scores["dense"], "--compressed", scores["again"]]
    for mine in ("# My model\n", own + "Mine.\n", own.replace("perhaps", "surely"), ""):
        (again / "README.md").write_text(mine)
        capsys.readouterr()
        assert main(list(map(str, words))) == 1
        assert "a3 did not write this card" in capsys.readouterr().err
        assert (again / "README.md").read_text() == mine
    (again / "README.md").unlink()


def test_a_recovered_and_repaired_model_is_exported_as_it_is(recovered, tmp_path):
    low = recovered / "low"
    run("export", "hf", low, "-o", tmp_path / "stock")
    torch.testing.assert_close(logits(tmp_path / "stock"), logits(low), rtol=2e-6, atol=2e-6)
    run("export", "gguf", low, "--type", "f32", "-o", tmp_path / "low.gguf")


@pytest.mark.parametrize("files", [["approx.json"], ["*.json", "*.md", "*.py"]])
def test_an_approx_json_of_other_weights_is_refused(work, tmp_path, capsys, files):
    save_again(work / "small", tmp_path / "again")
    rewrite(tmp_path / "again", lambda tensors: {k: v * 1.5 for k, v in tensors.items()})
    for pattern in files:
        for path in (work / "small").glob(pattern):
            shutil.copyfile(path, tmp_path / "again" / path.name)
    (tmp_path / "out").mkdir()
    for words in commands(tmp_path / "again", work / "text.jsonl", tmp_path / "out"):
        if words[0] in ("inspect", "collect", "eval", "export") and words[1] != "harness":
            assert main(list(map(str, words))) == 1, words
            said = r"changed since it was written|no such file, but its record is there"
            assert re.search(said, capsys.readouterr().err), words


def test_inspect_holds_weights_to_their_record_that_it_would_not_read(tmp_path):
    tiny_model(tmp_path / "dense", "gpt2", n_inner=96)
    repack(tmp_path / "dense", tmp_path / "whole")
    assert "compressed by a3" in inspect(tmp_path / "whole")
    rewrite(tmp_path / "whole", lambda tensors: {k: v * 1.5 for k, v in tensors.items()})
    with pytest.raises(A3Error, match=r"model\.safetensors: changed since"):
        inspect(tmp_path / "whole")


# --- exports of quantised models ---


def folded(low, tmp_path, capsys):
    """The exports of a quantised folder: the tensors of both, and what was said."""
    run("export", "hf", low, "-o", tmp_path / "stock")
    run("export", "gguf", low, "--type", "f32", "-o", tmp_path / "stock.gguf")
    stock = load_file(tmp_path / "stock/model.safetensors")
    return stock, read_gguf(tmp_path / "stock.gguf")[1], capsys.readouterr().out


@pytest.mark.parametrize("base", ["dense", "small"])
@pytest.mark.parametrize("method", ["qera", "none"])
def test_the_export_of_a_repaired_model_has_the_repair(work, tmp_path, capsys, base, method):
    rxx = collect_inputs(work / base, work / "text.jsonl", tmp_path / "rxx")
    low = low_precision(work / base, rxx, tmp_path / "low", method)
    capsys.readouterr()
    stock, gguf, said = folded(low, tmp_path, capsys)
    expected = logits(low)
    torch.testing.assert_close(logits(tmp_path / "stock"), expected, rtol=2e-6, atol=2e-6)
    assert (logits(work / base) - expected).abs().max() > 1e-2
    # Each tensor is one that the family's model has, and all of them.
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert stock.keys() == read.state_dict().keys()
    name = "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(gguf["blk.1.ffn_down.weight"], stock[f"{name}.weight"].numpy())
    tensors = load_file(low / "model.safetensors")
    W = tensors[f"{name}.weight"].double()
    if method == "none":
        assert "export: A B" not in said
        assert torch.equal(stock[f"{name}.weight"], W.float())
        return
    assert said.count("A B of 14 matrices added to W in float64 and rounded to float32") == 2
    AB = tensors[f"{name}.A"].double() @ tensors[f"{name}.B"].double()
    assert torch.equal(stock[f"{name}.weight"], (W + AB.T).float())
    # inspect says what the exports do.
    assert "after a3 export hf (A B of 14 matrices added to W in float64" in inspect(low)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_repair_is_rounded_once_to_the_folders_dtype(work, tmp_path, capsys, dtype):
    half = AutoModelForCausalLM.from_pretrained(work / "dense", dtype=getattr(torch, dtype))
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(work / "dense").save_pretrained(tmp_path / "half")
    rxx = collect_inputs(tmp_path / "half", work / "text.jsonl", tmp_path / "rxx")
    low = low_precision(tmp_path / "half", rxx, tmp_path / "low", W="bfp4/16", A="none", B="none")
    stock, _, said = folded(low, tmp_path, capsys)
    assert f"rounded to {dtype}" in said
    expected, width = logits(low), torch.finfo(getattr(torch, dtype)).eps
    found = (logits(tmp_path / "stock") - expected).norm() / expected.norm()
    assert 0 < found < 2 * width
    assert {str(value.dtype) for value in stock.values()} == {f"torch.{dtype}"}


ROUNDED = {
    "inputs": ({"x": "bfp8/16"}, None, r"the inputs of 14 of its matrices are rounded \(bfp8/16\)"),
    "products": ({}, {"k": "bfp8/16"}, r"the operands of its attention are rounded \(bfp8/16\)"),
}


@pytest.mark.parametrize("what", ROUNDED)
@pytest.mark.parametrize("method", ["qera", "none"])
def test_what_is_rounded_as_it_runs_is_not_exported(work, tmp_path, capsys, what, method):
    formats, products, reason = ROUNDED[what]
    rxx = collect_inputs(work / "small", work / "text.jsonl", tmp_path / "rxx")
    low = low_precision(work / "small", rxx, tmp_path / "low", method, products, **formats)
    capsys.readouterr()
    for words in (["hf"], ["gguf", "--type", "f32"]):
        assert main(["export", *words, str(low), "-o", str(tmp_path / "out")]) == 1
        assert re.search(f"{reason}.*quantise weights alone", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert re.search(f"llama.cpp.*: no: .*{reason}", inspect(low))


def test_a_tensor_that_the_exported_model_would_not_read_is_an_error(work, tmp_path, capsys):
    again = save_again(work / "small", tmp_path / "again")
    # Computed by every model, and a layer that the config has dropped: nothing is lost.
    ignored = {f"{PREFIX.rpartition('.')[0]}.rotary_emb.inv_freq": torch.ones(8)}
    ignored["model.layers.7.mlp.up_proj.weight"] = torch.ones(2, 2)
    rewrite(again, lambda tensors: tensors | ignored)
    run("export", "hf", again, "-o", tmp_path / "stock")
    written = load_file(tmp_path / "stock/model.safetensors").keys()
    assert not written & ignored.keys()
    rewrite(again, lambda tensors: tensors | {"model.layers.0.mlp.gain": torch.ones(64)})
    capsys.readouterr()
    for words in (["hf"], ["gguf", "--type", "f32"]):
        assert main(["export", *words, str(again), "-o", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert "1 tensors that llama does not read, model.layers.0.mlp.gain" in said
    assert not (tmp_path / "out").exists()


def test_a_folder_is_described_once_until_a_file_of_it_changes(tmp_path, monkeypatch):
    folder, described = tiny_llama(tmp_path / "tiny"), []

    def noted(of):
        described.append(describe(of))
        return described[-1]

    monkeypatch.setattr(arch, "describe", noted)
    first = arch.load_arch(folder)
    first.size["parameters"] = 0  # a caller's own
    assert arch.load_arch(folder).size["parameters"] > 0
    assert len(described) == 1
    tiny_llama(folder, seed=1)
    assert arch.load_arch(folder).weights_sha256 != first.weights_sha256
    assert len(described) == 2
