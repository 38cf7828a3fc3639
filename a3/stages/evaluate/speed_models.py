"""Models to be timed: folders, and random ones with a config's shapes."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from a3.artifacts.places import Place
from a3.core.errors import A3Error
from a3.models.arch import is_compressed, load_arch, sketch
from a3.models.built import empty_model
from a3.models.checkpoint import Checkpoint
from a3.models.compressed import compressed_record
from a3.models.load import load_config, number_of_parameters
from a3.models.packing import compressed_config
from a3.models.registry import LazyConfig
from a3.models.shape import Arch
from a3.models.sizes import Ranks, sizes
from a3.models.wrappers import auto_class, text_of, wrapper_of
from a3.solutions.modes import DENSE, choose
from a3.solutions.plan import Plan
from a3.stages.evaluate.evaluated import hashes, load


@dataclass(frozen=True)
class Candidate:
    """A model that is to be timed, before it is in memory.

    `shapes` are the fields of Arch with the size of this model, `timed` those of what is run of it
    (fewer layers, say), and `said` is what the record says of where it came from.
    """

    name: str
    shapes: dict[str, Any]
    timed: dict[str, Any]
    said: dict[str, Any]
    build: Callable[[], PreTrainedModel]


# --- what is timed ---
def candidates_of(
    folders: Sequence[Path],
    rows: Sequence[dict[str, str]],
    multiples: Sequence[int],
    layers: int | None,
    dtype: str,
    device: str,
) -> list[Candidate]:
    """Models of folders, or with `rows` the dense model of the one folder and made-up ones."""
    if rows:
        return made_up(folders[0], rows, multiples, layers, dtype, device)
    return [of_folder(folder, dtype, device) for folder in folders]


def of_folder(folder: Path, dtype: str, device: str) -> Candidate:
    """A dense or compressed folder."""
    if is_compressed(folder):
        record = compressed_record(folder)
        shapes = record["base"] | {"size": record["size"]["compressed"]}
    else:
        shapes = load_arch(folder).to_json()
    said = hashes(Checkpoint(folder))
    build = partial(load, folder, dtype, device)
    return Candidate(str(folder), shapes, shapes, said, build)


def made_up(
    folder: Path,
    rows: Sequence[dict[str, str]],
    multiples: Sequence[int],
    layers: int | None,
    dtype: str,
    device: str,
) -> list[Candidate]:
    """The dense model of a config.json, and compressed ones, all with random weights."""
    arch = sketch(folder)
    if layers is not None and not 1 <= layers <= arch.layers:
        raise A3Error(f"speed: layers is {layers}; expected 1 to {arch.layers}.")
    few = replace(arch, layers=layers or arch.layers)
    plans = {DENSE: Plan({})}
    for row, multiple in itertools.product(rows, dict.fromkeys(multiples)):
        name = name_of(row) + (f" by {multiple}" if len(multiples) > 1 else "")
        plans[name] = Plan(choose(row), multiple=multiple)
    candidates = []
    for name, plan in plans.items():
        said = plan.dense_sizes(arch)
        qk, ov, mlp = said.values()
        ranks: Ranks = (qk, ov, [mlp] * arch.experts if arch.experts else mlp)
        factors = plan.factors(arch)
        whole, cut = (
            config_of(folder, of, ranks, factors, compressed=bool(plan.choices))
            for of in (arch, few)
        )
        shapes = shapes_of(arch, whole, ranks, factors)
        timed = shapes_of(few, cut, ranks, factors)
        build = partial(random_model, cut, dtype, device)
        made = {"ranks": said, "factors": factors}
        candidates.append(Candidate(name, shapes, timed, made, build))
    return candidates


def name_of(row: dict[str, str]) -> str:
    """The modes and ratio of a row, as in the paths of results."""
    place = Place("", **row)
    return f"{place.method}/{place.ratio}"


def config_of(
    folder: Path, arch: Arch, ranks: Ranks, factors: dict[str, int], *, compressed: bool
) -> PreTrainedConfig:
    """The config of the dense model, or of a compressed one with the same ranks in every layer.

    Of a head that is rotated in part, the pairs' share of the rank is that of the dense head; where
    weights are solved for, it is chosen by the error. `arch` says how many layers there are.
    """
    config = load_config(folder)
    if compressed:
        pairs = min(arch.rope_dims // 2, max(1, ranks[0] * arch.rope_dims // (2 * arch.head_dim)))
        n = arch.layers
        every = [ranks] * n, [pairs] * n, [factors] * n
        said = compressed_config(config.to_dict(), arch, *every, down_bias=False, same_pairs=False)
        config = LazyConfig.from_dict(said)
    text_of(config).num_hidden_layers = arch.layers
    return config


def shapes_of(
    arch: Arch, config: PreTrainedConfig, ranks: Ranks, factors: dict[str, int]
) -> dict[str, Any]:
    """The fields of Arch for a model of these ranks."""
    fields, parameters = arch.to_json(), number_of_parameters(empty_model(config))
    every = [ranks] * arch.layers, parameters, arch.dtype, [factors] * arch.layers
    return fields | {"size": sizes(fields, *every)}


def random_model(config: PreTrainedConfig, dtype: str, device: str) -> PreTrainedModel:
    """A model with the weights that training starts from."""
    with torch.device(device):
        model = auto_class(wrapper_of(config)).from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=False
        )
    return model.eval()
