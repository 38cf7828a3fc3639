"""`Arch`, the description of a dense model: read from its files and saved as arch.json."""

from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from a3.core.errors import A3Error
from a3.core.files import read_json, read_record, sha256
from a3.models.built import build, require_agreement
from a3.models.checkpoint import Checkpoint
from a3.models.families import BACKBONES, FAMILIES, REFUSED, family_of, held
from a3.models.families.probed import probed
from a3.models.family import Family
from a3.models.load import load_config, load_whole, number_of_parameters, parameters_of
from a3.models.probe.probe import Outcome, probe
from a3.models.probe.tiny import require_causal, require_few_layers
from a3.models.registry import LazyConfig
from a3.models.shape import Arch
from a3.models.sizes import sizes
from a3.models.wrappers import REFUSED_WRAPPERS, WRAPPERS, carried, text_of, wrapper_of


def is_compressed(folder: Path) -> bool:
    """Whether a folder holds a compressed model."""
    return model_type(folder) == LazyConfig.model_type


def modules_of(folder: Path) -> list[str]:
    """Modules of a3 that transformers loads by name to run the model of a folder."""
    if not is_compressed(folder):
        return []
    quantised = "quantised" in load_config(folder).a3
    return ["a3.models.quantised" if quantised else "a3.models.modeling_a3"]


def describe(folder: Path) -> Arch:
    """Read a dense Hugging Face folder (config.json and *.safetensors).

    Raises A3Error for an unknown family, and for weights that are missing, truncated or of another
    shape than in the config.
    """
    family = known_family(folder)
    checkpoint = Checkpoint(folder, family.prefix)
    fields, model = read_config(folder, family, len(checkpoint.names()))
    for name, shape in family.shapes(fields).items():
        checkpoint.expect(name, shape)
    dtype = checkpoint.dtype(next(iter(family.shapes(fields))))
    # A load without weights: reports other missing tensors, such as norms and embeddings.
    load_whole(folder, device_map="meta")
    ranks = [(fields["head_dim"], fields["head_dim"], fields["intermediate_size"])]
    return Arch(
        **fields,
        dtype=dtype,
        weights_sha256=checkpoint.sha256(),
        size=sizes(fields, ranks * fields["layers"], parameters_of(checkpoint, model), dtype)
        | carried(model),
    )


def sketch(folder: Path) -> Arch:
    """Like `describe`, but from config.json alone; no weights are needed.

    weights_sha256 is empty. Raises A3Error for an unknown family.
    """
    family, config = known_family(folder), load_config(folder)
    fields, model = described(folder, family, config)
    parameters = number_of_parameters(model)
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    ranks = [(fields["head_dim"], fields["head_dim"], fields["intermediate_size"])]
    size = sizes(fields, ranks * fields["layers"], parameters, dtype)
    return Arch(**fields, dtype=dtype, weights_sha256="", size=size | carried(model))


def model_hashes(folder: Path, arch: Arch) -> dict[str, str]:
    """The hashes that identify the model from which statistics were collected."""
    return {
        "weights_sha256": arch.weights_sha256,
        "config_sha256": sha256(folder / "config.json"),
    }


def known_family(folder: Path) -> Family:
    """The adapter of a folder's family, or what a probe finds where a3 has none.

    Raises A3Error, with the reason, where neither knows how to compress it.
    """
    found = model_type(folder)
    if found == LazyConfig.model_type:
        raise made_already(folder)
    path = folder / "config.json"
    require_few_layers(path, read_json(path))
    if found in REFUSED_WRAPPERS:
        raise A3Error(
            f"{path}: model_type is {found!r}, a model of several modalities: "
            f"{REFUSED_WRAPPERS[found]}. Save its language model alone, or take another model; "
            "a3 families lists those that a3 knows."
        )
    if found in WRAPPERS:
        text = load_config(folder).get_text_config().model_type
        alone = text in FAMILIES | BACKBONES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        family = text_family(path, text) if alone else probed_family(path, found)
        return held(family, WRAPPERS[found])
    return text_family(path, found)


def text_family(path: Path, found: str) -> Family:
    """The adapter of a type of language models, that of a config.json or one that it holds."""
    if found in FAMILIES | BACKBONES:
        return family_of(found, None)
    if found in REFUSED or found not in CONFIG_MAPPING:
        reason = REFUSED.get(found, "which a3 does not know, and transformers neither")
        raise A3Error(
            f"{path}: model_type is {found!r}, {reason}. a3 families lists the types that a3 knows."
        )
    require_causal(path, found)
    return probed_family(path, found)


def probed_family(path: Path, found: str) -> Family:
    """What a probe finds of a config's type; raises A3Error, with evidence, if that is nothing."""
    try:
        outcome = remembered(path.parent, path.read_text())
    except A3Error as error:
        raise A3Error(f"{path}: a3 has no adapter for {found!r}, and {error}") from error
    if outcome.structure is None:
        why = "; ".join(f"{component}: {said}" for component, said in outcome.why.items())
        raise A3Error(
            f"{path}: a3 has no adapter for {found!r}, and a probe confirmed none of its parts "
            f"({why}). This model is not supported."
        )
    return probed(outcome.structure)


@cache
def remembered(folder: Path, content: str) -> Outcome:
    """A probe of a folder's config, once in a process for a content."""
    config = load_config(folder)
    text = text_of(config)
    # A language model that exists in this type alone is probed there.
    config = text if text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else config
    return probe(config.model_type, config.to_dict())


def made_already(folder: Path) -> A3Error:
    """The error message for a folder that a3 refuses because a3 itself has already converted it."""
    said = read_json(folder / "config.json").get("a3")
    said = said if isinstance(said, dict) else {}
    if "quantised" in said:
        return A3Error(
            f"{folder}: quantised (a3 quantise); dequantise it first: name the model that it was "
            "made of, dense or compressed."
        )
    return A3Error(
        f"{folder}: compressed by a3 already ({said.get('family', 'of no family')}), expected a "
        "dense model. Name the one that it was made from; to compress it further, a3 export dense "
        "puts it back into the dense shapes. Compressed models are read by a3 eval, export, "
        "inspect, collect, quantise and card."
    )


def model_type(folder: Path) -> str:
    """`model_type` of a Hugging Face folder; raises A3Error if there is no such config."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise A3Error(
            f"{folder / 'config.json'}: no model_type. Name a folder in Hugging Face's layout."
        )
    return config["model_type"]


def read_config(
    folder: Path, family: Family, tensors: int
) -> tuple[dict[str, Any], PreTrainedModel]:
    """Like `described`, for a folder with this number of tensors in its safetensors.

    Raises A3Error for a config that transformers or the adapter cannot read.
    """
    path = folder / "config.json"
    config = read_json(path)
    key = CONFIG_MAPPING[config["model_type"]].attribute_map.get("num_hidden_layers")
    said = config.get("text_config") or config
    check_count(path, "layers", said.get(key or "num_hidden_layers"), tensors)
    config = load_config(folder)
    check_count(path, "experts", family.mixture(text_of(config))["experts"], tensors)
    return described(folder, family, config)


def described(
    folder: Path, family: Family, config: PreTrainedConfig
) -> tuple[dict[str, Any], PreTrainedModel]:
    """The fields of `Arch` that a folder's config decides, and the model without weights.

    Raises A3Error if transformers or the adapter cannot read it, or they differ.
    """
    model = build(folder, config)
    fields = family.describe(text_of(config), model) | {"wrapper": wrapper_of(config)}
    require_agreement(folder, family, fields, model)
    return fields, model


def check_count(path: Path, what: str, count: Any, tensors: int) -> None:
    """Raise A3Error if a config has more layers or experts than there are tensors.

    The code makes lists of that length, so a wrong number could use up all memory.
    """
    if isinstance(count, int | float) and count > tensors:
        raise A3Error(
            f"{path}: {count} {what}, but the safetensors hold {tensors} tensors in all. Correct "
            "the config, or fetch the model again."
        )


def load_arch(folder: Path) -> Arch:
    """`Arch` of a dense folder: from arch.json if the model stage wrote it, else newly read.

    One command asks for it several times; what was read is kept until a file of the folder changes.
    """
    path = folder / "arch.json"
    if path.exists():
        return Arch.from_json(read_record(path), path)
    if not folder.is_dir():
        return describe(folder)  # raises
    return deepcopy(_described_once(folder, _files_of(folder)))


@lru_cache(maxsize=16)
def _described_once(folder: Path, files: tuple[tuple[str | int, ...], ...]) -> Arch:
    """`describe`, once in a process for these files."""
    return describe(folder)


def _files_of(folder: Path) -> tuple[tuple[str | int, ...], ...]:
    """For each file of a folder its name and what a change of it changes."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.exists()):
        at = path.stat()
        found.append((path.name, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns))
    return tuple(found)
