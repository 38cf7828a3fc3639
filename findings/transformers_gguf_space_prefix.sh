#!/usr/bin/env bash
# Guess: a SentencePiece vocabulary in a GGUF file gives the same ids in transformers as in the sentencepiece library:
#        tokens, scores and types are all there, and tokenizer.ggml.add_space_prefix says whether a space goes before
#        the text.
# What happens: (1) add_space_prefix=false is not read: a space goes before the text all the same. (2) Where it is
#        true, none goes before a text that starts with a space, so that " x" and "x" get the same ids. sentencepiece
#        puts one before every text or none, llama.cpp too.
# Versions: transformers 5.23.0, gguf 0.19.0, sentencepiece 0.2.3, torch 2.13.0.
# Who is hit: perplexity and log-likelihoods of GGUF files of Llama 2-like models: answers " yes" and "yes" become the
#        same, indented code loses a space, and models trained without the prefix get one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 gguf==0.19.0 sentencepiece==0.2.3 numpy==2.4.6
cat > "$folder/spaces.py" <<'PY'
import io
import logging
import sys

import gguf
import sentencepiece
from transformers import AutoTokenizer

TEXTS = ("yes", " yes", "  yes", "if x:", "    return x", "yes or no")
folder = sys.argv[1]
logging.disable()


def trained(prefix: bool) -> sentencepiece.SentencePieceProcessor:
    """A small vocabulary, with a space put before each text or without."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["yes or no", "no or yes", "if x: return x", "    return x"] * 20), model_writer=content,
        model_type="bpe", vocab_size=300, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        add_dummy_prefix=prefix, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())


def write(model: sentencepiece.SentencePieceProcessor, prefix: bool) -> None:
    """The vocabulary as a GGUF file."""
    ids = range(model.vocab_size())
    kinds = (
        (model.is_unknown, gguf.TokenType.UNKNOWN), (model.is_control, gguf.TokenType.CONTROL),
        (model.is_byte, gguf.TokenType.BYTE), (lambda _: True, gguf.TokenType.NORMAL),
    )
    file = gguf.GGUFWriter(f"{folder}/model.gguf", "llama")
    file.add_tokenizer_model("llama")
    file.add_tokenizer_pre("default")
    file.add_token_list([model.id_to_piece(i) for i in ids])
    file.add_token_scores([model.get_score(i) for i in ids])
    file.add_token_types([next(kind for test, kind in kinds if test(i)) for i in ids])
    file.add_bos_token_id(model.bos_id())
    file.add_eos_token_id(model.eos_id())
    file.add_unk_token_id(model.unk_id())
    file.add_add_space_prefix(prefix)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.close()


for prefix in (True, False):
    model = trained(prefix)
    write(model, prefix)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    for text in TEXTS:
        expected = model.encode(text, out_type=str)
        found = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
        print(f"add_space_prefix={prefix}, {text!r}: sentencepiece {expected}, transformers {found}")
        assert (found == expected) == (text.startswith(" ") != prefix)
PY
"$folder/venv/bin/python" "$folder/spaces.py" "$folder"
