#!/usr/bin/env bash
# Guess: lm-eval's model "hf" loads a checkpoint by transformers, so it scores the model that from_pretrained gives;
#        and a model object passed to HFLM is only read.
# What happens: where config.json says tie_word_embeddings and the file still holds a head of its own, transformers 5
#        keeps that head (and says "we will NOT tie them"). HFLM then calls tie_weights(), which goes by the config
#        alone and overwrites the head by the embeddings, right after that message. Log-likelihoods are those of
#        another model. A model object that is passed in is changed in place: it is another one after the evaluation.
# Versions: lm_eval 0.4.13, transformers 5.23.0, torch 2.13.0.
# Who is hit: checkpoints whose head was trained, merged (LoRA on lm_head), pruned or compressed apart from the
#        embeddings, under the base model's config: their scores are wrong, and what is saved afterwards lacks the
#        head.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 "lm_eval[hf]==0.4.13" numpy==2.4.6
cat > "$folder/score.py" <<'PY'
import json
import logging
import pathlib
import sys

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "w5 w9 w7 w30"
folder = sys.argv[1]
logging.disable()


def make() -> None:
    """A model with a head of its own, whose config says that it is tied."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0").save_pretrained(folder)
    path = pathlib.Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))


def score(model: torch.nn.Module) -> float:
    """Log-likelihood of the text in plain transformers."""
    ids = torch.tensor([[0, *(int(word[1:]) for word in TEXT.split())]])
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None]).sum().item()


def lm_eval_score(model: HFLM) -> float:
    """The same in lm-eval."""
    return model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)[0]


make()
model = AutoModelForCausalLM.from_pretrained(folder).eval()
before = score(model)
by_folder = lm_eval_score(HFLM(pretrained=folder, device="cpu", dtype="float32"))
HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder))
after = score(model)
print(f"transformers: {before:.3f}; lm-eval, the same folder: {by_folder:.3f}")
print(f"transformers, after the model was passed to HFLM: {after:.3f}")
assert abs(before - by_folder) > 0.5 and abs(before - after) > 0.5 and abs(after - by_folder) < 1e-3
PY
"$folder/venv/bin/python" "$folder/score.py" "$folder/model"
