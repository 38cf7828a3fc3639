"""a3 convert: converts pickled weights (.bin) to safetensors; a3 reads pickles only here.

torch's weights-only unpickler reads them: it refuses everything else in a file and runs no code.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from a3.core.errors import A3Error
from a3.core.files import read_json, whole_folder
from a3.core.progress import LOG
from a3.models.built import empty_model
from a3.models.folders import write_index
from a3.models.inputs import MODEL_FILES, files_of, is_model_file
from a3.models.load import load_config
from a3.models.readable import refuse_adapter, refuse_quantised
from a3.models.travel import copy
from a3.stages.inputs.hub import hub_model
from a3.stages.inputs.sources import origin_of

WHOLE = "pytorch_model.bin"

INDEX = f"{WHOLE}.index.json"


def convert(source: dict[str, Any], out: Path) -> None:
    """Make the Hugging Face folder `out`: the weights of a folder or hub repository as safetensors.

    One safetensors file for each .bin, with the same names, and the small files beside them; whole
    or not at all. Raises A3Error if `out` exists, there are no pickled weights or others beside
    them, or a file holds anything but tensors by their names.
    """
    folder = source_folder(source)
    names, tied = pickled_files(folder), tied_names(folder)
    with whole_folder(out, of=[folder]) as made:
        for path in files_of(folder):
            if is_model_file(path) and path.name != INDEX:
                copy(path, folder, made)
        for old, new in names.items():
            LOG.info(f"convert: {old}")
            save_file(distinct(read_pickled(folder / old), tied), made / new, {"format": "pt"})
        if len(names) > 1:
            write_index(made, names.values())


def source_folder(source: dict[str, Any]) -> Path:
    """The folder of a local or hub source; raises A3Error for another source, or no folder."""
    hub = origin_of(source) == "hub"
    if hub:
        small = [pattern for pattern in MODEL_FILES if pattern != "*.safetensors"]
        folder = hub_model(source["hub"], source["revision"], [*small, "pytorch_model*.bin"])
    else:
        folder = Path(source.get("path", ""))
        if "path" not in source or not folder.is_dir():
            raise A3Error(f"source {source}: expected a folder or owner/name@revision. Name one.")
    refuse_adapter(folder)
    refuse_quantised(folder)
    if not hub and any(folder.glob("*.safetensors")):
        raise A3Error(f"{folder}: has safetensors already, nothing to convert. Use this folder.")
    return folder


def pickled_files(folder: Path) -> dict[str, str]:
    """Names of the files of weights, and those that they get; A3Error if one is not there."""
    names = [WHOLE]
    if not (folder / WHOLE).exists() and (folder / INDEX).exists():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    for name in names:
        # An index could name any file of the machine.
        if not re.fullmatch(r"pytorch_model[\w.-]*\.bin", name) or not (folder / name).is_file():
            raise A3Error(
                f"{folder}: no {name}, expected {WHOLE}, or pytorch_model-….bin as {INDEX} names "
                "them, in this folder. Add it."
            )
    return {n: f"{n.replace('pytorch_', '', 1).removesuffix('.bin')}.safetensors" for n in names}


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Tensors of a .bin file by their names; A3Error, and nothing run, where it holds others."""
    # Files from before 2020 are no zip, and cannot be mapped.
    options: dict[str, Any] = {"map_location": "cpu", "mmap": zipfile.is_zipfile(path)}
    try:
        content = torch.load(path, weights_only=True, **options)
    except Exception as error:  # damaged or hostile files make torch raise almost any
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        found = f"it asks for {wanted[1]}" if wanted else f"{type(error).__name__}: damaged?"
        raise A3Error(
            f"{path}: not read, and none of its code was run: {found}; expected only tensors. Do "
            "not use this file; get the model with safetensors, or from a source you trust."
        ) from error
    tensors = content if isinstance(content, dict) else {"": content}
    for name, value in tensors.items():
        strided = isinstance(value, Tensor) and value.layout == torch.strided
        if not (name and isinstance(name, str) and strided):
            raise A3Error(
                f"{path}: {name!r} is {type(value).__name__}; expected dense tensors by their "
                "names alone. Save the model's state_dict() alone."
            )
    return tensors


def tied_names(folder: Path) -> dict[str, str]:
    """Weights that transformers ties to others, and those others, by the folder's config."""
    return empty_model(load_config(folder)).all_tied_weights_keys


def distinct(tensors: dict[str, Tensor], tied: dict[str, str]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, without those that transformers ties on loading."""
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        other = tensors.get(tied.get(name, ""))
        if other is None or not same_memory(tensor, other):
            tensor = tensor.detach()
            view = tensor.untyped_storage().nbytes() != tensor.nbytes
            shared = any(tensor.data_ptr() == twin.data_ptr() for twin in kept.values())
            kept[name] = tensor.clone() if view or shared else tensor
    return {name: tensor.contiguous() for name, tensor in kept.items()}


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one."""
    return all(
        getattr(one, what)() == getattr(other, what)() for what in ("data_ptr", "size", "stride")
    )
