"""GGUF files in and out: the same function, the same tokens and prompts, or a refusal by name."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf_files import ARCHITECTURES, changed, tiny_gguf
from safetensors.torch import load_file, save_file
from test_compressed import prepare
from tiny import run, tiny_llama, tiny_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

import a3  # noqa: F401
from a3.cli.main import main
from a3.core.errors import A3Error
from a3.models.gguf import read_gguf, require_whole_model
from a3.models.gguf_rules import NAMES, RULES, SAME
from a3.models.stock import llama_cpp_cache
from a3.solutions.modes import choose
from a3.solutions.plan import Plan
from a3.stages.approx.approximate import approximate
from a3.stages.export.gguf import export_gguf
from a3.stages.export.inspect import inspect
from a3.stages.inputs.gguf_config import config_of
from a3.stages.inputs.gguf_tokenizer import tokenizer_of

THETA = {"rope_theta": 1e4}
LLAMA3 = THETA | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LISTS = {"short_factor": [1.0, 1.5] * 4, "long_factor": [1.0, 1.5] * 4}
LONGROPE = THETA | LISTS | {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}
ORIGINAL = {"original_max_position_embeddings": 64}
EXPORTS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"head_dim": 24}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("mistral", {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}}),
    "yarn": ("llama", {"rope_parameters": YARN | ORIGINAL}),
    "longrope": ("qwen2", {"rope_parameters": LONGROPE | ORIGINAL}),
    "mistral": ("mistral", {"sliding_window": None}),
    "ministral": ("ministral", {"sliding_window": 512, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
}
TEXTS = [
    "It's 1969:  600 million\n\n\tviewers… 月 café 🚀 x=3.14 ",
    "<s>A river</s> moves <think>to the [tool]ocean<pad>",
    "  a  b\r\n",
    "",
]
CHAT = [{"role": "user", "content": "A river"}]


@torch.inference_mode()
def logits(folder, length=60):
    ids = torch.randint(300, (2, length), generator=torch.Generator().manual_seed(0))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def through_gguf(folder, out, kind="f32"):
    """A folder, written as a GGUF file and read again."""
    out.mkdir(exist_ok=True)
    export_gguf(folder, out / "model.gguf", kind)
    run("model", out / "model.gguf", "-o", out / "back")
    return out / "back"


def same_tokenizers(one, other):
    """Both read, decode and ask alike."""
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (one, other))
    assert one.get_vocab() == other.get_vocab()
    assert one.special_tokens_map == other.special_tokens_map
    for text in TEXTS:
        ids = one(text).input_ids
        assert ids == other(text).input_ids, text
        for skip in (True, False):
            assert one.decode(ids, skip_special_tokens=skip) == other.decode(
                ids, skip_special_tokens=skip
            )
    assert one.chat_template == other.chat_template


@pytest.mark.parametrize("name", EXPORTS)
def test_a_dense_model_comes_back_the_same(tmp_path, name):
    family, config = EXPORTS[name]
    # Tokenizers of some families add a token to the 300.
    tiny_model(tmp_path / "dense", family, vocab_size=310, **config)
    back = through_gguf(tmp_path / "dense", tmp_path / "gguf")
    torch.testing.assert_close(logits(back), logits(tmp_path / "dense"), rtol=0, atol=5e-5)
    same_tokenizers(tmp_path / "dense", back)


@pytest.mark.parametrize("name", ["llama3", "linear"])
def test_scalings_have_their_own_names_again(tmp_path, name):
    family, config = EXPORTS[name]
    tiny_model(tmp_path / "dense", family, **config)
    back = through_gguf(tmp_path / "dense", tmp_path / "gguf")
    found = json.loads((back / "config.json").read_text())["rope_parameters"]
    for key, value in config["rope_parameters"].items():
        assert found[key] == (pytest.approx(value, rel=1e-5) if value != found[key] else value)


def test_a_compressed_model_comes_back_the_same(tmp_path):
    prepare(tmp_path, "llama", {"rope_parameters": LLAMA3})
    modes = {"qk": "uniform-global@12", "ov": "xkv@12", "mlp": "rxx-w@64", "ratio": "-"}
    approximate(tmp_path / "dense", tmp_path / "rxx", Plan(choose(modes)), tmp_path / "small")
    back = through_gguf(tmp_path / "small", tmp_path / "gguf")
    torch.testing.assert_close(logits(back), logits(tmp_path / "small"), rtol=0, atol=5e-5)
    assert json.loads((back / "config.json").read_text())["head_dim"] == 12
    assert llama_cpp_cache(12) in (tmp_path / "small/README.md").read_text()
    same_tokenizers(tmp_path / "small", back)


def with_own_head(folder):
    """Give a tied model a head of its own, its config left as it is."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    torch.manual_seed(1)
    tensors["lm_head.weight"] = torch.randn(300, 64) * 0.1
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_a_head_of_its_own_under_a_tied_config_is_written(tmp_path):
    tied = tiny_llama(tmp_path / "dense", tie_word_embeddings=True)
    before = logits(tied)
    own = with_own_head(tied)
    assert (logits(own) - before).abs().max() > 0.1
    back = through_gguf(own, tmp_path / "gguf")
    torch.testing.assert_close(logits(back), logits(own), rtol=0, atol=5e-5)


def test_a_stored_head_that_is_the_embedding_is_not_written_twice(tmp_path):
    dense = tiny_llama(tmp_path / "dense", tie_word_embeddings=True)
    tensors = load_file(dense / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    export_gguf(dense, tmp_path / "model.gguf", "f32")
    assert "output.weight" not in {t.name for t in GGUFReader(tmp_path / "model.gguf").tensors}


# --- tokens, special tokens, templates ------------------------------------------------------------


@pytest.fixture
def extended(tmp_path):
    """A model of 310 rows whose tokenizer has 303 tokens, three of them added, and templates."""
    dense = tiny_llama(tmp_path / "dense", vocab_size=310)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True)})
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), "[tool]"])
    tokenizer.chat_template = {
        "default": "{{ bos_token }}{{ messages[0].content }}",
        "tool-use": "tools {{ messages[0].content }}",
    }
    tokenizer.save_pretrained(dense)
    return dense


def test_added_tokens_and_named_templates_come_back(extended, tmp_path):
    back = through_gguf(extended, tmp_path / "gguf")
    same_tokenizers(extended, back)
    tokenizer = AutoTokenizer.from_pretrained(back)
    ask = {"conversation": CHAT, "tokenize": False}
    assert tokenizer.apply_chat_template(**ask) == "<s>A river"
    assert tokenizer.apply_chat_template(**ask, chat_template="tool-use") == "tools A river"
    assert (tokenizer.pad_token_id, len(tokenizer)) == (300, 303)
    reader = GGUFReader(tmp_path / "gguf/model.gguf")
    templates = reader.fields["tokenizer.chat_templates"].contents()
    assert templates == ["tool-use"]


def test_a_list_of_templates_is_written_too(tmp_path):
    dense = tiny_llama(tmp_path / "dense")
    path = dense / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
    ]
    path.write_text(json.dumps(config))
    export_gguf(dense, tmp_path / "model.gguf", "f32")
    values = read_gguf(tmp_path / "model.gguf").values
    assert values["tokenizer.chat_template"] == "plain"
    assert values["tokenizer.chat_template.tool_use"] == "tools"


def test_tokens_beyond_the_rows_are_left_out(tmp_path):
    dense = tiny_llama(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(dense)
    back = through_gguf(dense, tmp_path / "gguf")
    values = read_gguf(tmp_path / "gguf/model.gguf").values
    assert "tokenizer.ggml.padding_token_id" not in values
    assert len(values["tokenizer.ggml.tokens"]) == 300
    torch.testing.assert_close(logits(back), logits(dense), rtol=0, atol=5e-5)
    assert AutoTokenizer.from_pretrained(back).pad_token is None


@pytest.mark.parametrize("how", ["bos", "eos"])
def test_what_goes_with_each_text_comes_back(tmp_path, how):
    dense = tiny_llama(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(dense, **{f"add_{how}_token": True})
    tokenizer.save_pretrained(dense)
    ids = AutoTokenizer.from_pretrained(dense)("a").input_ids
    assert (ids[0] == 0, ids[-1] == 1) == (how == "bos", how == "eos")
    same_tokenizers(dense, through_gguf(dense, tmp_path / "gguf"))


@pytest.mark.parametrize("how", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_take_their_neighbours_are_refused(tmp_path, how):
    dense = tiny_llama(tmp_path / "dense", vocab_size=310)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.add_tokens([AddedToken("<think>", **{how: True})])
    tokenizer.save_pretrained(dense)
    with pytest.raises(A3Error, match=f"its token '<think>' is read with {how}"):
        export_gguf(dense, tmp_path / "model.gguf", "f32")


# --- files that others wrote ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A file of a tiny Llama as llama.cpp's own script writes it; its folder."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_gguf(folder, "llama")
    return folder


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_read_exactly(tmp_path, arch):
    path = tiny_gguf(tmp_path, arch)
    run("model", path, "-o", tmp_path / "back")
    torch.testing.assert_close(logits(tmp_path / "back"), logits(tmp_path / "hf"), rtol=0, atol=0)
    same_tokenizers(tmp_path / "hf", tmp_path / "back")


def rope_of(plain, tmp_path, keys, tensors=None):
    """RoPE of the plain file with other keys and tensors."""
    path = changed(plain / "model.gguf", tmp_path / "model.gguf", keys, tensors)
    return config_of(read_gguf(path)).rope_parameters


FACTORS = np.linspace(1, 4, 8, dtype=np.float32)
TYPE, FACTOR = "llama.rope.scaling.type", "llama.rope.scaling.factor"
# Each was compared with the real llama.cpp: tests/runtimes.
ROPES = {
    "freqs": ({}, {"rope_freqs.weight": FACTORS}, {"short_factor": FACTORS.tolist()}),
    "ones": ({}, {"rope_freqs.weight": np.ones(8, np.float32)}, {"rope_type": "default"}),
    "linear": ({TYPE: "linear", FACTOR: 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
    "no type": ({FACTOR: 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
    "old": ({"llama.rope.scale_linear": 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
    "none": ({TYPE: "none", FACTOR: 4.0}, {}, {"rope_type": "default"}),
    "both": (
        {FACTOR: 2.0},
        {"rope_freqs.weight": FACTORS},
        {"short_factor": (2 * FACTORS).tolist()},
    ),
    "yarn": (
        {TYPE: "yarn", FACTOR: 4.0, "llama.rope.scaling.original_context_length": 128},
        {},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
    "attention": ({"llama.rope.scaling.attn_factor": 1.25}, {}, {"attention_factor": 1.25}),
    "longrope": (
        {TYPE: "longrope", "llama.rope.scaling.original_context_length": 256},
        {"rope_factors_short.weight": FACTORS, "rope_factors_long.weight": FACTORS + 1},
        {"long_factor": (FACTORS + 1).tolist(), "original_max_position_embeddings": 256},
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_is_read_as_llama_cpp_turns(plain, tmp_path, name):
    keys, tensors, expected = ROPES[name]
    found = rope_of(plain, tmp_path, keys, tensors)
    assert {key: found[key] for key in expected} == expected


def test_biases_of_some_projections_are_read(plain, tmp_path):
    bias = np.linspace(-1, 1, 64, dtype=np.float32)
    tensors = {"blk.1.attn_q.bias": bias, "blk.0.ffn_down.bias": bias}
    run(
        "model",
        changed(plain / "model.gguf", tmp_path / "x.gguf", {}, tensors),
        "-o",
        tmp_path / "x",
    )
    found = load_file(tmp_path / "x/model.safetensors")
    turned = torch.tensor(bias).unflatten(0, (4, 8, 2)).transpose(1, 2).flatten()
    assert torch.equal(found["model.layers.1.self_attn.q_proj.bias"], turned)
    assert torch.equal(found["model.layers.0.mlp.down_proj.bias"], torch.tensor(bias))
    assert not found["model.layers.0.self_attn.q_proj.bias"].any()


def test_keys_that_may_be_missing_have_llama_cpps_defaults(plain, tmp_path):
    source = tiny_gguf(tmp_path, "llama", num_key_value_heads=4)
    lost = [f"llama.{name}" for name in ("attention.head_count_kv", "attention.key_length")]
    lost += ["llama.attention.value_length", "llama.rope.freq_base"]
    run("model", changed(source, tmp_path / "x.gguf", without=lost), "-o", tmp_path / "x")
    assert torch.equal(logits(tmp_path / "x"), logits(tmp_path / "hf"))


def test_the_name_mistral_makes_no_window(plain, tmp_path):
    path = changed(plain / "model.gguf", tmp_path / "x.gguf", {"general.name": "mistral"})
    assert config_of(read_gguf(path)).model_type == "llama"


MATRIX = np.zeros((2, 32), np.float32)
REFUSED = {
    "a tensor": ({}, {"blk.0.attn_q_norm.weight": MATRIX[0]}, (), "attn_q_norm.* no place"),
    "a scale": ({}, {"blk.0.attn_q.scale": MATRIX[0]}, (), r"blk.0.attn_q.scale has no place"),
    "experts": ({"llama.expert_count": 8}, {}, (), "llama.expert_count is 8"),
    "a window": ({"llama.attention.sliding_window": 64}, {}, (), "sliding_window is 64"),
    "a scale of logits": ({"llama.logit_scale": 0.5}, {}, (), "llama.logit_scale is 0.5"),
    "a scale of scores": ({"llama.attention.scale": 0.5}, {}, (), "attention.scale is 0.5"),
    "a part of a head": ({"llama.rope.dimension_count": 8}, {}, (), "dimension_count is 8"),
    "caps": ({"llama.attn_logit_softcapping": 50.0}, {}, (), "attn_logit_softcapping is 50"),
    "both ways": ({"llama.attention.causal": False}, {}, (), "attention.causal is False"),
    "layers that differ": (
        {"llama.attention.head_count": [4, 2]}, {}, (), r"head_count is \[4, 2\]",
    ),
    "RoPE": ({TYPE: "dynamic"}, {}, (), "rope.scaling.type is 'dynamic'"),
    "RoPE's parts": (
        {"llama.rope.scaling.yarn_log_multiplier": 0.1}, {}, (), "yarn_log_multiplier is 0.1",
    ),
    "factors of another size": ({}, {"rope_freqs.weight": MATRIX[0]}, (), r"shape \(32,\)"),
    "factors of no length": (
        {}, {"rope_factors_long.weight": FACTORS}, (), "'linear', with rope_factors_long",
    ),
    "an architecture": ({"general.architecture": "deci"}, {}, (), "architecture is 'deci'"),
    "an adapter": ({"general.type": "adapter"}, {}, (), "general.type is 'adapter'"),
    "no rules": ({}, {}, ("tokenizer.ggml.pre",), "tokenizer.ggml.pre is missing"),
    "other rules": ({"tokenizer.ggml.pre": "falcon"}, {}, (), "tokenizer.ggml.pre is 'falcon'"),
    "no vocabulary": ({"tokenizer.ggml.model": "rwkv"}, {}, (), "tokenizer.ggml.model is 'rwkv'"),
    "no padding": ({"tokenizer.ggml.padding_token_id": 300}, {}, (), "padding_token_id is 300"),
    "a missing tensor": ({}, {}, ("blk.1.ffn_up.weight",), "no tensor blk.1.ffn_up.weight"),
    "NaN": ({}, {"rope_freqs.weight": FACTORS * np.nan}, (), "rope_freqs.weight holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(plain, tmp_path, capsys, name):
    keys, tensors, without, said = REFUSED[name]
    path = changed(plain / "model.gguf", tmp_path / "x.gguf", keys, tensors, without)
    assert main(["model", str(path), "-o", str(tmp_path / "x")]) == 1
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_one_of_several_files_says_how_to_merge_them(plain, tmp_path, capsys, number):
    keys = {"split.count": 3, "split.no": number, "split.tensors.count": 20}
    lost = [f"blk.{1 - number}.{name}.weight" for name in ("attn_q", "ffn_up")]
    path = changed(plain / "model.gguf", tmp_path / "x.gguf", keys, without=lost)
    assert main(["model", str(path), "-o", str(tmp_path / "x")]) == 1
    said = capsys.readouterr().err
    assert f"file {number + 1} of 3 that hold one model" in said
    assert "llama-gguf-split --merge" in said


def test_upper_case_and_a_folder_with_a_file(plain, tmp_path, capsys):
    shutil.copy(plain / "model.gguf", tmp_path / "MODEL.GGUF")
    run("model", tmp_path / "MODEL.GGUF", "-o", tmp_path / "x")
    assert torch.equal(logits(tmp_path / "x"), logits(plain / "hf"))
    (tmp_path / "folder").mkdir()
    shutil.copy(plain / "model.gguf", tmp_path / "folder")
    assert main(["model", str(tmp_path / "folder"), "-o", str(tmp_path / "y")]) == 1
    assert f"Name a file: {tmp_path / 'folder/model.gguf'}" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_rules_of_words_come_back(plain, tmp_path, name):
    path = changed(plain / "model.gguf", tmp_path / "x.gguf", {"tokenizer.ggml.pre": name})
    tokenizer_of(read_gguf(path)).save_pretrained(tmp_path / "x")
    written = next((first for first, others in SAME.items() if name in others), name)
    shutil.copy(plain / "hf/config.json", tmp_path / "x")
    shutil.copy(plain / "hf/model.safetensors", tmp_path / "x")
    export_gguf(tmp_path / "x", tmp_path / "y.gguf", "f32")
    assert read_gguf(tmp_path / "y.gguf").values["tokenizer.ggml.pre"] == written


def test_digits_are_cut_as_smollms_file_says(plain, tmp_path):
    path = changed(plain / "model.gguf", tmp_path / "x.gguf", {"tokenizer.ggml.pre": "smollm"})
    cut = tokenizer_of(read_gguf(path)).backend_tokenizer.pre_tokenizer
    words = [word for word, _ in cut.pre_tokenize_str("in  1969")]
    assert words == ["in", "ĠĠ", "1", "9", "6", "9"]
    assert RULES["smollm"].steps[0] == "single digits"


def sentencepiece(plain, out, **more):
    """The plain file with SentencePiece."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a"]
    tokens += [f"x{i}" for i in range(300 - len(tokens))]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(300)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 41,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": True,
    }
    lost = [f"tokenizer.ggml.{name}" for name in ("merges", "add_bos_token", "padding_token_id")]
    return changed(plain / "model.gguf", out, keys | more, without=lost)


@pytest.mark.parametrize("spaced", [True, False])
def test_sentencepiece_is_read_from_the_file_alone(plain, tmp_path, spaced):
    # Another tokenizer beside the file, which transformers would take.
    shutil.copy(plain / "hf/tokenizer.json", tmp_path)
    more = {"tokenizer.ggml.add_space_prefix": spaced}
    path = sentencepiece(plain, tmp_path / "x.gguf", **more)
    run("model", path, "-o", tmp_path / "x")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x")
    one, two = ["▁a"], ["▁", "▁a"]
    for text, expected in (("a", one if spaced else ["a"]), (" a", two if spaced else one)):
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *expected]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


# --- keys of another kind -------------------------------------------------------------------------

ALL_KEYS = {
    "general.type": "model",
    "general.name": "a name",
    "general.tags": ["a tag"],
    "general.file_type": 0,
    "general.quantization_version": 2,
    "general.alignment": 32,
    "split.count": 1,
    "split.no": 0,
    TYPE: "yarn",
    FACTOR: 4.0,
    "llama.rope.scale_linear": 4.0,
    "llama.rope.freq_base": 1e4,
    "llama.rope.scaling.attn_factor": 1.25,
    "llama.rope.scaling.original_context_length": 128,
    "llama.rope.scaling.finetuned": True,
    "llama.rope.scaling.yarn_beta_fast": 32.0,
    "llama.rope.dimension_count": 16,
    "llama.attention.key_length": 16,
    "llama.attention.value_length": 16,
    "llama.attention.causal": True,
    "llama.attention.scale": 0.25,
    "llama.attention.sliding_window": 512,
    "llama.expert_count": 0,
    "llama.vocab_size": 300,
    "llama.nextn_predict_layers": 0,
    "llama.tensor_data_layout": "as it is",
    "tokenizer.ggml.eot_token_id": 1,
    "tokenizer.chat_template": "plain",
    "tokenizer.chat_template.tools": "tools",
    "tokenizer.chat_templates": ["tools"],
    "tokenizer.ggml.unknown_token_id": 0,
}
OTHER_VALUES = (
    *("x", True, [1], ["x"], [0.5], 0, -1, -(2**31), 2**40, 0.0, -4.0, 0.5),
    *(float("nan"), float("inf"), float("-inf")),
)
# 0 is a token's number, or says that there is no such thing.
MAY_BE_ZERO = ("_token_id", "split.count", "split.no", "scaling.factor", "scale_linear")
MAY_BE_ZERO += ("final_logit_softcapping", "sliding_window")


def another_kind(key, good):
    """Values that a key cannot have, or that say the same."""
    if type(good) is int:
        yield float(good)
    for value in OTHER_VALUES:
        text_or_bool = type(value) is type(good) and isinstance(value, str | bool)
        text_list = value == ["x"] and key == "tokenizer.chat_templates"
        number = isinstance(value, int | float) and isinstance(good, int | float)
        zero = number and value == 0 and key.endswith(MAY_BE_ZERO)
        # Another number of the same kind.
        large = type(good) is float and value == 2**40
        half = type(good) is float and value == 0.5
        if not (text_or_bool or text_list or zero or large or half):
            yield value


def seen(file):
    """All that the header says of a model."""
    require_whole_model(file)
    file.of_file("general.alignment")
    config, tokenizer = config_of(file).to_dict(), tokenizer_of(file)
    own = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    return json.dumps([config, *own, tokenizer.special_tokens_map], sort_keys=True)


def same(key, value, expected, read):
    """Whether a value changes nothing; fails unless it does, or is refused by its key's name."""
    try:
        assert read() == expected, (key, value)
    except A3Error as error:
        assert key in str(error), (key, value, error)  # noqa: PT017
        return False
    return True


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def full(request, plain, tmp_path_factory):
    """A file that has every key that is read, and what it says."""
    path = tmp_path_factory.mktemp(request.param) / "model.gguf"
    if request.param == "bytes":
        changed(plain / "model.gguf", path, ALL_KEYS)
    else:
        sentencepiece(plain, path, **ALL_KEYS)
    return path, seen(read_gguf(path))


def test_no_key_is_taken_with_a_value_of_another_kind(full, tmp_path):
    path, expected = full
    file = read_gguf(path)
    # What is no fault in the header alone, read from files: one value of each key at a time.
    files = [{} for _ in OTHER_VALUES]
    for key, good in file.values.items():
        harmless = (
            value
            for value in another_kind(key, good)
            if same(key, value, expected, lambda v=value, k=key: seen(replaced(file, k, v)))
        )
        for values, value in zip(files, harmless, strict=False):
            values[key] = value
    for values in filter(None, files):
        out = changed(path, tmp_path / "model.gguf", values)
        assert seen(read_gguf(out)) == expected, values


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_key_of_an_architecture_is_taken_with_another_kind(tmp_path, arch):
    file = read_gguf(tiny_gguf(tmp_path, arch))
    expected = config_of(file).to_dict()
    for key, good in file.values.items():
        for value in another_kind(key, good) if key.startswith(f"{arch}.") else ():
            other = replaced(file, key, value)
            same(key, value, expected, lambda other=other: config_of(other).to_dict())


def replaced(file, key, value):
    """A header with another value."""
    return replace(file, values=file.values | {key: value})


@pytest.mark.parametrize("name", ["output_norm.bias", "output.bias", "blk.bias", "blk.0.bias"])
def test_biases_that_are_of_no_layer_are_refused(plain, tmp_path, capsys, name):
    path = changed(plain / "model.gguf", tmp_path / "x.gguf", {}, {name: MATRIX[0]})
    assert main(["model", str(path), "-o", str(tmp_path / "x")]) == 1
    assert f"{name} has no place" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tool/use", "../x", "", ".x", "a\nb", "a\\b", "x" * 300])
def test_templates_whose_names_are_no_files_are_refused(plain, tmp_path, capsys, name):
    keys = {f"tokenizer.chat_template.{name}": "tools"}
    path = changed(plain / "model.gguf", tmp_path / "x.gguf", keys)
    assert main(["model", str(path), "-o", str(tmp_path / "x")]) == 1
    assert f"the chat template {name!r} cannot be" in capsys.readouterr().err
    dense = shutil.copytree(plain / "hf", tmp_path / "dense")
    (dense / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((dense / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "plain"},
        {"name": name, "template": "tools"},
    ]
    (dense / "tokenizer_config.json").write_text(json.dumps(config))
    out = tmp_path / "out.gguf"
    assert main(["export", "gguf", str(dense), "-o", str(out)]) == 1
    assert f"the chat template {name!r} cannot be" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "templates", [3, {"a": 3}, [{"name": 3, "template": "x"}], [{"name": "default", "template": 3}]]
)
def test_templates_that_are_no_text_are_refused(plain, tmp_path, capsys, templates):
    dense = shutil.copytree(plain / "hf", tmp_path / "dense")
    path = dense / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    assert main(["export", "gguf", str(dense), "-o", str(tmp_path / "out.gguf")]) == 1
    assert "chat_template is" in capsys.readouterr().err


SHORT_LONG = {f"rope_factors_{name}.weight": FACTORS for name in ("short", "long")}
NO_VALUES = {
    "factor": ({FACTOR: float("nan")}, {}, "llama.rope.scaling.factor is nan"),
    "a factor of text": ({FACTOR: "4"}, {}, "llama.rope.scaling.factor is '4'"),
    "attention": ({"llama.rope.scaling.attn_factor": 0.0}, {}, "attn_factor is 0.0"),
    "base": ({"llama.rope.freq_base": -1.0}, {}, "llama.rope.freq_base is -1.0"),
    "YaRN": ({TYPE: "yarn", FACTOR: -4.0}, {}, "llama.rope.scaling.factor is -4.0"),
    "YaRN's length": (
        {TYPE: "yarn", "llama.rope.scaling.original_context_length": 0}, {},
        "original_context_length is 0",
    ),
    "LongRoPE's length": (
        {TYPE: "longrope", "llama.rope.scaling.original_context_length": 0}, SHORT_LONG,
        "original_context_length is 0",
    ),
    "epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": float("inf")}, {}, "rms_epsilon is inf",
    ),
    "a length of 64 bits": ({"llama.context_length": 2**40}, {}, "context_length is 1099"),
    "heads": ({"llama.attention.head_count": 4.0}, {}, "head_count is 4.0, expected a whole"),
    "a template": ({"tokenizer.chat_template": 3}, {}, "chat_template is 3, expected text"),
    "templates": ({"tokenizer.chat_templates": "x"}, {}, "'x', expected a list of text"),
    "BOS": ({"tokenizer.ggml.add_bos_token": "yes"}, {}, "'yes', expected true or false"),
    "a token": ({"tokenizer.ggml.bos_token_id": 0.0}, {}, "bos_token_id is 0.0"),
    "a huge token": ({"tokenizer.ggml.eos_token_id": 2**40}, {}, "eos_token_id is 10995116"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_VALUES)
def test_values_that_are_none_leave_no_folder(plain, tmp_path, capsys, name):
    keys, tensors, said = NO_VALUES[name]
    path = changed(plain / "model.gguf", tmp_path / "x.gguf", keys, tensors)
    assert main(["model", str(path), "-o", str(tmp_path / "x")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_parts_of_a_head_and_experts_are_as_many_as_there_are(tmp_path):
    for arch, key, value in (
        ("phi3", "rope.dimension_count", 18),
        ("phi3", "rope.dimension_count", 7),
        ("qwen3moe", "expert_used_count", 5),
    ):
        folder = tmp_path / f"{arch}{value}"
        folder.mkdir()
        file = read_gguf(tiny_gguf(folder, arch))
        with pytest.raises(A3Error, match=f"{arch}.{key} is {value}"):
            config_of(replaced(file, f"{arch}.{key}", value))


def test_each_token_has_a_row(plain):
    file = read_gguf(plain / "model.gguf")
    tokens = [*file.values["tokenizer.ggml.tokens"], "more"]
    with pytest.raises(A3Error, match=r"ggml\.tokens has 301, and token_embd.weight 300 rows"):
        config_of(replaced(file, "tokenizer.ggml.tokens", tokens))


def test_a_folder_is_a_folder_whatever_its_name(plain, tmp_path, capsys):
    folder = shutil.copytree(plain / "hf", tmp_path / "x.gguf")
    run("model", folder, "-o", tmp_path / "x")
    assert torch.equal(logits(tmp_path / "x"), logits(folder))
    (tmp_path / "empty.gguf").mkdir()
    assert main(["model", str(tmp_path / "empty.gguf"), "-o", str(tmp_path / "y")]) == 1
    assert "no config.json" in capsys.readouterr().err
    inner = tmp_path / "outer/in.gguf"
    inner.mkdir(parents=True)
    assert main(["model", str(tmp_path / "outer"), "-o", str(tmp_path / "y")]) == 1
    assert "Hugging Face's layout" in capsys.readouterr().err


# --- what llama.cpp's quantised caches need -------------------------------------------------------


@pytest.mark.parametrize(("size", "safe"), [(64, True), (96, True), (48, False), (80, False)])
def test_which_caches_are_safe_is_said(tmp_path, caplog, size, safe):
    tiny_llama(tmp_path / "m", head_dim=size)
    with caplog.at_level("INFO", "a3"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32")
    assert ("NaN" not in caplog.text) == safe
    assert llama_cpp_cache(size) in inspect(tmp_path / "m")
    assert llama_cpp_cache(size).startswith("every type" if safe else "keys in f32, f16 or bf16")
