"""Writes the ONNX graph of a model in memory, by torch.export and torch.onnx."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch.export import Dim
from transformers import PreTrainedModel

from a3.core.errors import A3Error
from a3.stages.export.decoder import Decoder, Slot, names_of

# A prompt to trace: no size is 0 or 1, or equal to another one, which torch.export would believe.
BATCH, PAST, LENGTH = 2, 5, 7

LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


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
    with silent(), needed(model, "torch.onnx cannot export this family"):
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

    OpenVINO 2026.4 found a batch of 0 in an empty cache (batch, heads, 0, size) and refused to run.
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
def needed(model: PreTrainedModel, otherwise: str) -> Iterator[None]:
    """Raise A3Error, which says `otherwise`, for whatever a library cannot do with a model."""
    try:
        yield
    # Libraries raise exceptions of any type for code or graphs that they cannot follow.
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        a3: dict[str, Any] = getattr(model.config, "a3", None) or {}
        raise A3Error(
            f"{a3.get('family', model.config.model_type)}: {otherwise} "
            f"({type(error).__name__}: {lines[0] if lines else ''}). Use it with transformers."
        ) from error
