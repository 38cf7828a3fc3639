"""Stage eval generation: continues a prompt greedily with a dense or compressed folder."""

import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
    ids = prompt_ids(subject, prompt, new_tokens).to(device)
    model = load(model_folder, dtype, device)
    start = time.perf_counter()
    made = continued(model, ids, new_tokens)
    seconds = time.perf_counter() - start
    record = {
        "prompt": prompt,
        "new_tokens": new_tokens,
        "token_ids": made.tolist(),
        "text": subject.tokenizer.decode(made, skip_special_tokens=True),
        "dtype": dtype,
    }
    subject.write(out, __name__, record, {"seconds": seconds})


def prompt_ids(subject: Evaluated, prompt: str, new_tokens: int) -> Tensor:
    """The tokens of a prompt, (1, L); raises A3Error as `generation` does."""
    ids: Tensor = subject.tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise A3Error("prompt is empty. Give some text.")
    length = ids.shape[1] + new_tokens
    require_positions(subject.folder, length, "prompt and new_tokens together")
    require_rows(subject.folder, subject.tokenizer, ids)
    return ids


def continued(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Tensor:
    """The tokens that follow a prompt's (1, L), the likeliest each time: `new_tokens` at most."""
    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
        )
    return made[0, ids.shape[1] :]
