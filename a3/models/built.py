"""Builds a config's model without weights, to check descriptions against the family's own code.

A config may have keys that its family's code ignores, or uses only in some cases
(`partial_rotary_factor`, `head_dim`). So an adapter's description is compared with the modules that
the code builds.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from a3.core.errors import A3Error
from a3.models.sizes import component_of
from a3.models.wrappers import auto_class, text_of, wrapper_of

if TYPE_CHECKING:
    from a3.models.family import Family

# Names that families have for the softmax scale, and for modules that norm q or k.
SCALES = ("scaling", "inv_norm_factor", "softmax_scale")

NORMS = (
    *("q_norm", "k_norm", "q_layernorm", "k_layernorm", "q_ln", "k_ln"),
    *("query_layernorm", "key_layernorm"),
)

PARTIAL = "partial_rotary_factor"


class Uninitialised(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device it changes nothing, and takes most of the time."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The tensor as it is, for a function that would initialise it."""
        named = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


def empty_model(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model that transformers builds from a config, dense or compressed, on the meta device.

    It has no weights, but can run on the meta device (experts only in bfloat16). If transformers
    cannot build the model, its exception is passed on; it can be of any type.
    """
    plain = deepcopy(config)
    plain.return_dict = True
    with Uninitialised(), torch.device("meta"):
        # The attention that a config names may not be installed, and its masks may need real
        # values.
        model = auto_class(wrapper_of(config)).from_config(
            plain, dtype=dtype, attn_implementation="eager", trust_remote_code=False
        )
    return with_trunk(model.eval())


def with_trunk(model: PreTrainedModel) -> PreTrainedModel:
    """A model, whose `base_model` is the model without a head even if its class misnames that.

    As that of Llama 4's language model does.
    """
    if not hasattr(model, model.base_model_prefix) and type(model.config) in MODEL_MAPPING:
        model.base_model_prefix = MODEL_MAPPING[type(model.config)].base_model_prefix
    return model


def build(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """`empty_model` of a dense folder's config; raises A3Error if it cannot be built."""
    try:
        return empty_model(config)
    # The libraries raise exceptions of any type for invalid values.
    except Exception as error:
        raise A3Error(
            f"{folder / 'config.json'}: transformers cannot build this model "
            f"({type(error).__name__}: {str(error).strip()}). Correct it, or fetch it again."
        ) from error


def position_key(model: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    """The config's key for the number of positions if the model has a table of them."""
    count = getattr(config, "max_position_embeddings", None)
    rows = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    rows |= {len(buffer) for buffer in model.buffers() if buffer.ndim == 2}
    # Tables that are no buffers.
    every = [value for module in model.modules() for value in vars(module).values()]
    rows |= {len(x) for x in every if isinstance(x, torch.Tensor) and x.ndim == 2}
    return "max_position_embeddings" if count and rows & {count, count + 1, count + 2} else None


def rope_widths(body: nn.Module) -> set[int]:
    """How many dimensions the tables of a model's RoPE rotate."""
    widths = set()
    for name, table in body.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            widths.add(2 * table.shape[-1])
        elif name.endswith("embed_positions"):
            widths.add(table.shape[-1])
    return widths


def rotated_width(body: nn.Module) -> int:
    """How many dimensions of a head RoPE rotates: the width of the family's own tables.

    Raises A3Error if layers have tables of different widths, or none.
    """
    widths = rope_widths(body)
    if len(widths) != 1:
        raise A3Error(
            f"config.json: RoPE tables have the widths {sorted(widths)}; a3 supports models whose "
            "layers have one width. This model is not supported."
        )
    return widths.pop()


def require_agreement(
    folder: Path, family: "Family", fields: dict[str, Any], model: PreTrainedModel
) -> None:
    """Raise A3Error if the modules of `build` contradict `fields` or do not fit together.

    `family` is the adapter and `fields` its description. The check covers shapes and biases of
    projections (in a mixture only those of attention), norms of q and k, and softmax scales. With
    partial RoPE it also checks whether the code runs at all.
    """
    path = folder / "config.json"
    expected = family.shapes(fields)
    for layer in range(fields["layers"]):
        for name, (said, found) in compared(family, fields, expected, model, layer).items():
            if said != found and not (isinstance(said, float) and isclose(said, found)):
                raise A3Error(
                    f"{path}: a3 expects {name} to be {said}, and transformers' own code "
                    f"makes it {found}. This model is not supported."
                )
    if (
        fields["structure"] is None
        and fields["rope_layout"] is not None
        and rotated_in_part(fields, text_of(model.config))
    ):
        require_runs(path, model)


def compared(
    family: "Family",
    fields: dict[str, Any],
    expected: dict[str, tuple[int, ...]],
    model: PreTrainedModel,
    layer: int,
) -> dict[str, tuple[Any, Any]]:
    """The described and the built values of a layer, by name."""
    pairs: dict[str, tuple[Any, Any]] = {}
    solved = {c for c, layers in fields["fixed"].items() if layer not in layers}
    for projection in family.projections:
        if component_of(projection) not in solved:
            continue
        module = model.base_model.get_submodule(family.module(layer, projection))
        for field in ("weight", "bias"):
            name, value = family.name(layer, projection, field), getattr(module, field, None)
            pairs[name] = expected.get(name), None if value is None else tuple(value.shape)
    if "qk" not in solved:
        return pairs
    where = family.attention_module(layer)
    attention = model.get_submodule(where)
    normed = any(getattr(attention, name, None) is not None for name in NORMS)
    pairs[f"a norm of q and k in {where}"] = fields["qk_norm"] is not None, normed
    for name in SCALES:
        if hasattr(attention, name):
            pairs[f"{where}.{name}"] = fields["scaling"], getattr(attention, name)
    return pairs


def rotated_in_part(fields: dict[str, Any], config: PreTrainedConfig) -> bool:
    """Whether RoPE rotates only a part of a head, or the config says so without effect."""
    said = getattr(config, "rope_parameters", None) or {}
    every = [said, *(each for each in said.values() if isinstance(each, dict))]
    return fields["rope_dims"] != fields["head_dim"] or any(PARTIAL in each for each in every)


def require_runs(path: Path, model: PreTrainedModel) -> None:
    """Raise A3Error if the family's own code fails on two tokens, on the meta device.

    Some families' code builds RoPE's tables for a part of a head, but rotates the whole head.
    Tables that grow with the positions need real position values; they keep their first width.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            module.rope_type = dict.fromkeys(kinds, "default")
        elif kinds is not None:
            module.rope_type = "default"
    ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
    try:
        with torch.device("meta"), torch.no_grad():
            model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:
        raise A3Error(
            f"{path}: transformers' own code cannot run this model ({type(error).__name__}: "
            f"{str(error).strip()}). Check {PARTIAL} in it."
        ) from error
