"""The compressed model that Hugging Face loads: its tensors really are smaller.

A compressed folder has model_type "a3" and, under `a3` in its config, the family it was made of and
the ranks of every layer. Its classes derive from the family's own. `A3Attention` replaces
attention, the MLP's projections are resized, and everything else is transformers' code. QK and OV
have different head sizes, so the KV cache holds r_qk + r_ov numbers per key/value head.

This file, attention_a3.py, experts_a3.py and own_attention_a3.py need only torch and transformers.
Every compressed folder has copies of them, which `trust_remote_code=True` loads where a3 is not.
This file imports the others by relative names, so that transformers finds them. If a3 is installed,
a3's own files are used.
"""

import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from .attention_a3 import ATTENTION, A3Attention, UsualAttention
from .experts_a3 import Experts, routed_to
from .own_attention_a3 import Own

PEFT = "peft.utils.constants"


class LowRank(nn.Module):
    """Two factors in place of a linear layer: first the encoder, then the decoder.

    The decoder has the original layer's name, so adapters that select by name (LoRA of "q_proj")
    apply to it. Both are plain linear layers, which adapters and quantisers support.
    """

    def __init__(self, name: str, inputs: int, outputs: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.decoder = name
        self.encoder = nn.Linear(inputs, rank, bias=False)
        self.add_module(name, nn.Linear(rank, outputs, bias))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) to (..., outputs)."""
        return self.get_submodule(self.decoder)(self.encoder(x))


def product_name(linear: str) -> str:
    """The name of the factors in the place of a linear layer of this name."""
    return f"{linear}_factors"


@cache
def holder(dense: type, linears: tuple[str, ...]) -> type:
    """A class derived from that of `dense`, whose code finds factored layers in place of `linears`.

    Libraries that iterate over a model's modules find the two factors, and no module for their
    product: under the names that adapters select they accept only linear layers.
    """

    def product(linear: str) -> property:
        return property(lambda self: self._modules[product_name(linear)])

    def reduce(self: nn.Module) -> tuple:
        # No module has this class by its name, by which a pickle would look for it.
        return blank, (dense, linears), self.__dict__

    own = {"__module__": dense.__module__, "__qualname__": dense.__qualname__, "__reduce__": reduce}
    return type(dense.__name__, (dense,), own | {name: product(name) for name in linears})


def blank(dense: type, linears: tuple[str, ...]) -> nn.Module:
    """A `holder` without content, for pickles and copies to fill."""
    return object.__new__(holder(dense, linears))


def factorise(body: nn.Module, ranks: dict[str, int]) -> None:
    """Put factors in the place of linear layers, whose names and ranks are given."""
    found: dict[nn.Module, list[str]] = {}
    for name, rank in ranks.items():
        where, _, last = name.rpartition(".")
        parent, linear = body.get_submodule(where), body.get_submodule(name)
        outputs, inputs = (
            linear.weight.T.shape if isinstance(linear, Conv1D) else linear.weight.shape
        )
        product = LowRank(last, inputs, outputs, rank, linear.bias is not None)
        delattr(parent, last)
        parent.add_module(product_name(last), product)
        found.setdefault(parent, []).append(last)
    for parent, linears in found.items():
        parent.__class__ = holder(parent.__class__, tuple(linears))


def compress(body: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give every layer of a family's model without a head its own sizes."""
    a3 = config.a3
    # In a model of several modalities, the language model.
    trunk = body.get_submodule(a3.get("backbone", ""))
    for layer in range(len(a3["mlp_ranks"])):
        places = {
            projection: inside(name).format(layer) for projection, name in a3["modules"].items()
        }
        where = places.pop("attention", "")
        if any(layer not in a3["fixed"][component] for component in ("qk", "ov")):
            replace_attention(body, trunk.config, a3, layer, where)
        if layer not in a3["fixed"]["mlp"]:
            replace_mlp(body, trunk.config.hidden_size, a3, layer, places)
        # A factored layer has the name of the first of its fused projections.
        places |= {projection: f"{where}.{projection}_proj" for projection in "qkvo"}
        if a3["own"]:
            places |= {p: inside(n).format(layer) for p, n in a3["own"]["projections"].items()}
        factorise(body, {places[projection]: of for projection, of in a3["factors"][layer].items()})
    if a3["same_pairs"]:
        gather_once(trunk)
    record_attentions(body)
    if "quantised" in a3:
        # Only a3 simulates low precision; such a folder does not load without a3.
        import_module("a3.models.quantised").simulate(body, a3["quantised"])


def replace_attention(
    body: PreTrainedModel, config: PreTrainedConfig, a3: dict[str, Any], layer: int, where: str
) -> None:
    """Give a layer's attention its own head sizes; `config` is the layers'."""
    dense = body.get_submodule(where)
    if a3["own"]:
        # The family's own code, with smaller projections in place.
        own = a3["own"]
        names = {
            key: {p: inside(n) for p, n in own[key].items()} for key in ("projections", "norms")
        }
        Own(body, dense, a3 | {"own": own | names}, layer)
        return
    attention = ATTENTION.get(a3["family"], UsualAttention)
    body.set_submodule(where, attention(config, a3, layer, dense))


def replace_mlp(
    body: PreTrainedModel, hidden_size: int, a3: dict[str, Any], layer: int, places: dict[str, str]
) -> None:
    """Give a layer's MLP or experts, whose modules are at `places`, their own sizes."""
    rank, places = a3["mlp_ranks"][layer], dict(places)
    router = places.pop("router", None)
    if name := places.pop("experts", None):
        dense = body.get_submodule(name)
        # Of earlier folders, and where nothing is merged, there is no such key.
        merged = a3["merged"][layer] if "merged" in a3 else None
        routed = routed_to(merged, len(rank), len(dense.down_proj), layer)
        body.set_submodule(name, Experts(dense, rank, hidden_size, a3["down_bias"], routed))
        if router and merged is None and len(rank) < body.get_submodule(router).weight.shape[0]:
            # Tokens are not routed to experts that have been dropped.
            weight = body.get_submodule(router).weight
            body.get_submodule(router).weight = nn.Parameter(weight[: len(rank)].clone())
    for name in dict.fromkeys(places.values()):
        # More than one if gate and up are fused.
        projections = [projection for projection in places if places[projection] == name]
        dense, biased = body.get_submodule(name), a3["down_bias"]
        body.set_submodule(name, resized(dense, projections, rank, hidden_size, biased))


def inside(name: str) -> str:
    """A module's name in the model without a head, from its name in the model with a head."""
    return name.partition(".")[2]


def resized(
    dense: nn.Module, projections: list[str], rank: int, d: int, down_bias: bool
) -> nn.Linear | Conv1D:
    """The module of the MLP that is `projections` of it, gate, up or down, for `rank` channels."""
    down = projections == ["down"]
    inputs, outputs = (rank, d) if down else (d, rank * len(projections))
    if isinstance(dense, Conv1D):
        return Conv1D(outputs, inputs)
    bias = dense.bias is not None or (down and down_bias)
    return nn.Linear(inputs, outputs, bias)


def gather_once(body: PreTrainedModel) -> None:
    """Select the kept pairs of cos and sin once where they are computed, not in every layer."""
    rotary = getattr(body, "rotary_emb", None)
    rotated = [
        module
        for module in body.modules()
        if isinstance(module, A3Attention) and module.rope_pairs is not None
    ]
    if rotary is not None and rotated:
        rotary.register_forward_hook(rotated[0].after_rotary)
        for attention in rotated:
            attention.gathered = True


def record_attentions(body: PreTrainedModel) -> None:
    """Let transformers record our attention's probabilities like those of the family.

    transformers selects modules by class, in a table of each model class.
    """
    for model in body.modules():
        table = getattr(model, "_can_record_outputs", None) or {}
        if "attentions" in table:
            known = table["attentions"]
            known = known if isinstance(known, list) else [known]
            table["attentions"] = [*known, *([] if A3Attention in known else [A3Attention])]


class Compressed(PreTrainedModel):
    """Mixed into a family's classes of models: layers differ in size."""

    # Flash attention needs one head size for q, k and v.
    _supports_flash_attn = False

    # Files to save beside the weights: the tokenizer's, if a3.compress made the model.
    beside: dict[str, bytes] = {}  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        body = self.base_model
        # Some classes with a head take ours for the model below it, which AutoModel knows.
        if body is self or not isinstance(body, Compressed):
            compress(body, config)
        self.post_init()

    def initialize_weights(self) -> None:
        """As transformers does. Of classes that are not its own it passes by models that have no
        weights but in modules, and so by code that computes buffers which no file has."""
        super().initialize_weights()
        for model in self.modules():
            if isinstance(model, PreTrainedModel):
                model._init_weights(model)

    def _get_static_cache_init_shape(self) -> None:
        """No size: for a prompt in chunks, `generate` would make a static cache with the same size
        of all keys and values. Without one, each layer gets that of its first keys and values.
        """

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As transformers does, and the files `beside`, first: it may upload the folder."""
        for name, content in self.beside.items():
            path = Path(save_directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if "backbone" in self.config.a3:
            # The names in memory: parts of the model would change theirs, as the dense one does.
            kwargs = {"save_original_format": False} | kwargs
        super().save_pretrained(save_directory, *args, **kwargs)


# The auto classes that load a family's models, without a head and with each type of head.
AUTO = (
    (AutoModel, MODEL_MAPPING),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    (AutoModelForQuestionAnswering, MODEL_FOR_QUESTION_ANSWERING_MAPPING),
)


@cache
def classes(family: str) -> dict[str, type]:
    """Classes of a family's compressed models by the auto class that loads each, registered there.

    `family` may be the type of a model of several modalities. The configuration's `a3` holds:
    family, and the `structure` that a probe found of it; `wrapper`, the type of the model of
    several modalities that holds it, and `backbone`, where; heads, kv_heads; `modules`, where
    attention, the MLP's projections or the experts and their router are, {} for the layer;
    `scaling`, the dense model's softmax scale; `fixed`, by component the layers
    in which it is left as it was; `own` (own_attention_a3.Own), if attention is the family's own
    code, else None; qkv_bias, o_bias, `down_bias` that the family may not have; qk_norm, and
    `norm_eps` of these norms; rope, nope_layers; `same_pairs`, whether all rotated layers kept the
    same pairs;
    `rope_pairs`, `qk_ranks`, `ov_ranks` and `mlp_ranks`, one number a layer (of experts, one list a
    layer, of those that are left); `merged`, where experts were, a list a layer (or None) of the
    expert into which each dense one was; `factors`, a dictionary a layer, the rank of each factored
    matrix; `quantised`, where the model is (a3.models.quantised). head_dim stays the dense one,
    because RoPE's frequencies derive from it.
    """
    dense_config = CONFIG_MAPPING[family]
    made: dict[type, type[PreTrainedModel]] = {}
    config = type(
        f"A3{dense_config.__name__}",
        (dense_config,),
        {
            "__annotations__": {"a3": dict[str, Any] | None},
            "__module__": __name__,
            "a3": None,
            "model_type": "a3",
            "base_model_tp_plan": None,
            # save_pretrained also copies this file.
            "_auto_class": "AutoConfig",
        },
    )
    found: dict[str, type] = {"AutoConfig": config}
    for auto, mapping in AUTO:
        if dense_config in mapping:
            dense = mapping[dense_config]
            # Several auto classes may load the same one.
            model = made.get(dense) or model_class(dense, config, auto.__name__)
            made[dense] = model
            # Llama's model for question answering has another name for what its files call "model".
            body = MODEL_MAPPING[dense_config].base_model_prefix
            model.base_model_prefix = body or model.base_model_prefix
            auto.register(config, model)
            found[auto.__name__] = model
    return found


def model_class(
    dense: type[PreTrainedModel], config: type[PreTrainedConfig], auto: str
) -> type[PreTrainedModel]:
    """The compressed version of a family's model class, which an auto class loads."""
    own = {"__module__": __name__, "config_class": config, "_auto_class": auto}
    model = type(f"A3{dense.__name__}", (Compressed, dense), own)
    # Compressed files use the modules' names, even if the family's files use others.
    renaming = get_checkpoint_conversion_mapping(dense.__name__)
    if renaming is not None and "text_config" not in config.sub_configs:
        register_checkpoint_conversion_mapping(model.__name__, renaming, overwrite=True)
    return model


def adapt_by_default(constants: ModuleType) -> None:
    """Give peft default target modules for adapters of a compressed model: those of Llama.

    `constants` is peft.utils.constants, which has a table of such modules for each method, by
    model_type. Attention modules of every compressed model have Llama's names; other modules do
    not.
    """
    attention = {f"{projection}_proj" for projection in "qkvo"}
    tables = [
        vars(constants)[name] for name in dir(constants) if name.endswith("_TARGET_MODULES_MAPPING")
    ]
    for table in tables:
        if table.get("llama") and attention.issuperset(table["llama"]):
            table["a3"] = table["llama"]


# If peft is imported later, a3/__init__.py calls this.
if PEFT in sys.modules:
    adapt_by_default(sys.modules[PEFT])


def __getattr__(name: str) -> type:
    """The classes as `auto_map` calls them: "A3LlamaConfig", "A3LlamaForCausalLM"."""
    dense = getattr(transformers, name.removeprefix("A3"), None) if name.startswith("A3") else None
    if dense is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = dense if issubclass(dense, PreTrainedConfig) else dense.config_class
    return next(own for own in classes(config.model_type).values() if own.__name__ == name)
