"""Stage eval generation: continues a prompt greedily with a dense or compressed folder."""

import time
from pathlib import Path

import torch

from a3.core.errors import A3Error
from a3.models.load import require_positions
from a3.models.tokenizer import require_rows
from a3.stages.evaluate.evaluated import Evaluated, load


def generation(
    model_folder: Path, out: Path, *, prompt: str, new_tokens: int, dtype: str, device: str
) -> None:
    """Write what follows a prompt to `out` (JSON): `new_tokens` at most, the likeliest each time.

    The prompt is used unchanged, without a chat template; special tokens written in it, such as
    <|im_start|>, become those tokens. Raises A3Error for an empty prompt, and if prompt and new
    tokens exceed the model's positions.
    """
    subject = Evaluated(model_folder)
    tokenizer = subject.tokenizer
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
    if ids.shape[1] == 0:
        raise A3Error("prompt is empty. Give some text.")
    require_positions(model_folder, ids.shape[1] + new_tokens, "prompt and new_tokens together")
    require_rows(model_folder, tokenizer, ids)
    model = load(model_folder, dtype, device)
    start = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
        )[0, ids.shape[1] :]
    seconds = time.perf_counter() - start
    record = {
        "prompt": prompt,
        "new_tokens": new_tokens,
        "token_ids": made.tolist(),
        "text": tokenizer.decode(made, skip_special_tokens=True),
        "dtype": dtype,
    }
    subject.write(out, __name__, record, {"seconds": seconds})
