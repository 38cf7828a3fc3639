"""Checks that a3 can read a folder as a model: complete, not an adapter or quantised, safetensors.

Every command, and `Checkpoint`, calls this before doing anything else with a folder.
"""

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.files import read_json

PICKLED = "pytorch_model*.bin*"

# Files of processors, which make inputs of images, beside those of their tokenizer.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")

# Files that transformers reads as JSON objects, if they exist.
OBJECTS = (
    *("config.json", "generation_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *PROCESSORS,
)

INDEX = "model.safetensors.index.json"

# Names of adapter files in peft, the library `adapters`, MLX and diffusers.
ADAPTER_CONFIG = "adapter_config.json"

ADAPTERS = (ADAPTER_CONFIG, "*adapter*.safetensors", "*adapter*.bin", "pytorch_lora_weights.*")

# Tensors that wrappers of trained adapters leave in saved checkpoints.
ADAPTER_TENSORS = re.compile(
    r"\.(base_layer|lora_\w+|loras|ia3_l|adapters|prefix_tunings|prompt_encoder|hada_w\w+|lokr_w\w+"
    r"|vera_\w+|oft_\w+|boft_\w+|modules_to_save|original_module)(\.|$)"
)

# Methods of peft that add tokens or prompts and change no weight.
PROMPTS = ("PROMPT", "P_TUNING", "PREFIX", "CPT")

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Buffers: kept RoPE pairs, positions, masks. GPT-2's masks are bytes and are named bias.
BUFFERS = ("I64", "BOOL")

# Quantisation methods; the first whose names match a tensor of the checkpoint applies.
METHODS = {
    r"\.qweight$": "GPTQ or AWQ",
    r"\.(SCB|weight_format)$|\.(absmax|quant_map|quant_state)\b": "bitsandbytes",
    r"\.weight_(packed|global_scale)$": "compressed-tensors",
    r"\.W_q$": "HQQ",
    r"\.?_?weight_?:?_?(qdata|int_data|tensor_impl)": "torchao",
    r"\.weight\._(data|scale)$": "quanto",
    r"_(blocks|scales)$": "mxfp4",
    r"\.weight_scale(_inv|s)?$": "fp8 or int8",
    r"\.scales$": "MLX or other scaled integers",
}

# The longest header that safetensors itself reads.
LARGEST_HEADER = 100_000_000

# Tensors with these names are scales of numbers that have a plain dtype.
SCALES = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|SCB|W_q|(weight|input)_(scale|zero_point)\w*)$"
)


def require_readable(folder: Path) -> None:
    """Raise A3Error, which says what to do, if a3 cannot read a folder as a model.

    Reasons are: a config that is not a JSON object or names an invalid end token, an unmerged
    adapter, pickled or quantised weights, and missing shards. A folder without weights is no error
    here, because config.json is enough for some commands.
    """
    refuse_wrong_objects(folder)
    refuse_adapter(folder)
    refuse_pickled(folder)
    refuse_missing_shards(folder)
    refuse_quantised(folder)


# --- configs --------------------------------------------------------------------------------------
def refuse_wrong_objects(folder: Path) -> None:
    """Raise A3Error if a small file is not a JSON object, or an end token is not a token id."""
    for name in OBJECTS:
        path = folder / name
        found = read_json(path) if path.is_file() else {}
        if not isinstance(found, dict):
            raise A3Error(
                f"{path}: found {type(found).__name__}, expected an object ({{…}}). Fetch it again."
            )
    end_tokens(folder)


def end_tokens(folder: Path) -> list[int] | None:
    """Ids of the tokens that end a text: of generation_config.json, else of config.json, if any.

    Raises A3Error if they are no ids.
    """
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = config_beside(path).get("eos_token_id")
        ids: list[Any] = found if isinstance(found, list) else [found]
        if found is not None and not all(type(each) is int for each in ids):
            raise A3Error(
                f"{path}: eos_token_id is {found!r}, expected a token's id or a list of ids. "
                "Correct it."
            )
        if found not in (None, []):
            return ids
    return None


# --- adapters -------------------------------------------------------------------------------------
def refuse_adapter(folder: Path) -> None:
    """Raise A3Error, which says how to merge it, for an adapter in a folder or its subfolders.

    transformers applies an adapter beside the weights only if peft is installed. Adapters in
    subfolders of a folder with weights are never read, so they are no error.
    """
    found = adapter_files(folder)
    if not found and not (folder / "config.json").exists():
        found = [file for below in sorted(folder.glob("*/")) for file in adapter_files(below)]
    if not found:
        return
    said = config_beside(found[0].parent / ADAPTER_CONFIG)
    inner = said.get("config")
    kind = said.get("peft_type") or (inner.get("architecture") if isinstance(inner, dict) else "")
    where = " and ".join(str(file.relative_to(folder)) for file in found[:2])
    apart = (
        f" If it is merged already, or not meant, move {where} out of the folder."
        if found[0].parent == folder and (folder / "config.json").exists()
        else ""
    )
    raise A3Error(
        f"{folder}: an unmerged adapter{f' ({kind})' if kind else ''}, {where}; "
        f"{how_to_merge(found[0].parent, said, str(kind or ''))}{apart}"
    )


def adapter_files(folder: Path) -> list[Path]:
    """Files of an adapter that lie in a folder, its config first."""
    found = (path for pattern in ADAPTERS for path in sorted(folder.glob(pattern)))
    return [path for path in dict.fromkeys(found) if path.is_file()]


def how_to_merge(folder: Path, said: dict[str, Any], kind: str) -> str:
    """Instructions for merging the adapter in a folder, from its config."""
    base = said.get("base_model_name_or_path") or said.get("model_name") or "BASE"
    if any(sign in kind.upper() for sign in PROMPTS):
        return (
            f"prompts change no weight and cannot be merged: name the model without it ({base}), "
            "or train an adapter of weights, such as LoRA."
        )
    if said and "peft_type" not in said and "model_class" in said:
        return (
            f"merge it first, with the library `adapters`: load {base}, load_adapter({folder!s}), "
            "merge_adapter, delete_adapter, save_pretrained(NEW), and name NEW."
        )
    return (
        "merge it first: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("
        f"{base!r}), {str(folder)!r}).merge_and_unload().save_pretrained(NEW), with the tokenizer "
        "beside it, and name NEW."
    )


def refuse_adapter_tensors(folder: Path, names: Iterable[str]) -> None:
    """Raise A3Error if an adapter was saved among the model's own tensors."""
    found = next((name for name in names if ADAPTER_TENSORS.search(name)), None)
    if found is not None:
        raise A3Error(
            f"{folder}: an unmerged adapter among its tensors ({found}); merge it first: "
            "merge_and_unload() of the PeftModel (`adapters`: merge_adapter, delete_adapter), then "
            "save_pretrained of what that returns."
        )


# --- weights --------------------------------------------------------------------------------------
def refuse_pickled(folder: Path) -> None:
    """Raise A3Error, with the command that converts it, where all weights are pickled."""
    if any(folder.glob("*.safetensors")) or not any(folder.glob(PICKLED)):
        return
    command = shlex.join(["a3", "convert", str(folder), "-o", f"{folder}-safetensors"])
    raise A3Error(
        f"{folder}: no .safetensors file; its weights are pickled (.bin), and reading a pickle can "
        f"run any code, so a3 does not. Convert them safely: {command}"
    )


def refuse_missing_shards(folder: Path) -> None:
    """Raise A3Error if a file of weights is a broken link, or a shard is missing."""
    for path in sorted(folder.glob("*.safetensors")):
        if not path.exists():
            raise A3Error(
                f"{path}: a link to {path.readlink()}, which is not there: the model that this "
                "folder was made of was moved or deleted. Put it back, or make the folder again: "
                f"{shlex.join(['a3', 'model', 'SOURCE', '-o', str(folder)])}"
            )
    present = {path.name for path in folder.glob("*.safetensors")}
    # A folder without weights is allowed: config.json may be enough.
    if present and (folder / INDEX).exists():
        shards(folder / INDEX)
        return
    if "model.safetensors" in present:
        return
    found = sorted(name for name in present if re.search(r"-\d+-of-\d+\.safetensors$", name))
    if found:
        raise A3Error(
            f"{folder}: {found[0]} is a shard, and there is no {INDEX} that says which tensors "
            "are in which. Fetch it, and all shards."
        )


def shards(index: Path) -> list[str]:
    """Names of the files in an index of shards; raises A3Error if one is missing."""
    names = weight_map_files(index)
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        listed = ", ".join(missing[:4]) + (" …" if len(missing) > 4 else "")
        raise A3Error(f"{index}: names {listed}, which are missing. Add them.")
    return names


def weight_map_files(index: Path) -> list[str]:
    """Names of the files in an index of shards; raises A3Error if the index is invalid."""
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(map(is_plain_name, names.values())):
        raise A3Error(
            f"{index}: expected a weight_map of tensors to files of this folder. Fetch or build "
            "it again."
        )
    return sorted(set(names.values()))


def is_plain_name(name: object) -> bool:
    """Whether this is a plain file name, without a path."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


# --- quantised ------------------------------------------------------------------------------------
def refuse_quantised(folder: Path) -> None:
    """Raise A3Error if the weights are quantised, by their tensors or by config.json.

    A config that declares quantisation of plain weights is refused too, and the error says what to
    delete: transformers would quantise them, or ask for a library that does.
    """
    tensors = stored_dtypes(folder)
    refuse_adapter_tensors(folder, tensors)
    config = config_beside(folder / "config.json")
    key, method = declared(config)
    if found := [name for name, dtype in tensors.items() if is_quantised(name, dtype)]:
        by = min(found, key=lambda name: tensors[name] in DTYPES)
        method = method or method_of(tensors) or f"{tensors[by]} numbers"
        what = "scales numbers of few bits" if tensors[by] in DTYPES else f"is {tensors[by]}"
        raise A3Error(
            f"{folder}: quantised ({method}); dequantise it first: {by} {what}, and a3 reads "
            f"{', '.join(DTYPES.values())} alone. Name the model before it was quantised, or save "
            "model.dequantize() of transformers where the method has it."
        )
    if key is None:
        return
    if tensors:
        raise A3Error(
            f"{folder / 'config.json'}: {key} says quantised ({method}), but the weights are "
            f"plain numbers. Delete {key} from it, if they were dequantised."
        )
    raise A3Error(
        f"{folder}: quantised ({method}); dequantise it first: {key} in config.json says so. Name "
        "the model before it was quantised."
    )


def is_quantised(name: str, dtype: str) -> bool:
    """Whether a tensor holds low-bit numbers or their scales."""
    plain = dtype in DTYPES or dtype in BUFFERS or name.endswith(".bias")
    return not plain or SCALES.search(name) is not None


def method_of(names: Iterable[str]) -> str | None:
    """What quantised a checkpoint with these tensors; None if they do not tell."""
    found = list(names)
    return next(
        (method for sign, method in METHODS.items() if any(re.search(sign, n) for n in found)), None
    )


def declared(config: dict[str, Any]) -> tuple[str | None, str]:
    """The key by which a config says that it is quantised, and the method; (None, "") for none."""
    for where, of in (("", config), ("text_config.", config.get("text_config") or {})):
        for key in ("quantization_config", "compression_config", "quantization"):
            # transformers treats an empty entry as a quantised model, too.
            if isinstance(of, dict) and (said := of.get(key)) is not None:
                method = said.get("quant_method") if isinstance(said, dict) else said
                return where + key, str(method or ("MLX" if key == "quantization" else "unnamed"))
    return None, ""


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Dtype of every tensor in a folder's safetensors, by its name."""
    files = folder.glob("*.safetensors") if folder.is_dir() else []
    found: dict[str, str] = {}
    for path in sorted(files):
        if not path.name.startswith("consolidated"):
            found |= header(path)
    return found


def header(path: Path) -> dict[str, str]:
    """Dtype of each tensor of a safetensors file; empty if it is damaged (opening it fails)."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            content = json.loads(stream.read(min(length, LARGEST_HEADER)))
    except (OSError, ValueError, RecursionError):
        return {}
    tensors = content.items() if isinstance(content, dict) else ()
    return {
        name: str(one["dtype"])
        for name, one in tensors
        if name != "__metadata__" and isinstance(one, dict) and "dtype" in one
    }


def config_beside(path: Path) -> dict[str, Any]:
    """A JSON object; {} if the file is missing or holds something else."""
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
