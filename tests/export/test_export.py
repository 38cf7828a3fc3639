"""Compressed models as ordinary checkpoints and GGUF files: the same logits, and clear refusals."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file
from test_compressed import prepare
from tiny import tiny_llama, tiny_model
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import a3  # noqa: F401
from a3.cli.main import main
from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.models.arch import load_arch
from a3.models.gguf_rules import RULES
from a3.models.stock import stock
from a3.solutions.modes import choose
from a3.solutions.plan import Plan
from a3.stages.approx.approximate import approximate, approximate_shard
from a3.stages.approx.assemble import gather
from a3.stages.export.gguf import export_gguf
from a3.stages.export.hf import export_hf
from a3.stages.export.inspect import inspect, runs
from a3.stages.export.llama import rules_of

GLOBAL = {"qk": "uniform-global@12", "ov": "xkv@12", "mlp": "rxx-w@64", "ratio": "-"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-scaled": ("llama", {"rope_parameters": LLAMA3}),
    "llama-wide-heads": ("llama", {"head_dim": 24}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
}


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """A folder with `dense`, its statistics, `small` and, of it, `stock`."""
    folder = tmp_path_factory.mktemp(request.param)
    prepare(folder, *MODELS[request.param][:1], MODELS[request.param][1])
    (folder / "dense" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    compress(folder, "small")
    export_hf(folder / "small", folder / "stock")
    return folder


def compress(folder, name, **modes):
    approximate(folder / "dense", folder / "rxx", Plan(choose(GLOBAL | modes)), folder / name)
    return folder / name


@torch.inference_mode()
def logits(folder, length=40):
    ids = torch.randint(300, (2, length), generator=torch.Generator().manual_seed(0))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)(ids).logits


def test_the_export_is_the_family_itself_and_has_the_same_logits(made):
    config = json.loads((made / "stock/config.json").read_text())
    assert (
        config["model_type"] == json.loads((made / "dense/config.json").read_text())["model_type"]
    )
    assert config["head_dim"] == 12
    assert config["intermediate_size"] == 64
    expected = logits(made / "small")
    assert (expected - logits(made / "dense")).abs().max() > 1e-3
    # Frequencies and cosines are float32.
    torch.testing.assert_close(logits(made / "stock"), expected, rtol=0, atol=2e-5)
    tokenizer = AutoTokenizer.from_pretrained(made / "stock")
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    record = read_record(made / "stock/export.json")
    of = read_record(made / "small/approx.json")
    assert record["provenance"]["checkpoint_sha256"] == of["weights_sha256"]


def test_it_loads_where_there_is_no_a3(llama):
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'a3': raise ImportError('a3 is not here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False))\n"
        "assert 'a3' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(llama / "stock")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "tensor" in done.stdout


def test_several_files_stay_several_and_shards_have_one_set_of_pairs(llama, tmp_path):
    plan, numbers = Plan(choose(GLOBAL)), ("0of2", "1of2")
    shards = [tmp_path / f"{number}.safetensors" for number in numbers]
    for number, shard in zip(numbers, shards, strict=True):
        approximate_shard(llama / "dense", llama / "rxx", plan, number, shard)
    gather(llama / "dense", shards, tmp_path / "small")
    export_hf(tmp_path / "small", tmp_path / "stock")
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) == 3
    torch.testing.assert_close(logits(tmp_path / "stock"), logits(llama / "stock"))
    export_gguf(tmp_path / "small", tmp_path / "several.gguf", "f16")
    export_gguf(llama / "small", tmp_path / "small.gguf", "f16")
    several, one = (read_gguf(tmp_path / f"{name}.gguf")[1] for name in ("several", "small"))
    for name, value in one.items():
        np.testing.assert_array_equal(several[name], value)


def read_gguf(path):
    """Fields and, dequantised and with pairs in halves again, the tensors of a GGUF file."""
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    heads = {
        "q": fields["llama.attention.head_count"],
        "k": fields["llama.attention.head_count_kv"],
    }
    for name, value in tensors.items():
        for projection, count in heads.items():
            if f"attn_{projection}." in name:
                pairs = value.reshape(count, -1, 2, *value.shape[1:])
                tensors[name] = np.swapaxes(pairs, 1, 2).reshape(value.shape)
    return fields, tensors


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
    "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
    "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
    "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
    "model.layers.1.self_attn.q_proj.bias": "blk.1.attn_q.bias",
    "model.layers.1.self_attn.k_proj.bias": "blk.1.attn_k.bias",
    "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
}


@pytest.mark.parametrize("of", ["small", "stock"])
def test_the_gguf_file_holds_the_export(made, tmp_path, of):
    export_gguf(made / of, tmp_path / "model.gguf", "f32")
    fields, tensors = read_gguf(tmp_path / "model.gguf")
    assert fields["general.architecture"] == "llama"
    sizes = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    assert [fields[f"llama.{name}"] for name in sizes] == [12, 12, 12]
    assert fields["llama.feed_forward_length"] == 64
    expected = load_file(made / "stock/model.safetensors")
    for name, value in expected.items():
        if name in NAMES:
            np.testing.assert_array_equal(tensors[NAMES[name]], value.numpy(), err_msg=name)
    plain = stock(made / of).linear is not None
    assert len(tensors) == len(expected) + (not plain)
    assert plain == ("rope_freqs.weight" not in tensors)
    # What llama.cpp turns pairs by is what the export turns them by.
    rotary = LlamaRotaryEmbedding(AutoModelForCausalLM.from_pretrained(made / "stock").config)
    np.testing.assert_allclose(angles(fields, tensors), rotary.inv_freq.numpy(), rtol=4e-7)


def angles(fields, tensors):
    """By what llama.cpp turns pairs at position 1, as a file says."""
    count = fields["llama.rope.dimension_count"] // 2
    theta = fields["llama.rope.freq_base"] ** (-np.arange(count) / count)
    divisors = tensors.get("rope_freqs.weight", 1.0)
    return theta / (divisors * fields.get("llama.rope.scaling.factor", 1.0))


def test_a_dense_model_is_a_gguf_file_too(made, tmp_path):
    export_gguf(made / "dense", tmp_path / "dense.gguf", "f16")
    fields, tensors = read_gguf(tmp_path / "dense.gguf")
    dense = load_file(made / "dense/model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_allclose(tensors[NAMES[name]], dense[name].numpy(), rtol=1e-3, atol=1e-4)
    assert fields["llama.attention.key_length"] == dense[name].shape[0] // 4
    frequencies = stock(made / "dense").frequencies
    np.testing.assert_allclose(angles(fields, tensors), frequencies.numpy(), rtol=1e-6)


def test_the_gguf_file_holds_the_tokenizer(made, tmp_path):
    export_gguf(made / "small", tmp_path / "model.gguf", "f32")
    fields, _ = read_gguf(tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(made / "small")
    tokens = fields["tokenizer.ggml.tokens"]
    # Qwen 2's class adds <|endoftext|> where there is none: a token without a row.
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if i < len(tokens)}
    assert {token: i for i, token in enumerate(tokens)} == vocabulary
    # Qwen 2's class has rules of its own, whatever the file says.
    rules = "qwen2" if type(tokenizer).__name__.startswith("Qwen2") else "gpt-2"
    assert fields["tokenizer.ggml.pre"] == rules
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages[0].content }}"
    # <s> and </s> are control tokens, "a" is a normal one.
    kinds = fields["tokenizer.ggml.token_type"]
    assert (kinds[0], kinds[1], kinds[tokens.index("a")]) == (3, 3, 1)
    content = json.loads((made / "small/tokenizer.json").read_text())
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    assert fields["tokenizer.ggml.merges"] == merges


def test_rows_that_do_not_divide_into_blocks_are_f16_and_said_so(made, tmp_path, caplog):
    caplog.set_level("INFO", "a3")
    export_gguf(made / "small", tmp_path / "model.gguf", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "model.gguf").tensors}
    # Rows of the output projection are 4 · 12 long, those of the queries 64.
    assert kinds["blk.0.attn_output.weight"] == "F16"
    assert kinds["blk.0.attn_q.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"
    assert "tensors are F16, since a row is not a multiple of 32" in caplog.text


def refused(folder):
    """What `stock` says of a folder."""
    with pytest.raises(A3Error) as caught:
        stock(folder)
    return str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    prepare(folder, "llama", {})
    compress(folder, "small")
    export_hf(folder / "small", folder / "stock")
    return folder


@pytest.mark.parametrize(
    ("modes", "reason"),
    [
        ({"qk": "rxx-w-rxx@12"}, "different sets of pairs"),
        ({"ov": "xkv@10"}, "a head has one size, and QK keeps 12 dimensions, OV 10"),
        ({"mlp": "svd@0.3"}, "some of its matrices are factored"),
        ({"mlp": "flap@0.3"}, "its down projections have a bias"),
    ],
)
def test_what_no_family_has_is_refused_with_the_reason(llama, tmp_path, modes, reason):
    approximate(llama / "dense", llama / "rxx", Plan(choose(GLOBAL | modes)), tmp_path / "small")
    said = refused(tmp_path / "small")
    assert reason in said
    assert "--qk uniform-global --ov xkv" in said
    shown = inspect(tmp_path / "small")
    assert "vLLM, TGI: no: " in shown
    assert reason in shown
    # Its plugin takes other sizes and pairs, and no other kinds of layers.
    other = re.search(r"vLLM with a3's plugin: no: (.*)\n", shown)
    assert (reason == other[1]) if "mlp" in modes else other is None
    assert main(["export", "hf", str(tmp_path / "small"), "-o", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_ranks_that_differ_between_layers_are_refused(llama, tmp_path):
    compress(llama, "varied")
    path = llama / "varied/config.json"
    config = json.loads(path.read_text())
    config["a3"]["mlp_ranks"] = [64, 60]
    (llama / "varied/approx.json").unlink()
    path.write_text(json.dumps(config))
    assert "ranks of MLP differ between layers, 60 to 64" in refused(llama / "varied")


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "its RoPE is dynamic, whose frequencies depend"),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
            | {"original_max_position_embeddings": 64, "factor": 8.0},
            "its RoPE is longrope, whose frequencies depend",
        ),
        ({"rope_type": "yarn", "factor": 4.0}, "its RoPE, yarn, multiplies queries and keys by"),
        (
            {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5},
            "RoPE's tables are 8 numbers wide and heads 16",
        ),
    ],
)
def test_rope_that_no_table_of_factors_is_is_refused(tmp_path, rope, reason):
    tiny_llama(tmp_path / "model", rope_parameters={"rope_theta": 1e4} | rope)
    assert reason in refused(tmp_path / "model")


def test_other_families_are_refused(tmp_path):
    tiny_model(tmp_path / "model", "gemma2")
    assert "no ordinary checkpoints of gemma2" in refused(tmp_path / "model")


def test_an_ordinary_checkpoint_is_not_exported_again(llama, tmp_path, capsys):
    command = ["export", "hf", str(llama / "dense"), "-o", str(tmp_path / "out")]
    assert main(command) == 1
    assert "an ordinary checkpoint already" in capsys.readouterr().err


def test_what_llama_cpp_does_otherwise_is_refused(tmp_path):
    tiny_model(tmp_path / "window", "mistral", sliding_window=16)
    with pytest.raises(A3Error, match="a window of 16 positions"):
        export_gguf(tmp_path / "window", tmp_path / "model.gguf", "f32")
    tiny_llama(tmp_path / "gelu", hidden_act="gelu")
    with pytest.raises(A3Error, match="its activation is gelu"):
        export_gguf(tmp_path / "gelu", tmp_path / "model.gguf", "f32")
    assert not (tmp_path / "model.gguf").exists()


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(RULES["llama-bpe"].steps[0]), "isolated"), BYTES]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(RULES["qwen2"].steps[0]), "isolated"), BYTES]
    ),
}


@pytest.mark.parametrize("name", WORDS)
def test_rules_of_words_have_llama_cpps_name(name, tmp_path):
    model = models.BPE(ignore_merges=name == "llama-bpe")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WORDS[name]
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    assert rules_of(json.loads(tokenizer.to_str()), tmp_path) == name


@pytest.mark.parametrize(
    ("model", "words", "reason"),
    [
        (models.WordLevel({"a": 0}, "a"), WORDS["gpt-2"], "its model is WordLevel"),
        (models.BPE(byte_fallback=True), WORDS["gpt-2"], "expected byte-level BPE"),
        (models.BPE(), pre_tokenizers.Whitespace(), "its pre_tokenizer is .*Whitespace"),
        (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True), "its pre_tokenizer is"),
        # No name of GPT-2's words takes words of the vocabulary without merges.
        (models.BPE(ignore_merges=True), WORDS["gpt-2"], "its pre_tokenizer is"),
    ],
)
def test_other_tokenizers_are_refused_by_name(model, words, reason, tmp_path):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = words
    with pytest.raises(A3Error, match=reason):
        rules_of(json.loads(tokenizer.to_str()), tmp_path)


def test_inspect_says_what_a_folder_is(made):
    small, exported = inspect(made / "small"), inspect(made / "stock")
    assert re.search(r"QK +uniform-global@12: 12 of (16|24)\n", small)
    assert re.search(r"MLP +rxx-w@64: 64 of 96\n", small)
    size = read_record(made / "small/approx.json")["size"]["compressed"]
    for text in (small, exported):
        assert f"{size['parameters']:,}" in text
        assert f"{size['kv_bytes_per_token']:,} bytes" in text
        assert "llama.cpp: after a3 export gguf" in text
    assert "transformers without a3: after a3 export hf" in small
    assert "exported by a3 export hf" in exported
    assert re.search(r"after a3 export hf, untested: .*vLLM on GPUs, TGI\n", small)
    assert "vLLM with a3's plugin: yes" in small
    assert re.search(r"after a3 export hf, right: transformers 5.23, .*OpenVINO", small)


def test_ranks_are_shown_shortly():
    assert runs([48, 48, 48]) == "48"
    assert runs([48, 48, 52]) == "(by layer) 48 in 0–1, 52 in 2"
    assert runs([[60, 96], [60, 96]]) == "60–96"


def servable(folder, head_dim, qk, ov):
    """Ranks that --servable gives a model with heads of this size."""
    tiny_llama(folder, head_dim=head_dim, num_hidden_layers=1)
    plan = Plan(choose({"qk": qk, "ov": ov, "mlp": "dense", "ratio": "-"}), servable=True)
    return plan.ranks(load_arch(folder))


@pytest.mark.parametrize(
    ("ratio", "rank"), [("0", 128), ("0.1", 120), ("0.2", 96), ("0.4", 80), ("0.6", 64)]
)
def test_servable_heads_have_the_nearest_size_that_kernels_have(tmp_path, ratio, rank):
    found = servable(tmp_path, 128, f"rxx-w-rxx@{ratio}", f"xkv@{ratio}")
    assert found == {"qk": rank, "ov": rank}


def test_heads_of_the_smallest_servable_size_cannot_be_smaller(tmp_path):
    with pytest.raises(A3Error, match=r"heads have 64 dimensions.*none is smaller.*--qk dense"):
        servable(tmp_path, 64, "rxx-w-rxx@48", "xkv@48")
    assert servable(tmp_path, 64, "rxx-w-rxx@0", "xkv@64") == {"qk": 64, "ov": 64}


def test_servable_heads_are_not_shared_out():
    row = {"qk": "fisher~", "ov": "joint~", "mlp": "obs~", "ratio": "0.2"}
    with pytest.raises(A3Error, match="servable: qk and ov are marked ~"):
        Plan(choose(row), servable=True)
    assert Plan(choose(row | {"qk": "dense", "ov": "dense"}), servable=True).servable
