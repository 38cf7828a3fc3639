"""The model of a GGUF file: file and model must have exactly the same tensors."""

import re
from collections.abc import Callable

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from a3.core.errors import A3Error
from a3.models.built import empty_model
from a3.models.gguf import Gguf
from a3.models.gguf_rope import TENSORS

HEAD, EMBEDDING = "lm_head.weight", "token_embd.weight"

EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj")

# Biases that llama.cpp adds where a file has them, and transformers has all or none of.
OPTIONAL = re.compile(r"\.(self_attn|mlp)\.[a-z]+_proj\.bias$")


def load_gguf(file: Gguf, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a GGUF file whose config is known, float32, its tables of positions not made.

    Raises A3Error if its header makes no model, a tensor of the file has no place in the model,
    one of the model is missing or has another shape, and for one that is not finite.
    """
    try:
        model = empty_model(config, torch.float32)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # What the libraries say of sizes that they cannot make is of any type.
    except Exception as error:
        raise A3Error(
            f"{file.path}: cannot be read as a model ({type(error).__name__}: {error}). Fetch it "
            "again."
        ) from error
    sources = places(file, config, shapes)
    refuse_unused(file, [name for names in sources.values() for name in names])
    undo = UNDO.get(file.architecture, as_it_is)
    state = {}
    for name, names in sources.items():
        tensors = [undo(file.tensor(source), source, config) for source in names]
        value = torch.cat(tensors, dim=1) if len(tensors) > 1 else tensors[0] if tensors else None
        state[name] = torch.zeros(shapes[name]) if value is None else fit(file, value, shapes[name])
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model


def places(
    file: Gguf, config: PreTrainedConfig, shapes: dict[str, tuple[int, ...]]
) -> dict[str, list[str]]:
    """The file's tensors of each of the model's; none of a bias that llama.cpp leaves out."""
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    known = get_tensor_name_map(number, config.num_hidden_layers)
    found = {}
    for name in shapes:
        if match := EXPERTS.fullmatch(name):
            projections = ["gate", "up"] if match[2] == "gate_up" else ["down"]
            found[name] = [
                f"blk.{match[1]}.ffn_{projection}_exps.weight" for projection in projections
            ]
            continue
        source = known.get_name(
            name.removeprefix("transformer."), try_suffixes=(".weight", ".bias")
        )
        if name == HEAD and config.tie_word_embeddings:
            source = EMBEDDING
        optional = file.architecture == "llama" and OPTIONAL.search(name)
        found[name] = [] if optional and source not in file.tensors else [source or name]
    if lost := [source for of in found.values() for source in of if source not in file.tensors]:
        raise A3Error(f"{file.path}: no tensor {', '.join(lost[:4])}. Fetch or build it again.")
    return found


def refuse_unused(file: Gguf, used: list[str]) -> None:
    """Raise A3Error for tensors of a file that nothing reads."""
    if unused := sorted(file.tensors.keys() - {*used, *TENSORS}):
        raise A3Error(
            f"{file.path}: {', '.join(unused[:4])}{' …' if len(unused) > 4 else ''} "
            f"{'has' if len(unused) == 1 else 'have'} no place in the model that its header "
            f"describes ({file.architecture}). Name the folder in Hugging Face's layout instead."
        )


def fit(file: Gguf, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of the expected shape; raises A3Error for another."""
    if tuple(value.shape) != shape:
        raise A3Error(
            f"{file.path}: a tensor of {tuple(value.shape)} where its header describes {shape}. "
            "Fetch it again."
        )
    return value.contiguous()


def as_it_is(value: Tensor, name: str, config: PreTrainedConfig) -> Tensor:
    """A tensor that llama.cpp stores as transformers does."""
    return value


def llama(value: Tensor, name: str, config: PreTrainedConfig) -> Tensor:
    """Rows of q and k lie in RoPE's neighbours (2j, 2j + 1), in transformers in halves."""
    for projection, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        if f".attn_{projection}." in name and len(value) % (2 * heads) == 0:
            return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return value


def gemma(value: Tensor, name: str, config: PreTrainedConfig) -> Tensor:
    """Norms are stored with the 1 that the family's code adds."""
    return value - 1 if name.endswith("norm.weight") else value


def gpt2(value: Tensor, name: str, config: PreTrainedConfig) -> Tensor:
    """Its matrices are those of x W, not of W x."""
    turned = (".attn_qkv.weight", ".attn_output.weight", ".ffn_up.weight", ".ffn_down.weight")
    return value.T if name.endswith(turned) else value


def bloom(value: Tensor, name: str, config: PreTrainedConfig) -> Tensor:
    """Queries, keys and values of all heads, in transformers of one head after another."""
    if ".attn_qkv." not in name:
        return value
    return value.unflatten(0, (3, config.n_head, -1)).transpose(0, 1).flatten(0, 2)


UNDO: dict[str, Callable[[Tensor, str, PreTrainedConfig], Tensor]] = {
    "llama": llama,
    "gemma2": gemma,
    "gemma3": gemma,
    "gpt2": gpt2,
    "bloom": bloom,
}
