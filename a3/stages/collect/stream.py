"""Collects from models larger than memory: runs all blocks through one layer at a time.

Peak memory is one layer, the embeddings, and the hidden states of the calibration blocks, which are
in a memory-mapped file. The model's own forward calls each layer with its masks and positions:
layers before the present one return stored hidden states, and the pass ends after the present
layer. So the statistics are byte-identical to those of a model in memory.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from a3.core.dtypes import WIDTHS
from a3.core.errors import A3Error
from a3.core.memory import memory_at_hand
from a3.core.progress import Bar
from a3.models.arch import Arch
from a3.models.checkpoint import Checkpoint
from a3.models.load import load_config

# Share of the available memory for weights; activations need the rest.
RESIDENT_SHARE = 0.6


class BehindLayerError(Exception):
    """Ends a forward pass after the layer of interest."""


class Stored(nn.Module):
    """Replaces a decoder layer and returns its stored hidden states of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.tuple_of: int | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        """The stored hidden states (1, L, d), in a tuple if the family's layers return one."""
        if self.tuple_of is None:
            return self.hidden
        return (self.hidden, *[None] * (self.tuple_of - 1))


class Present(nn.Module):
    """Wraps the layer of interest: stores its output and ends the pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.output: Any = None

    def __getattr__(self, name: str) -> Any:
        """Attributes that models read from their layers (for example the attention's type)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Raises BehindLayerError when the layer is done."""
        self.output = self.layer(*arguments, **options)
        raise BehindLayerError


def run_streamed(
    folder: Path,
    arch: Arch,
    attach: Callable[[nn.Module, int], list[Any]],
    blocks: Tensor,
    dtype: str,
) -> None:
    """Run all blocks (N, L) through one layer after the other.

    `attach(trunk, layer)` hooks the statistics of a layer onto it and returns the handles.
    """
    checkpoint, device = Checkpoint(folder, arch.adapter.prefix), blocks.device
    trunk = empty_trunk(load_config(folder), dtype, device).eval()
    load(trunk, outside_layers(arch, checkpoint), dtype, device)
    layers = trunk.get_submodule(arch.adapter.layer_path)
    originals = list(layers)
    inside = f"{arch.adapter.layer_path}."
    require_loaded(folder, {n: p for n, p in trunk.named_parameters() if not n.startswith(inside)})
    stored = Stored()
    with (
        torch.inference_mode(),
        tempfile.NamedTemporaryFile() as file,
        Bar(total=blocks.numel() * arch.layers, unit="tok·layer", desc="collect") as bar,
    ):
        size = blocks.numel() * arch.hidden_size
        hidden = torch.from_file(file.name, shared=True, size=size, dtype=getattr(torch, dtype))
        hidden = hidden.view(*blocks.shape, arch.hidden_size)
        for index, layer in enumerate(originals):
            tensors = arch.adapter.layer_tensors(checkpoint, index, arch.to_json())
            load(trunk, tensors, dtype, device)
            require_loaded(folder, dict(layer.named_parameters(f"{inside}{index}")))
            handles = attach(trunk, index)
            layers[index] = present = Present(layer)
            for number, block in enumerate(blocks):
                stored.hidden = hidden[number][None].to(device, copy=True)
                hidden[number] = output_of(trunk, present, block, stored)
                bar.update(block.numel())
            for handle in handles:
                handle.remove()
            layers[index] = stored
            layer.to("meta")


def output_of(trunk: nn.Module, present: Present, block: Tensor, stored: Stored) -> Tensor:
    """Hidden states (L, d) after the present layer, for a block (L,)."""
    try:
        trunk(block[None], use_cache=False)
    except BehindLayerError:
        output, present.output = present.output, None
    stored.tuple_of = len(output) if isinstance(output, tuple) else None
    return (output[0] if isinstance(output, tuple) else output)[0]


def empty_trunk(config: PreTrainedConfig, dtype: str, device: torch.device) -> nn.Module:
    """The model without its head and without weights; what it computes itself (RoPE) is there."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=False)
    return model.base_model


def outside_layers(arch: Arch, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Tensors of the trunk that are in no layer, by their names in it."""
    prefix = f"{arch.adapter.prefix}."
    names = arch.adapter.names_in(checkpoint, None)
    return {n.removeprefix(prefix): checkpoint.tensor(n) for n in names if n.startswith(prefix)}


def load(trunk: nn.Module, tensors: dict[str, Tensor], dtype: str, device: torch.device) -> None:
    """Give the trunk some of its weights."""
    known = dict(trunk.named_parameters())
    for name in tensors.keys() & known.keys():
        set_module_tensor_to_device(
            trunk, name, device, value=tensors[name], dtype=getattr(torch, dtype)
        )


def require_loaded(folder: Path, parameters: dict[str, Tensor]) -> None:
    """Raise A3Error if the checkpoint gave a parameter no value."""
    if lost := sorted(name for name, value in parameters.items() if value.is_meta):
        raise A3Error(f"{folder}: no tensor for {', '.join(lost)}. Fetch or build it again.")


def fits(arch: Arch, dtype: str) -> bool:
    """Whether the whole model's weights fit the memory at hand."""
    return arch.size["parameters"] * WIDTHS[dtype] < RESIDENT_SHARE * memory_at_hand()
