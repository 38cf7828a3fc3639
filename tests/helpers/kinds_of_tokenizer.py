"""Small tokenizer.json files of each kind that language models have, made in milliseconds."""

from pathlib import Path

from tiny import LINES
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre

# Llama 3's way of cutting text into words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDS = ["<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(before: list, *, bos: bool = False) -> Tokenizer:
    """A byte-level BPE of 300 entries after the pre-tokenizers `before`; all begin with <s>."""
    tokenizer = Tokenizer(models.BPE())
    last = pre.ByteLevel(add_prefix_space=False, use_regex=not before)
    tokenizer.pre_tokenizer = pre.Sequence([*before, last]) if before else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=ENDS,
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a BPE with ▁ for spaces, and bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", *ENDS, *BYTES]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    """As T5's and XLNet's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", *ENDS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


MAKERS = {
    "gpt2": lambda: byte_level([]),
    "llama3": lambda: byte_level([pre.Split(Regex(WORDS), "isolated")], bos=True),
    "digits": lambda: byte_level([pre.Digits(individual_digits=True)]),
    "sentencepiece": sentencepiece,
    "unigram": unigram,
}


def save(kind: str, folder: Path) -> Tokenizer:
    """Write tokenizer.json of a kind."""
    tokenizer = MAKERS[kind]()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer
