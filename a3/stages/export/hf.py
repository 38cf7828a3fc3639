"""a3 export hf: converts a compressed folder to an ordinary checkpoint, which needs no a3."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from a3.artifacts.card import need_no_a3
from a3.artifacts.runtimes import HF, facts_of, warnings_of
from a3.artifacts.targets import EXPORTED
from a3.core.errors import A3Error
from a3.core.files import RECORDS, sha256, whole_folder, write_record
from a3.core.progress import LOG
from a3.core.provenance import provenance
from a3.models.arch import is_compressed
from a3.models.checkpoint import Checkpoint, combined, hash_files, model_source
from a3.models.folders import write_index
from a3.models.load import load_whole
from a3.models.older import older_rope
from a3.models.stock import Stock, stock
from a3.models.travel import bring


def export_hf(folder: Path, out: Path) -> None:
    """Write the compressed `folder` as a checkpoint of its family to `out`, whole or not at all.

    Tensors are unchanged, with two exceptions: the softmax scale is folded into the queries, and a
    quantised model's A B is added to its weights. Tokenizer, chat template, model card and
    generation config are copied. export.json records the source and the hash of each file. Raises
    A3Error, with all reasons, where the family's code cannot run it, where a tensor is left that it
    does not read, and where `out` is another's folder.
    """
    if not is_compressed(folder):
        raise A3Error(f"{folder}: an ordinary checkpoint already. Name a compressed folder.")
    model = stock(folder)
    with whole_folder(out, EXPORTED.seal, [folder]) as made:
        names = write_weights(model, made)
        content = model.content | older_rope(model.content)
        finish(made, folder, content, model.checkpoint, names, __name__, folded=model.folded)
    if model.folded:
        LOG.info(f"export: {model.folded}.")
    for warning in warnings_of(facts_of(model), HF):
        LOG.warning(f"export: {warning}.")


def write_weights(model: Stock, folder: Path) -> list[str]:
    """The tensors in the files that they were in; names of the files."""
    names = list(model.checkpoint.files())
    for name, tensors in zip(names, model.files(), strict=True):
        save_file(dict(sorted(tensors.items())), folder / name, {"format": "pt"})
    if len(names) > 1:
        write_index(folder, names)
    return names


def finish(
    made: Path,
    folder: Path,
    content: dict[str, Any],
    checkpoint: Checkpoint,
    names: list[str],
    stage: str,
    **more: Any,
) -> None:
    """Complete the folder `made`, which has files of weights, `names`, of the compressed `folder`.

    It gets the content of config.json, the small files beside it, and export.json, by the module
    `stage`. Raises A3Error if transformers would not find a tensor.
    """
    (made / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    bring(folder, made, "config.json", "timing.json", *RECORDS)
    need_no_a3(made)
    # Of all that transformers reads, nothing may be missing.
    load_whole(made, device_map="meta")
    files = hash_files(made)
    record = {
        "files": files,
        "weights_sha256": combined([files[name] for name in names]),
        "provenance": provenance(
            stage,
            checkpoint_sha256=checkpoint.sha256(),
            config_sha256=sha256(folder / "config.json"),
            model=model_source(folder),
            **more,
        ),
    }
    write_record(made / "export.json", record)
