"""GGUF files of other programs, and a3's own, in the real llama.cpp and read by a3: the same."""

import json
import random
import re
import unicodedata

import numpy as np
import pytest
import torch
from asking import ask, texts_of
from gguf_files import ARCHITECTURES, changed, tiny_gguf
from test_gguf import EXPORTS, ROPES, TYPE
from tiny import run, tiny_llama, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

import a3  # noqa: F401
from a3.models.gguf import read_gguf
from a3.models.gguf_rules import NAMES
from a3.stages.export.gguf import export_gguf
from a3.stages.inputs.gguf_tokenizer import tokenizer_of

TOKENS = list(range(5, 65))
# Their GELU is a table of float16.
ROUGH = ("gemma2", "gemma3", "gpt2", "bloom")
TEXTS = [
    "It's 1969:  600 million\n\n\tviewers… 月 café 🚀 x=3.14\n",
    "I'LL we'Ve DON'T can't 'S s's '' it'd   1234567 12 3 12345 ٣٤٥ ½ ² Ⅷ 1,234.56",
    "foo_bar(x)[0]->y; a/b\\c // comment\r\n\r\n  if(x){}\n\n\n \n \n \r\n",
    "你好，世界。今天天气很好！日本語のテキスト、カタカナ。한국어 텍스트입니다",
    "नमस्ते दुनिया สวัสดีชาวโลก Привет, Мир! ПРИВЕТ عربي، نص؟ ۔ فارسی",
    "HelloWorld camelCase XMLHttpRequest !!! ... --- === $$$ ^^^ ``` ☃❄ ©®™",
    "a  b   c    d     e a\u0301e\u0301 ﬁ ǅ ʰ x\u00a0y\u2003z\u3000w H₂O e=mc^2 <a href='b'>",
    "   leading and trailing   ",
]


@torch.inference_mode()
def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([TOKENS])).logits[0].numpy()


def in_llama(path, size=512):
    """Logits by llama.cpp, its cache float32."""
    asked = {"tokens": TOKENS, "caches": ["f32"], "texts": [], "size": size}
    return ask(path, asked)["logits_f32"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_llama_cpps(tmp_path, arch):
    path = tiny_gguf(tmp_path, arch)
    run("model", path, "-o", tmp_path / "back")
    worst = np.abs(in_llama(path) - logits(tmp_path / "back")).max()
    print(f"{arch}: largest difference {worst:.2g}")
    assert worst < (5e-3 if arch in ROUGH else 2e-5)


@pytest.mark.parametrize("name", ROPES)
def test_rope_is_llama_cpps(tmp_path, name):
    keys, tensors, _ = ROPES[name]
    path = changed(tiny_gguf(tmp_path, "llama"), tmp_path / "x.gguf", keys, tensors)
    run("model", path, "-o", tmp_path / "back")
    # llama.cpp chooses the list of factors by the size of its cache, transformers by the text's.
    size = 256 if keys.get(TYPE) == "longrope" else 512
    worst = np.abs(in_llama(path, size) - logits(tmp_path / "back")).max()
    print(f"{name}: largest difference {worst:.2g}")
    assert worst < 2e-5


@pytest.mark.parametrize("name", EXPORTS)
def test_every_export_is_llama_cpps(tmp_path, name):
    family, config = EXPORTS[name]
    tiny_model(tmp_path / "dense", family, **config)
    export_gguf(tmp_path / "dense", tmp_path / "x.gguf", "f32")
    worst = np.abs(in_llama(tmp_path / "x.gguf") - logits(tmp_path / "dense")).max()
    print(f"{name}: largest difference {worst:.2g}")
    assert worst < 2e-5


# --- tokens ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    """Texts of many scripts, and random mixtures of their pieces."""
    draw, pieces = random.Random(0), re.findall(r"\s+|\w+|[^\w\s]", "".join(TEXTS))
    return TEXTS + ["".join(draw.choices(pieces, k=draw.randint(2, 14))) for _ in range(1500)]


@pytest.fixture(scope="module")
def base(tmp_path_factory, texts):
    """A file whose merges go across words, so that each place where rules cut is seen."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 3000, "max_token_length": 12, "show_progress": False}
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator(texts * 2, trainer)
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    source = tiny_gguf(folder, "llama", vocab_size=len(tokens), num_hidden_layers=1)
    keys = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["merges"]],
    }
    return changed(source, folder / "base.gguf", keys)


@pytest.mark.parametrize("name", NAMES)
def test_rules_of_words_are_llama_cpps(base, texts, tmp_path, name):
    """But where llama.cpp's are not those of tokenizer.json, which a3 takes."""
    path = changed(base, tmp_path / "x.gguf", {"tokenizer.ggml.pre": name})
    tokenizer = tokenizer_of(read_gguf(path))
    asked = {"tokens": [], "caches": [], "texts": texts, "surround": True}
    found = texts_of(ask(path, asked)["ids"])
    other = [
        text for text, ids in zip(texts, found, strict=True) if ids != tokenizer(text).input_ids
    ]
    if NAMES[name].composed:
        other = [text for text in other if not any(map(is_mark, text))]
    if NAMES[name] in (NAMES["tekken"], NAMES["gpt-4o"]):
        other = list(filter(str.isascii, other))
    assert other == []


def is_mark(character):
    """Whether a character is put on the one before."""
    return unicodedata.category(character).startswith("M")


@pytest.mark.parametrize("spaced", [True, False])
def test_sentencepiece_is_llama_cpps(texts, tmp_path, spaced):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    options = {"vocab_size": 1200, "max_token_length": 8, "show_progress": False}
    tokenizer.train_from_iterator(
        texts[:500], trainers.BpeTrainer(special_tokens=special, **options)
    )
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    more = len(tokens) - len(special)
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(special) + [-float(i) for i in range(more)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * more,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": spaced,
    }
    lost = ["merges", "add_bos_token", "add_eos_token", "padding_token_id"]
    source = tiny_gguf(tmp_path, "llama", vocab_size=len(tokens), num_hidden_layers=1)
    path = changed(
        source, tmp_path / "x.gguf", keys, without=[f"tokenizer.ggml.{name}" for name in lost]
    )
    read = tokenizer_of(read_gguf(path))
    asked = {"tokens": [], "caches": [], "texts": texts, "surround": True}
    assert texts_of(ask(path, asked)["ids"]) == [read(text).input_ids for text in texts]


# --- quantised caches -----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "what"), [(32, "right"), (64, "right"), (48, "NaN"), (40, "end")])
def test_quantised_keys_need_heads_of_whole_blocks(tmp_path, size, what):
    """What `a3 export gguf`, `inspect` and the card warn of; flash attention is off."""
    tiny_llama(tmp_path / "m", head_dim=size)
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32")
    asked = {"tokens": TOKENS, "texts": [], "caches": ["f32", "f16", "bf16"]}
    safe = ask(tmp_path / "m.gguf", asked)
    for kind in ("f16", "bf16"):
        assert np.abs(safe[f"logits_{kind}"] - safe["logits_f32"]).max() < 0.02
    answer = ask(tmp_path / "m.gguf", asked | {"caches": ["q8_0"]})
    assert (answer is None) == (what == "end")
    if answer is not None:
        assert np.isnan(answer["logits_q8_0"]).any() == (what == "NaN")
    if what == "right":
        assert np.abs(answer["logits_q8_0"] - safe["logits_f32"]).max() < 0.1
