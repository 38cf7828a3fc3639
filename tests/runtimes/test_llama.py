"""The exports of SmolLM2 in the runtimes that they are for: transformers without a3, llama.cpp.

The round trip: dense → compressed (a3) → ordinary checkpoint → GGUF, logits compared at each step.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from asking import CONVERTERS, answers_of, ask, converted, texts_of
from smollm2 import MODEL, a3_, continued, logits_of, perplexity, row, scored
from transformers import AutoModelForCausalLM, AutoTokenizer

import a3  # noqa: F401
from a3.core.files import read_record

RANK = 48
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
# Digits, contractions, white space, other scripts, a special token.
TEXT = "It's 1969:  600 million\n\n\tviewers… 月 café 🚀 x=3.14 <|im_end|>\n"


@pytest.fixture(scope="session")
def folder(sources, tmp_path_factory):
    """`small` compressed, `stock` exported of it, and GGUF files of it and of the dense model."""
    folder = tmp_path_factory.mktemp("runtimes")
    kinds = ("q_blocks", "k_blocks", "pair_gradient", "v_blocks", "down_diagonal")
    outputs = [folder / f"rxx/{kind}.safetensors" for kind in kinds]
    cut = ["--tokens", "2048", "--block-length", "512"]
    a3_("collect", MODEL, "--text", sources[0], *cut, "-o", *outputs)
    modes = ["--qk", f"uniform-global@{RANK}", "--ov", f"xkv@{RANK}", "--mlp", "rxx-w@1408"]
    a3_("approx", MODEL, "--rxx", folder / "rxx", *modes, "-o", folder / "small")
    a3_("export", "hf", folder / "small", "-o", folder / "stock")
    for kind in ("f32", "f16", "q8_0"):
        a3_("export", "gguf", folder / "small", "--type", kind, "-o", folder / f"{kind}.gguf")
    a3_("export", "gguf", MODEL, "--type", "f32", "-o", folder / "dense.gguf")
    # Whole heads, so that RoPE is the dense model's, and the head size is hidden size / heads.
    whole = ["--qk", "dense", "--ov", "dense", "--mlp", "rxx-w@1152"]
    a3_("approx", MODEL, "--rxx", folder / "rxx", *whole, "-o", folder / "whole-small")
    a3_("export", "hf", folder / "whole-small", "-o", folder / "whole")
    return folder


@pytest.fixture(scope="session")
def block():
    """512 tokens of the test text."""
    return scored(512)


@pytest.fixture(scope="session")
def logits(folder, block):
    """Logits (512, vocabulary) by transformers, of each folder."""

    folders = {"dense": MODEL, "small": folder / "small", "stock": folder / "stock"}
    folders["whole"] = folder / "whole"
    return {name: logits_of(path, block[0].tolist()) for name, path in folders.items()}


@pytest.fixture(scope="session")
def llama(folder, block):
    """What llama.cpp answers, by the name of the file."""
    asked = {"tokens": block[0].tolist(), "texts": [TEXT], "messages": CHAT}
    # A cache of float32, so that only the arithmetic differs, and llama.cpp's own of float16.
    asked["caches"] = ["f32", "f16"]
    return {name: ask(folder / f"{name}.gguf", asked) for name in ("dense", "f32", "f16", "q8_0")}


def compare(name, found, expected, block):
    """Largest difference, share of equal argmaxes; printed with both perplexities."""
    worst = np.abs(found - expected).max()
    same = (found.argmax(-1) == expected.argmax(-1)).mean()
    print(
        f"{name}: largest logit difference {worst:.2g} of a range of "
        f"{np.ptp(expected):.3g}, equal argmaxes {same:.4f}, perplexity "
        f"{perplexity(found, block):.4f} and {perplexity(expected, block):.4f}"
    )
    return worst, same


def test_the_ordinary_checkpoint_has_the_logits_of_the_compressed_one(logits, block):
    worst, same = compare("a3 to hf", logits["stock"], logits["small"], block)
    assert worst < 1e-3
    assert same == 1
    assert np.abs(logits["small"] - logits["dense"]).max() > 1


@pytest.mark.parametrize(("name", "of"), [("dense", "dense"), ("f32", "stock")])
def test_llama_cpp_has_the_logits_of_transformers(llama, logits, block, name, of):
    found, expected = llama[name]["logits_f32"], logits[of]
    worst, same = compare(f"hf to gguf, {name}, cache f32", found, expected, block)
    assert worst < 0.02
    assert same > 0.995
    assert perplexity(found, block) == pytest.approx(perplexity(expected, block), rel=1e-4)
    worst, same = compare(
        f"hf to gguf, {name}, cache f16", llama[name]["logits_f16"], expected, block
    )
    assert worst < 0.2


@pytest.mark.parametrize(("name", "far", "equal"), [("f16", 0.2, 0.98), ("q8_0", 4.0, 0.9)])
def test_smaller_types_are_near(llama, logits, block, name, far, equal):
    found = llama[name]["logits_f16"]
    worst, same = compare(f"hf to gguf, {name}", found, logits["stock"], block)
    assert worst < far
    assert same > equal
    assert perplexity(found, block) == pytest.approx(perplexity(logits["stock"], block), rel=0.02)


def test_wrong_frequencies_would_be_seen(llama, logits, block):
    """The dense model's logits are not those of the compressed one, by as much as this."""
    worst, same = compare("dense to small", llama["f32"]["logits_f32"], logits["dense"], block)
    assert worst > 1
    assert same < 0.95


def test_llama_cpps_kv_cache_shrank(llama, folder, block):
    size = read_record(folder / "small/approx.json")["size"]
    expected = size["compressed"]["kv_bytes_per_token"] / size["dense"]["kv_bytes_per_token"]
    for kind in ("f32", "f16"):
        found, dense = (int(llama[name][f"cache_{kind}"]) for name in ("f32", "dense"))
        print(f"KV cache {kind} of {block.numel()} tokens: {found:,} of {dense:,} bytes")
        assert found / dense == pytest.approx(expected, abs=0.01)
    assert expected == RANK / 64


def test_text_becomes_the_same_tokens(llama):
    ids = AutoTokenizer.from_pretrained(MODEL)(TEXT).input_ids
    assert texts_of(llama["f32"]["ids"]) == [ids]


def test_it_answers_in_a_chat(llama, folder):
    for name in ("dense", "f32", "f16", "q8_0"):
        print(f"llama.cpp, {name}: {llama[name]['reply']}")
    tokenizer = AutoTokenizer.from_pretrained(folder / "stock")
    prompt = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "stock", dtype=torch.float32)
    made = model.generate(**prompt, max_new_tokens=24, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    reply = tokenizer.decode(made, skip_special_tokens=True)
    print(f"transformers: {reply}")
    assert str(llama["f32"]["reply"]).strip() == reply.strip()


NAMES = {
    "stock": f"SmolLM2-135M, head size {RANK}, longrope, Hugging Face f32",
    "whole": "SmolLM2-135M, whole heads, MLP 1152, Hugging Face f32",
}


@pytest.mark.parametrize(
    ("runtime", "name"),
    [
        ("mlx", "stock"),
        ("openvino", "stock"),
        ("vllm", "stock"),
        ("vllm", "whole"),
        ("ctranslate2", "whole"),
        ("genai", "whole"),
    ],
)
def test_other_runtimes_have_the_logits_of_transformers(
    folder, logits, block, tmp_path, record_property, runtime, name
):
    source = folder / name
    if runtime in CONVERTERS:
        source = tmp_path / "converted"
        done = converted(runtime, folder / name, source)
        assert done.returncode == 0, done.stderr[-3000:]
    asked = {"tokens": block[0].tolist(), "prompt": 48, "greedy": 40}
    found = answers_of(runtime, source, asked, tmp_path)
    expected = continued(folder / name, block, 48, 40)
    record_property("measured", row(NAMES[name], found, logits[name], block, expected))
    worst, same = compare(f"hf in {found['version']}", found["logits"], logits[name], block)
    assert worst < 0.02
    assert same > 0.995
    assert found["in_two"] < 0.02
    assert found["greedy"].tolist() == expected


def test_ctranslate2_refuses_longrope(folder, tmp_path):
    done = converted("ctranslate2", folder / "stock", tmp_path / "converted")
    assert done.returncode != 0
    assert "rotary_scaling_long_factor" in done.stderr


def test_transformers_loads_it_where_there_is_no_a3(folder, logits, block):
    code = (
        "import sys, numpy, torch\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'a3': raise ImportError('a3 is not here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "ids = torch.tensor([list(map(int, sys.argv[2].split()))])\n"
        "with torch.inference_mode(): numpy.save(sys.argv[3], model(ids).logits[0].numpy())\n"
        "assert 'a3' not in sys.modules"
    )
    ids = " ".join(map(str, block[0].tolist()))
    out = folder / "alone.npy"
    command = [sys.executable, "-I", "-c", code, str(folder / "stock"), ids, str(out)]
    subprocess.run(command, check=True)
    np.testing.assert_allclose(np.load(out), logits["stock"], atol=1e-4)
