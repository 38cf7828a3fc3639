"""A tiny random Llama with a working tokenizer, saved as a Hugging Face folder in milliseconds."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from a3.cli.main import main

VOCABULARY = 300
LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A river is a natural flowing watercourse that moves towards an ocean or a lake.",
    "In 1969 the first people walked on the Moon; about 600 million viewers watched them.",
]


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train and save a byte-level BPE of 300 entries with <s> (0), </s> (1) in `folder`.

    Any text can be tokenised and decoded back.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    return fast


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}


def tiny_model(folder: Path, model_type: str, seed: int = 0, **config) -> Path:
    """Save a random float32 model of a family and its tokenizer in `folder`; returns `folder`.

    Hidden 64, 2 layers, 4 heads, 2 key/value heads, intermediate 96, vocabulary 300; any of them
    can be replaced through `config`. Weights have a spread of 0.1, so that activations, and hence
    perplexities, differ visibly between tokens.
    """
    torch.manual_seed(seed)
    values = AutoConfig.for_model(model_type, **SIZES | config)
    AutoModelForCausalLM.from_config(values).float().save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def tiny_llama(folder: Path, seed: int = 0, **config) -> Path:
    """As `tiny_model`, of the Llama family."""
    return tiny_model(folder, "llama", seed, **config)


KINDS = ("q_blocks", "k_blocks", "v_blocks", "down_diagonal")
WORDS = ["river", "dog", "moon", "lake", "fox", "ocean", "water", "brown", "lazy", "jump", "first"]
TAIL = "tiny/short/rxx-w-rxx+xkv+rxx-w/0.25"
BLOCK = ["--block-length", "64"]


def run(*words) -> None:
    """A command that has to succeed."""
    assert main([str(word) for word in words]) == 0


def small_model(folder, family, config, modes):
    """A tiny model, compressed, with ranks by layer if its modes have them."""
    tiny_model(folder / "dense", family, **config)
    (folder / "text.txt").write_text("A river moves towards an ocean. In 1969 a fox jumps. " * 60)
    cut = ["--text", folder / "text.txt", "--tokens", 512, "--block-length", 64, "--ratio", 0.3]
    run("compress", folder / "dense", *modes, *cut, "-o", folder / "small")
    return folder / "small"


def document(number: int) -> str:
    """One line of a .jsonl text."""
    words = [WORDS[(number * 7 + j * (number % 5 + 1)) % len(WORDS)] for j in range(40)]
    title = f"Title {WORDS[number % 11]} {number}"
    return json.dumps({"title": title, "text": " ".join(words)}) + "\n"


def tiny_results(folder: Path) -> Path:
    """A results folder as the workflow leaves it, of a tiny model; its sources beside it."""
    tiny_llama(folder / "tiny")
    (folder / "learn.txt").write_text("A river moves towards an ocean or a lake. " * 60)
    (folder / "score.jsonl").write_text("".join(map(document, range(60))))
    made, texts = folder / "results", folder / "results/texts"
    run("model", folder / "tiny", "-o", made / "models/tiny")
    run("text", folder / "learn.txt", "-o", texts / "learn/docs.jsonl")
    run("text", folder / "score.jsonl", "-o", texts / "score/docs.jsonl")
    learn, shares = texts / "learn/docs.jsonl", json.dumps({"test": 0.5, "harness": 0.5})
    splitting = ["--exclude", learn, "--shares", shares, "-o", texts / "score"]
    run("split", texts / "score/docs.jsonl", *splitting)
    run("items", texts / "score/harness.jsonl", "--items", "4", "-o", made / "items/titles")
    outputs = [made / f"rxx/tiny/short/{kind}.safetensors" for kind in KINDS]
    collecting = ["--text", learn, "--tokens", "512", *BLOCK, "-o", *outputs]
    run("collect", made / "models/tiny", *collecting)
    solving = ["--rxx", made / "rxx/tiny/short", "--ratio", "0.25"]
    run("approx", made / "models/tiny", *solving, "-o", made / "checkpoints" / TAIL)
    spectra = made / "spectra/tiny/short.json"
    run("spectra", made / "models/tiny", "--rxx", made / "rxx/tiny/short", "-o", spectra)
    scoring = ["--text", texts / "score/test.jsonl", "--tokens", "256", *BLOCK]
    for model, out in (("models/tiny", "tiny/dense"), (f"checkpoints/{TAIL}", TAIL)):
        run("eval", "ppl", made / model, *scoring, "-o", made / "eval" / out / "ppl/score.json")
    return made
