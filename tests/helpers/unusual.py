"""Valid inputs that users seldom have: configs × tokenizers × texts × GGUF headers, from a seed.

At ratio 0 the compressed model equals the dense one, token for token and logit for logit, or the
input is refused by name before anything is written. Anything else is a fault: another exception,
other token ids, other logits, another chat prompt, another text under the same file.
`benchmarks/unusual.py` runs thousands of cases, the tests a few.
"""

import csv
import gzip
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from safetensors.torch import load_file, save_file
from tiny import SIZES
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from a3.cli.main import main
from a3.core.errors import A3Error
from a3.texts.reading import load_documents

WORDS = [
    *("river", "ocean", "lake", "moon", "1969", "12345", "x=1", "don't", "", "two\tthree", "🙂"),
    *("naïve", "É", "e\u0301", "東京", "Москва", "שלום"),
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROBE = "In 1969 don't 12345 worry: x=1\n\n  naïve 東京 🙂 <think> </s> ok . ,"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ bos_token }}"
MESSAGES = [{"role": "user", "content": "What is 1969?"}]
CLASSES = (
    None,
    "PreTrainedTokenizerFast",
    "PreTrainedTokenizer",
    "TokenizersBackend",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "GPTNeoXTokenizerFast",
    "CodeGenTokenizer",
    "CohereTokenizerFast",
    "GemmaTokenizer",
    "BloomTokenizerFast",
)
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 24}),
    ("mistral", {}),
    ("ministral", {"head_dim": 16}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
    ("phi3", {}),
    ("gemma2", {"head_dim": 16}),
    ("gemma3_text", {"head_dim": 16}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
    ("olmo", {}),
    ("olmo2", {}),
    ("cohere", {}),
    ("cohere2", {}),
    ("stablelm", {}),
    ("glm", {"head_dim": 16}),
    ("glm4", {"head_dim": 16}),
    ("phi", {}),
    ("gpt_neox", {}),
    ("gptj", {"rotary_dim": 8, "n_inner": 96}),
    ("gpt2", {"n_inner": 96}),
    ("gpt_bigcode", {"n_inner": 96}),
    ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
    ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    ("bloom", {}),
    ("falcon", {"multi_query": True}),
    ("falcon", GROUPED),
    ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 16},
    ),
)
# What configs of users say besides; each family obeys some of it, and ignores the rest.
KEYS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"partial_rotary_factor": 0.5},
    {"rope_theta": 5e5},
    {"tie_word_embeddings": True},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
    {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1},
    {"num_attention_heads": 2},
    {"sliding_window": 16},
    {"use_sliding_window": True, "sliding_window": 16},
    {"rotary_pct": 0.5},
    {"output_attentions": True},
    {"use_cache": False},
    {"torch_dtype": "bfloat16"},
    {"_attn_implementation": "eager"},
    {"attn_implementation": "eager"},
    {"attention_dropout": 0.1},
    {"hidden_act": "gelu"},
    {"pretraining_tp": 2},
    {"initializer_range": 1.0},
    {"return_dict": False},
    {"architectures": None},
    {"max_position_embeddings": 128},
    {"pad_token_id": None},
    {"eos_token_id": [1, 0]},
    {"unheard_of": {"a": 1}},
    {"attention_bias": True},
    {"use_parallel_residual": False},
    {"num_hidden_layers": 1},
    {"layer_types": ["full_attention", "full_attention"]},
    {"final_logit_softcapping": 30.0},
    {"logit_scale": 0.5},
    {"head_dim": 20},
    {"parallel_attn": False},
)


@dataclass
class Outcome:
    """How many inputs were equal and refused; the reasons of refusals; every fault in words."""

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class RefusedError(Exception):
    """a3 refused the input with exit status 1, and this message."""


class FaultError(Exception):
    """What a3 made of an input is wrong."""


# --- tokenizers ---


def byte_level(split: Any) -> Tokenizer:
    """Byte-level BPE whose words are cut by `split`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace(model: Any) -> Tokenizer:
    """As SentencePiece's: spaces become ▁."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def bytes_of(words: bool, prefix: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=words)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: byte_level(bytes_of(True)),
    "gpt2, space first": lambda: byte_level(bytes_of(True, True)),
    "single digits": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of(True)])
    ),
    "llama3": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), bytes_of(False)])
    ),
    "metaspace": lambda: metaspace(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    ),
    "unigram": lambda: metaspace(models.Unigram()),
}


def save_tokenizer(folder: Path, draw: random.Random, size: int) -> None:
    """A tokenizer of a drawn kind, class, extra tokens and chat templates, in `folder`."""
    tokenizer = KINDS[draw.choice(list(KINDS))]()
    special = ["<s>", "</s>", "<unk>"]
    options = {"vocab_size": size, "special_tokens": special, "show_progress": False}
    if isinstance(tokenizer.model, models.Unigram):
        trainer: Any = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet() if tokenizer.pre_tokenizer else []
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, min_frequency=1, **options)
    tokenizer.train_from_iterator([" ".join(WORDS), PROBE] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=draw.choice(["</s>", "<unk>"]),
        padding_side=draw.choice(["left", "right"]),
        model_max_length=draw.choice([512, 10**30]),
        clean_up_tokenization_spaces=draw.choice([False, True]),
    )
    if draw.random() < 0.3 and len(fast) < size - 1:
        fast.add_tokens(["<think>"], special_tokens=draw.random() < 0.5)
    fast.chat_template = draw.choice([None, CHAT, {"default": CHAT, "tool_use": CHAT + "!"}])
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text())
    said.pop("tokenizer_class", None)
    if name := draw.choice(CLASSES):
        said["tokenizer_class"] = name
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"):
        if draw.random() < 0.1:
            said[key] = draw.random() < 0.5
    path.write_text(json.dumps(said))


# --- models ---


def save_model(folder: Path, draw: random.Random) -> None:
    """A model of a drawn family, keys and storage in `folder`, as transformers reads it."""
    family, own = draw.choice(FAMILIES)
    keys: dict[str, Any] = {}
    for _ in range(draw.choice((1, 1, 2))):
        keys |= draw.choice(KEYS)
    torch.manual_seed(draw.randrange(2**31))
    try:
        config = AutoConfig.for_model(family, **SIZES | {"vocab_size": 400} | own | keys)
        model = AutoModelForCausalLM.from_config(config).float()
        model.save_pretrained(folder)
        # As users write it: keys that the class does not know stay, and say what they say.
        said = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(json.dumps(said))
        with torch.no_grad():
            AutoModelForCausalLM.from_pretrained(folder)(torch.arange(8)[None])
    except Exception as error:
        raise InvalidError(str(error)) from error
    store(folder, draw)


class InvalidError(Exception):
    """Transformers itself does not take these keys together."""


def store(folder: Path, draw: random.Random) -> None:
    """Store the weights as other tools do: with what nobody reads, or in two files."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    how = draw.choice(
        ("plain", "plain", "masks", "frequencies", "two files", "head too", "metadata")
    )
    if how == "masks":
        tensors["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 64, 64)
    elif how == "frequencies":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    elif how == "head too" and "lm_head.weight" not in tensors:
        name = next((n for n in tensors if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
        if name:
            tensors["lm_head.weight"] = tensors[name].clone()
    elif how == "two files":
        names = sorted(tensors)
        halves = names[::2], names[1::2]
        files = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
        for file, half in zip(files, halves, strict=True):
            save_file({name: tensors[name] for name in half}, folder / file, {"format": "pt"})
        places = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        path.unlink()
        return
    save_file(tensors, path, {"format": "pt"} | ({"a": "b"} if how == "metadata" else {}))


# --- texts ---


def save_text(folder: Path, draw: random.Random) -> tuple[Path, list[str]]:
    """A text in a drawn format, and the documents' texts that it holds."""
    texts = [
        draw.choice(("", " ")).join(draw.choices(WORDS, k=draw.choice((40, 80, 160))))
        for _ in range(12)
    ]
    titles = [draw.choice((None, "", f"Title {i}")) for i in range(12)]
    rows = [{"title": t, "text": x} for t, x in zip(titles, texts, strict=True)]
    kind = draw.choice(
        (
            "x.txt",
            "x.md",
            "X.TXT",
            "x.jsonl",
            "X.JSONL",
            "x.json",
            "lines.json",
            "x.csv",
            "x.jsonl.gz",
            "bom.txt",
            "x.log",
        )
    )
    path = folder / kind
    lines = "".join(json.dumps(row, ensure_ascii=draw.random() < 0.5) + "\n" for row in rows)
    if kind.endswith((".jsonl", ".JSONL")) or kind == "lines.json":
        path.write_text(lines)
    elif kind == "x.json":
        path.write_text(json.dumps(rows))
    elif kind == "x.jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "x.csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["title", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        ending = draw.choice(("\n\n", "\r\n\r\n"))
        mark = "\ufeff" if kind == "bom.txt" else ""
        path.write_bytes((mark + ending.join(texts)).encode())
    return path, texts


# --- GGUF headers ---


def reread(path: Path, draw: random.Random) -> None:
    """Write a GGUF file again, with something in its header that other tools write."""
    reader = GGUFReader(path)
    changed = path.with_name("changed.gguf")
    writer = GGUFWriter(changed, "llama")
    extra: dict[str, Any] = draw.choice(
        (
            {}, {"general.quantization_version": 2}, {"general.url": "x"}, {"mine.note": "x"},
            {"tokenizer.ggml.padding_token_id": 1}, {"llama.rope.scaling.type": "none"},
            {"general.tags": ["a", "b"]}, {"llama.attention.causal": True},
        )
    )  # fmt: skip
    for name, value in reader.fields.items():
        if name.startswith("GGUF.") or name in extra or name == "general.architecture":
            continue
        if value.types[0] == GGUFValueType.ARRAY:
            writer.add_key_value(name, value.contents(), value.types[0], value.types[1])
        else:
            writer.add_key_value(name, value.contents(), value.types[0])
    for name, value in extra.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_string(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    changed.replace(path)


# --- cases ---


def a3(*words: object, capture: list[str]) -> None:
    """Run a command; RefusedError for status 1, FaultError for all else that is no success."""
    before = len(capture)
    status = main([str(word) for word in words])
    if status == 1:
        raise RefusedError("".join(capture[before:]))
    if status != 0:
        raise FaultError(f"exit status {status}")


def dense_of(folder: Path) -> tuple[Any, Any]:
    """The dense model and tokenizer as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def said_of(tokenizer: Any, texts: list[str], gguf: bool) -> list[Any]:
    """All that a tokenizer makes of texts and a chat."""
    found: list[Any] = []
    for text in (PROBE, *texts[:4]):
        ids = tokenizer(text).input_ids
        found += [ids, tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)]
    found += [tokenizer.bos_token_id, tokenizer.eos_token_id]
    if not gguf:
        found += [tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.model_max_length]
    templates = tokenizer.chat_template
    if templates is not None:
        for name in templates if isinstance(templates, dict) else [None]:
            options = {"chat_template": name} if name else {}
            found.append(tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options))
    return found


def compare(dense: Path, made: Path, texts: list[str], gguf: bool = False) -> None:
    """Raise FaultError where the made folder is another model or reads text otherwise.

    A GGUF file does not hold all that a tokenizer has beside its rules.
    """
    model, tokenizer = dense_of(dense)
    other, its = dense_of(made)
    expected, found = said_of(tokenizer, texts, gguf), said_of(its, texts, gguf)
    for one, two in zip_longest(expected, found):
        if one != two:
            raise FaultError(f"tokenizer: {one!r:.120} became {two!r:.120}")
    ids = [i for i in tokenizer(" ".join(texts)[:1500]).input_ids if i < model.config.vocab_size]
    ids = torch.tensor([ids[:96]])
    with torch.no_grad():
        one, two = model(ids, return_dict=True).logits, other(ids, return_dict=True).logits
    gap = (one - two).abs().max().item()
    if not gap <= 1e-3 * max(1.0, one.abs().max().item()):
        raise FaultError(f"logits differ by {gap:.3g} of {one.abs().max().item():.3g}")


def case(folder: Path, seed: int, capture: list[str]) -> str:
    """One input from its seed; what it was, for the record. Raises what is not `equal`."""
    draw = random.Random(seed)
    dense, made = folder / "dense", folder / "made"
    dense.mkdir(parents=True)
    save_model(dense, draw)
    save_tokenizer(dense, draw, 400)
    text, texts = save_text(folder, draw)
    source = dense
    if exported(dense, folder / "x.gguf", draw, capture):
        reread(folder / "x.gguf", draw)
        a3("model", folder / "x.gguf", "-o", folder / "read", capture=capture)
        compare(dense, folder / "read", texts, gguf=True)
        source = folder / "read"
    a3("text", text, "-o", folder / "docs.jsonl", capture=capture)
    held = "".join(document.text for document in load_documents(folder / "docs.jsonl"))
    wanted = "".join("".join(texts).split())
    if "".join(held.split()) != wanted:
        raise FaultError(f"text {text.name}: {held[:80]!r} for {texts[0][:80]!r}")
    cut = ["--tokens", "256", "--block-length", "64"]
    modes = ["--preset", draw.choice(("a3", "a3-plus"))]
    config = json.loads((dense / "config.json").read_text())
    if config["model_type"] in ("gpt2", "gpt_bigcode", "gpt_neo", "opt", "bloom", "mpt"):
        modes = ["--qk", "qk"]
    a3(
        "compress",
        source,
        "--text",
        text,
        *cut,
        *modes,
        "--ratio",
        "0",
        "-o",
        made,
        capture=capture,
    )
    compare(source, made, texts)
    return f"{config['model_type']}, {text.name}"


def exported(dense: Path, out: Path, draw: random.Random, capture: list[str]) -> bool:
    """Whether the model goes by way of a GGUF file: one in two of those that can."""
    try:
        if draw.random() < 0.5:
            a3("export", "gguf", dense, "--type", "f32", "-o", out, capture=capture)
    except RefusedError:
        pass  # of another family, or with a tokenizer that llama.cpp has no name for
    return out.exists()


def unusual(folder: Path, seeds: range, capture: Callable[[], list[str]]) -> Outcome:
    """Run the cases of these seeds below `folder`, which stays empty."""
    outcome = Outcome()
    for seed in seeds:
        place, heard = folder / str(seed), capture()
        try:
            case(place, seed, heard)
            outcome.counts["equal"] += 1
        except InvalidError:
            outcome.counts["invalid"] += 1
        except RefusedError as error:
            outcome.counts["refused"] += 1
            outcome.reasons[reason(str(error), place)] += 1
        except FaultError as error:
            outcome.counts["fault"] += 1
            outcome.faults.append(f"seed {seed}: {error}")
        except A3Error as error:
            outcome.counts["fault"] += 1
            outcome.faults.append(f"seed {seed}: A3Error past the command line: {error}")
        except Exception as error:
            outcome.counts["fault"] += 1
            outcome.faults.append(f"seed {seed}: {type(error).__name__}: {error}"[:400])
        finally:
            shutil.rmtree(place, ignore_errors=True)
    return outcome


def reason(message: str, place: Path) -> str:
    """A refusal without the case's own folder; one that names no file or key is a fault."""
    found = message.rpartition("a3: error: ")[2].partition("\n")[0].replace(str(place), "")
    return found[:240]


class Ear:
    """Stands for sys.stderr, and remembers what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def write(self, text: str) -> int:
        self.heard.append(text)
        return len(text)

    def flush(self) -> None:
        pass

    def __enter__(self) -> list[str]:
        self.before, sys.stderr = sys.stderr, self
        return self.heard

    def __exit__(self, *_: object) -> None:
        sys.stderr = self.before
