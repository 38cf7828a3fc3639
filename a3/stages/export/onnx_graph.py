"""Writes the ONNX graph of a model in memory, by torch.export and torch.onnx."""

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from a3.core.errors import A3Error

# A prompt to trace: no size is 0 or 1, or equal to another one, which torch.export would believe.
BATCH, PAST, LENGTH = 2, 5, 7

LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


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


def write_graph(model: PreTrainedModel, slots: list[Slot], path: Path, outside: bool) -> None:
    """Write the graph to `path`; `outside` puts its weights beside it in <name>_data."""
    past = [x for slot in slots for x in slot.empty(BATCH, PAST, model.dtype)]
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    places = torch.arange(PAST, PAST + LENGTH).expand(BATCH, -1)
    inputs = (ids, torch.ones(BATCH, PAST + LENGTH, dtype=torch.long), places, past)
    # One object for all sizes that are equal: torch.export would give each one a symbol of its own,
    # and compare all of them, which takes most of the time.
    batch, length, before = map(Dim, ("batch_size", "sequence_length", "past_sequence_length"))
    new = {0: batch, 1: length}
    every = [{0: batch, 2: before}] * len(past)
    shapes = (new, {0: batch, 1: Dim.DYNAMIC}, new, every)
    heads = ["input_ids", "attention_mask", "position_ids"]
    with silent(), traceable(model):
        program = torch.onnx.export(
            Decoder(model).eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=heads + names_of(slots, "past_key_values"),
            output_names=["logits", *names_of(slots, "present")],
            optimize=False,
            verbose=False,
        )
    assert program is not None, "without a path the graph is returned"
    graph = program.model
    measure_prompt(graph.graph)
    shorten(graph)
    ir.save(graph, path, external_data=f"{path.name}_data" if outside else None)


def measure_prompt(graph: ir.Graph) -> None:
    """Take the batch and the length of the cache from the prompt and its mask, not from the cache.

    OpenVINO runs no operator whose input is empty, not even Shape: of an empty cache it would find
    what the last text left there, or 0.
    """
    inputs = {value.name: value for value in graph.inputs}
    batch = ir.node("Shape", [inputs["input_ids"]], attributes={"start": 0, "end": 1})
    new = ir.node("Shape", [inputs["input_ids"]], attributes={"start": 1, "end": 2})
    seen = ir.node("Shape", [inputs["attention_mask"]], attributes={"start": 1, "end": 2})
    past = ir.node("Sub", [seen.outputs[0], new.outputs[0]])
    found = {(0, 1): batch.outputs[0], (2, 3): past.outputs[0]}
    for node in list(graph):
        of = node.inputs[0] if node.op_type == "Shape" else None
        if of is None or not of.is_graph_input() or of.name in ("input_ids", "attention_mask"):
            continue
        bounds = node.attributes.get_int("start", 0), node.attributes.get_int("end", 4)
        if bounds in found:
            node.outputs[0].replace_all_uses_with(found[bounds])
    graph.insert_before(graph[0], [batch, new, seen, past])
    inputs["attention_mask"].shape = ir.Shape(["batch_size", "total_sequence_length"])


def shorten(graph: ir.Model) -> None:
    """Remove what is computed twice or not used.

    torch.onnx's own optimiser takes minutes, since it looks for its patterns at every node, and
    stores every weight transposed, a head that is the embedding a second time. onnxruntime
    optimises a graph when it loads it.
    """
    passes = ir.passes.Sequential(
        common.InlinePass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        # It says where the files of this machine are.
        common.ClearMetadataAndDocStringPass(),
    )
    passes(graph)


@contextmanager
def silent() -> Iterator[None]:
    """Inside the block torch.onnx prints no warnings about its own parts."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """Raise A3Error for whatever torch.export and torch.onnx cannot do."""
    try:
        yield
    # They raise exceptions of any type for code that they cannot follow.
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        a3: dict[str, Any] = getattr(model.config, "a3", None) or {}
        raise A3Error(
            f"{a3.get('family', model.config.model_type)}: torch.onnx cannot export this family "
            f"({type(error).__name__}: {lines[0] if lines else ''}). Use it with transformers."
        ) from error
