"""Runs a model one layer at a time; the weights of one layer are enough in memory.

The model's own forward calls stand-ins in place of its layers. It computes the inputs of the first
layer, how each layer is called (masks, positions), and logits from the outputs of the last layer.
So windows, scales and caps are the family's own, and results are byte-identical to a whole pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from a3.core.dtypes import WIDTHS
from a3.core.errors import A3Error
from a3.core.memory import memory_at_hand, return_memory
from a3.models.built import with_trunk
from a3.models.checkpoint import Checkpoint
from a3.models.load import PLAIN, load_config, load_model
from a3.models.shape import Arch
from a3.models.wrappers import auto_class, of_language, wrapper_of

# Share of the available memory for weights; activations need the rest.
RESIDENT_SHARE = 0.6


class StandIn(nn.Module):
    """Takes the place of a decoder layer: notes its call, and returns `exchanged` or its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.exchanged: Tensor | None = None
        # How many values the family's layers return; None if it is one, not in a tuple.
        self.tuple_of: int | None = None
        # Hidden states and other arguments of the last call.
        self.entered: Tensor | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __getattr__(self, name: str) -> Any:
        """The layer's own attributes, for hooks on its modules and models that read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        """Hidden states (1, L, d), in a tuple if the family's layers return one."""
        self.entered, self.arguments = hidden, (arguments, options)
        hidden = hidden if self.exchanged is None else self.exchanged
        return hidden if self.tuple_of is None else (hidden, *[None] * (self.tuple_of - 1))


class Layerwise:
    """A model in memory that runs layer by layer. No weight requires a gradient.

    `record` comes first, with a block of the length of all others.
    """

    def __init__(self, model: PreTrainedModel, arch: Arch) -> None:
        self.arch = arch
        self.model = model.eval().requires_grad_(False)
        config = model.config.get_text_config()
        if hasattr(config, "output_router_logits"):
            # Its loss, which keeps all experts in use, is of training only.
            config.output_router_logits = False
        self.dtype: torch.dtype = model.dtype
        self.trunk: nn.Module = model.base_model
        self.layers = self.trunk.get_submodule(arch.adapter.layer_path)
        self.stand_ins = [StandIn(layer) for layer in self.layers]
        self.arguments = [stand_in.arguments for stand_in in self.stand_ins]
        for index, stand_in in enumerate(self.stand_ins):
            self.layers[index] = stand_in

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """The weights of one layer are in memory inside the block, for `run`."""
        yield

    @contextmanager
    def entrance(self) -> Iterator[None]:
        """The weights before the first layer are in memory inside the block, for `enter`."""
        yield

    @contextmanager
    def exit(self) -> Iterator[None]:
        """The weights behind the last layer are in memory inside the block, for `leave`."""
        yield

    def record(self, block: Tensor) -> None:
        """Learn how the model calls its layers for a block (L,), in an `entrance`.

        Without padding, masks and positions depend on the length only.
        """

        def learn(_: nn.Module, __: Any, output: Any) -> None:
            for stand_in in self.stand_ins:
                stand_in.tuple_of = len(output) if isinstance(output, tuple) else None

        first = self.stand_ins[0]
        with torch.no_grad(), self.layer(0):
            self.layers[0] = first.layer
            handle = first.layer.register_forward_hook(learn)
            self.trunk(block[None], use_cache=False)
            handle.remove()
            self.layers[0] = first
        self.enter(block)
        self.arguments = [stand_in.arguments for stand_in in self.stand_ins]

    def enter(self, block: Tensor) -> Tensor:
        """The first layer's input (1, L, d) for a block (L,)."""
        with torch.no_grad():
            self.trunk(block[None], use_cache=False)
        hidden, self.stand_ins[0].entered = self.stand_ins[0].entered, None
        assert hidden is not None
        return hidden

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """A layer's output (1, L, d) for its input (1, L, d)."""
        arguments, options = self.arguments[index]
        output = self.stand_ins[index].layer(hidden, *arguments, **options)
        return output[0] if isinstance(output, tuple) else output

    def leave(self, hidden: Tensor, **options: Any) -> Any:
        """The model's output (logits, and with `labels` a loss) for the last layer's (1, L, d)."""
        width = self.model.get_input_embeddings().embedding_dim
        last = self.stand_ins[-1]
        last.exchanged = hidden
        nothing = torch.zeros(1, hidden.shape[1], width, dtype=hidden.dtype, device=hidden.device)
        output = self.model(inputs_embeds=nothing, use_cache=False, **options)
        last.exchanged = None
        return output


class Streamed(Layerwise):
    """A model whose weights are read from its checkpoint when they are needed, and dropped after.

    Raises A3Error if the checkpoint lacks a tensor.
    """

    def __init__(self, folder: Path, arch: Arch, dtype: str, device: str) -> None:
        self.device = torch.device(device)
        model = empty_on(load_config(folder, **PLAIN), dtype, self.device)
        layers = f"{arch.adapter.prefix}.{arch.adapter.layer_path}."
        backbone = arch.adapter.backbone
        # Text needs no weights of other modalities.
        used = of_language(model, backbone)
        self.checkpoint = Checkpoint(folder, arch.adapter.prefix)
        known = set(self.checkpoint.names())
        # Parameters that are in no layer: their names in memory, and those of their tensors.
        self.outer = {
            name: {name, *revert_weight_conversion(model, {name: weight})} & known
            for name, weight in model.named_parameters(remove_duplicate=False)
            if not name.startswith(layers) and (id(weight) in used or not backbone)
        }
        super().__init__(model, arch)

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Reads the layer's weights, and drops them."""
        layer, prefix = self.stand_ins[index].layer, f"{self.arch.adapter.layer_path}.{index}."
        tensors = self.arch.layer_tensors(self.checkpoint, index)
        lost = self.load(layer, {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors)})
        self.require_all({f"{prefix}{name}" for name in lost})
        yield
        self.drop(layer)

    @contextmanager
    def entrance(self) -> Iterator[None]:
        """Reads all weights that are in no layer but those of the head, and drops them."""
        with self.outside(self.model.get_output_embeddings()):
            yield

    @contextmanager
    def exit(self) -> Iterator[None]:
        """Reads all weights that are in no layer but those of the embedding, and drops them."""
        with self.outside(self.model.get_input_embeddings()):
            yield

    @contextmanager
    def outside(self, unused: nn.Module) -> Iterator[None]:
        """Reads the weights that are in no layer, without those `unused` unless they are tied."""
        names = {module: f"{name}.weight" for name, module in self.model.named_modules()}
        ends = {names[self.model.get_input_embeddings()], names[self.model.get_output_embeddings()]}
        found = {name: min(keys) for name, keys in self.outer.items() if keys}
        # If the checkpoint has one of the two only, it is both.
        skipped = {names[unused]} if ends <= found.keys() else set()
        wanted = {name: key for name, key in found.items() if name not in skipped}
        self.load(self.model, {name: self.checkpoint.tensor(key) for name, key in wanted.items()})
        lost = self.outer.keys() - wanted.keys() - skipped
        if not skipped:
            self.model.tie_weights(missing_keys=lost, recompute_mapping=False)
        self.require_all(lost)
        yield
        self.drop(self.model)

    def load(self, module: nn.Module, tensors: dict[str, Tensor]) -> set[str]:
        """Give a module weights by their names in it; returns the names of those without any."""
        for name, value in tensors.items():
            dtype = self.dtype if value.is_floating_point() else value.dtype
            tensors[name] = value.to(self.device, dtype)
        return set(module.load_state_dict(tensors, strict=False, assign=True).missing_keys)

    @staticmethod
    def drop(module: nn.Module) -> None:
        """Leave a module without weights."""
        empty = {
            name: value.to("meta")
            for name, value in module.named_parameters(remove_duplicate=False)
        }
        module.load_state_dict(empty, strict=False, assign=True)
        return_memory()

    def require_all(self, lost: set[str]) -> None:
        """Raise A3Error if the checkpoint has no values for some parameters."""
        if lost:
            raise A3Error(
                f"{self.checkpoint.folder}: no tensor for {', '.join(sorted(lost))}. Fetch or "
                "build it again."
            )


def layerwise(folder: Path, arch: Arch, dtype: str, device: str, stream: bool) -> Layerwise:
    """The model of a dense or compressed folder, in memory or, with `stream`, read when needed."""
    if stream:
        return Streamed(folder, arch, dtype, device)
    return Layerwise(load_model(folder, dtype).to(device), arch)


def empty_on(config: PreTrainedConfig, dtype: str, device: torch.device) -> PreTrainedModel:
    """A model without weights; what it computes itself (RoPE's frequencies) is on the device."""
    with init_empty_weights(include_buffers=False):
        model = auto_class(wrapper_of(config)).from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=False
        )
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return with_trunk(model.eval())


def fits(parameters: int, dtype: str) -> bool:
    """Whether the weights of a whole model fit in the memory at hand."""
    return parameters * WIDTHS[dtype] < RESIDENT_SHARE * memory_at_hand()
