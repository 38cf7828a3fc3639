"""Compares an ONNX graph in onnxruntime with the model that it was made of."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from a3.stages.export.decoder import Slot, names_of, wants_positions
from a3.stages.export.onnx_graph import needed

# How many tokens are read at once: a prompt, tokens one by one, and several to a cache.
CALLS = (11, 1, 1, 6)

# Tokens of padding on the left of the second text.
PADDING = 3


def furthest(model: PreTrainedModel, slots: list[Slot], path: Path) -> float:
    """The largest difference of logits, as a share of the range of the model's.

    Two texts of random tokens, the second one padded on its left, are read by CALLS: by the model,
    and by the graph at `path`. Not finite where one of them is not.
    """
    length = sum(CALLS)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (2, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = in_torch(model, ids, mask, places)
    with needed(model, "onnxruntime cannot run the graph of this family"):
        found = in_runtime(path, slots, ids, mask, places, model.dtype)
    seen = mask.bool().numpy()
    return float(np.abs(found - expected)[seen].max() / np.ptp(expected[seen]))


@torch.inference_mode()
def in_torch(model: PreTrainedModel, ids: Tensor, mask: Tensor, places: Tensor) -> np.ndarray:
    """Logits (2, length, vocabulary) float32 of the model."""
    cache, found = DynamicCache(), []
    for start, end in spans():
        new = slice(start, end)
        options = {"position_ids": places[:, new]} if wants_positions(model) else {}
        out = model(
            input_ids=ids[:, new],
            attention_mask=mask[:, :end],
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        found.append(out.logits.float().numpy())
    return np.concatenate(found, axis=1)


def in_runtime(
    path: Path, slots: list[Slot], ids: Tensor, mask: Tensor, places: Tensor, dtype: torch.dtype
) -> np.ndarray:
    """Logits (2, length, vocabulary) float32 of the graph in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wanted = {one.name for one in session.get_inputs()}
    names = names_of(slots, "past_key_values")
    past = [x.numpy() for slot in slots for x in slot.empty(len(ids), 0, dtype)]
    found = []
    for start, end in spans():
        feed = {
            "input_ids": ids[:, start:end].numpy(),
            "attention_mask": mask[:, :end].numpy(),
            "position_ids": places[:, start:end].numpy(),
        }
        feed = {name: value for name, value in feed.items() if name in wanted}
        logits, *past = session.run(None, feed | dict(zip(names, past, strict=True)))
        found.append(logits)
    return np.concatenate(found, axis=1)


def spans() -> list[tuple[int, int]]:
    """The first token of each call, and that of the next one."""
    ends = np.cumsum(CALLS).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
