"""A model whose KV cache is a list of tensors, as runtimes without Python pass it."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from a3.core.errors import A3Error


@dataclass(frozen=True)
class Slot:
    """What one layer has in the cache: key/value heads and the sizes of a key and of a value."""

    heads: int
    key: int
    value: int

    def empty(self, batch: int, length: int, dtype: torch.dtype) -> list[Tensor]:
        """Keys and values of zeros, (batch, heads, length, size) each."""
        return [
            torch.zeros(batch, self.heads, length, size, dtype=dtype)
            for size in (self.key, self.value)
        ]


class Decoder(nn.Module):
    """A model whose cache is a list of tensors: keys and values of the first layer, and so on."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.positions = wants_positions(model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """input_ids, position_ids (B, L), attention_mask (B, P + L), past (B, G, P, r) each.

        Returns logits (B, L, vocabulary) float32, and `past` with the L new tokens.
        """
        cache = DynamicCache()
        for layer, (k, v) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(k, v, layer)
        where = {"position_ids": position_ids} if self.positions else {}
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **where,
        )
        held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        return out.logits.float(), *held


def wants_positions(model: PreTrainedModel) -> bool:
    """Whether a family's code takes positions; others count the cache or the mask."""
    return "position_ids" in inspect.signature(model.forward).parameters


@torch.inference_mode()
def slots_of(model: PreTrainedModel, folder: Path) -> list[Slot]:
    """What each layer leaves in the cache; raises A3Error for a cache of another kind."""
    cache = DynamicCache()
    # Some models make a cache of their own where this one lacks what they need.
    out = model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache, use_cache=True)
    found = [
        Slot(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        for layer in cache.layers
        if type(layer) is DynamicLayer and layer.keys is not None and layer.keys.shape[2] == 3
    ]
    if out.get("past_key_values") is not cache or not found or len(found) < len(cache.layers):
        raise A3Error(
            f"{folder}: its cache is not one of keys and values in every layer, which the decoders "
            "of ONNX graphs expect. Use it with transformers."
        )
    return found


def names_of(slots: list[Slot], prefix: str) -> list[str]:
    """Names of the cache's tensors in the graph."""
    return [f"{prefix}.{i}.{kind}" for i in range(len(slots)) for kind in ("key", "value")]
