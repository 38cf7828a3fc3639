"""The compressed model that Hugging Face loads: its tensors really are smaller.

A compressed folder has model_type "a3" and, under `a3` in its config, the family it was made of and
the ranks of every layer. Its classes derive from the family's own: attention is replaced by
`A3Attention`, the MLP's projections are resized, everything else is transformers' code. Heads of QK
and OV have their own sizes, so the KV cache holds r_qk + r_ov numbers a key/value head.

This file needs nothing but torch and transformers: a copy of it travels in every compressed folder,
so that `trust_remote_code=True` loads it where a3 is not installed. With a3, this one is used.
"""

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.pytorch_utils import Conv1D

PEFT = "peft.utils.constants"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in halves on the p kept pairs, which come first: x (..., L, r), cos, sin (..., L, p)."""
    pairs = cos.shape[-1]
    first, second, rest = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def gather(table: Tensor, pairs: Tensor) -> Tensor:
    """The pairs (G, p) that each group kept, of a table (B, L, h) of all: (B, G, L, p)."""
    kept = table.index_select(-1, pairs.flatten())
    return kept.unflatten(-1, pairs.shape).transpose(1, 2)


def widen(x: Tensor, width: int) -> Tensor:
    """Fill the last dimension with zeros up to `width`; they change no score and no output."""
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


class LowRank(nn.Module):
    """Two factors in the place of a linear layer: the encoder's, then another.

    The other has the linear layer's own name, so that adapters by name (LoRA of "q_proj") are on
    it, and both are plain linear layers, on which adapters and quantisers know how to work.
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
def holder(dense: type[nn.Module], linears: tuple[str, ...]) -> type[nn.Module]:
    """A kind of the module `dense` whose code finds factored layers where it has `linears`.

    Libraries that go through a model's modules by name find the two factors of each, no product:
    of a name that an adapter is for they take linear layers only.
    """

    def product(linear: str) -> property:
        return property(lambda self: self._modules[product_name(linear)])

    def reduce(self: nn.Module) -> tuple:
        # No module has this class by its name, by which a pickle would look for it.
        return blank, (dense, linears), self.__dict__

    own = {"__module__": dense.__module__, "__qualname__": dense.__qualname__, "__reduce__": reduce}
    return type(dense.__name__, (dense,), own | {name: product(name) for name in linears})


def blank(dense: type[nn.Module], linears: tuple[str, ...]) -> nn.Module:
    """A `holder` without content, for pickles and copies to fill."""
    own = holder(dense, linears)
    return own.__new__(own)


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
        parent.__class__ = holder(type(parent), tuple(linears))


class HeadNorm(nn.Module):
    """RMS norm of q or k with each head's own gains, over each head or over all heads together."""

    def __init__(self, heads: int, rank: int, over_heads: bool, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, rank))
        self.dims = (-2, -1) if over_heads else (-1,)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., heads, r); computed in float32 at least, as by the families."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(self.dims, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


class A3Attention(nn.Module):
    """Attention with separate QK and OV head sizes and, per group, the kept RoPE pairs.

    Pair indices are kept as integers and the family's own float32 cos/sin are gathered: inverse
    frequencies in bfloat16 would be off by radians at position 2048. `dense` is the family's module
    in whose place this stands: windows and caps of the scores are taken from it.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int, dense: nn.Module) -> None:
        super().__init__()
        a3 = config.a3
        self.config = config
        self.layer_idx = layer_idx
        self.groups = a3["kv_heads"]
        self.num_key_value_groups = a3["heads"] // a3["kv_heads"]
        self.qk_rank = a3["qk_ranks"][layer_idx]
        self.ov_rank = a3["ov_ranks"][layer_idx]
        self.scaling = a3["scaling"]
        self.attention_dropout = dropout_of(dense)
        self.is_causal = True
        # What the family hands over to attention functions beside the scale.
        self.options = {}
        if hasattr(dense, "sliding_window"):
            self.options["sliding_window"] = dense.sliding_window
        # The family's own eager attention caps scores where the family does.
        family = import_module(type(dense).__module__)
        self.eager = getattr(family, "eager_attention_forward", eager_attention_forward)
        d, bias = config.hidden_size, a3["qkv_bias"]
        queries, keys = a3["heads"] * self.qk_rank, a3["kv_heads"] * self.qk_rank
        values, outputs = a3["kv_heads"] * self.ov_rank, a3["heads"] * self.ov_rank
        self.q_proj = nn.Linear(d, queries, bias)
        self.k_proj = nn.Linear(d, keys, bias)
        self.v_proj = nn.Linear(d, values, bias)
        self.o_proj = nn.Linear(outputs, d, a3["o_bias"])
        self.q_norm = self.k_norm = None
        if a3["qk_norm"]:
            over_heads = a3["qk_norm"] == "layer"
            self.q_norm = HeadNorm(a3["heads"], self.qk_rank, over_heads, config.rms_norm_eps)
            self.k_norm = HeadNorm(self.groups, self.qk_rank, over_heads, config.rms_norm_eps)
        self.resid_dropout = getattr(dense, "resid_dropout", nn.Identity())
        pairs = None
        if a3["rope"] and layer_idx not in a3["nope_layers"]:
            pairs = torch.arange(a3["rope_pairs"][layer_idx]).expand(self.groups, -1).contiguous()
        self.register_buffer("rope_pairs", pairs)
        # Whether cos and sin come as the kept pairs' already, gathered once for all layers.
        self.gathered = False

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, L, d); position_embeddings: the family's own cos and sin (B, L, h).

        Some families call the cache `layer_past`. The mask may carry ALiBi's bias.
        """
        batch, length, _ = hidden_states.shape
        past_key_values = past_key_values if layer_past is None else layer_past
        q, k = self.queries_and_keys(hidden_states, position_embeddings)
        v = self.v_proj(hidden_states).view(batch, length, self.groups, -1).transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager
        )
        dropout = self.attention_dropout if self.training else 0.0
        if length > 1:
            # The fused kernels want one head size; without it a prompt takes half as long again.
            q, k, v = (widen(x, max(self.qk_rank, self.ov_rank)) for x in (q, k, v))
        options = {"dropout": dropout, "scaling": self.scaling, **self.options, **kwargs}
        out, probabilities = attend(self, q, k, v, attention_mask, **options)
        out = out[..., : self.ov_rank].reshape(batch, length, -1)
        return self.resid_dropout(self.o_proj(out)), probabilities

    def queries_and_keys(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, d) to q (B, H, L, r) and k (B, G, L, r), normed and rotated as by the family."""
        heads = (*x.shape[:2], -1, self.qk_rank)
        q, k = self.q_proj(x).view(heads), self.k_proj(x).view(heads)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.unflatten(2, (self.groups, -1)).permute(0, 2, 3, 1, 4), k.transpose(1, 2)
        if self.rope_pairs is not None:
            cos, sin = position_embeddings if self.gathered else self.tables(position_embeddings)
            q, k = rotate(q, cos[:, :, None], sin[:, :, None]), rotate(k, cos, sin)
        return q.flatten(1, 2), k

    def tables(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The family's cos and sin (B, L, h) to those of the kept pairs, (B, G, L, p)."""
        cos, sin = position_embeddings
        return gather(cos, self.rope_pairs), gather(sin, self.rope_pairs)

    def after_rotary(
        self, rotary: nn.Module, inputs: tuple, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`tables`, as a hook of the family's rotary module."""
        return self.tables(position_embeddings)


class BloomAttention(A3Attention):
    """BLOOM hands over ALiBi beside the mask, and wants the residual added."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int, dense: nn.Module) -> None:
        super().__init__(config, layer_idx, dense)
        self.resid_dropout = nn.Dropout(dense.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states, residual (B, L, d); alibi (B · H, 1, K); attention_mask (B, 1, L, K)."""
        bias = alibi.unflatten(0, (hidden_states.shape[0], -1))
        mask = bias if attention_mask is None else bias + attention_mask
        out, probabilities = super().forward(
            hidden_states, attention_mask=mask, layer_past=layer_past
        )
        return out + residual, probabilities


class MptAttention(A3Attention):
    """MPT hands over ALiBi's bias for its longest context, and a mask that is true where hidden."""

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, L, d); position_bias (H, 1, K'); attention_mask (B, 1, L, K)."""
        bias = position_bias[:, :, -attention_mask.shape[-1] :].to(hidden_states.dtype)
        mask = bias.masked_fill(attention_mask, torch.finfo(bias.dtype).min)
        return super().forward(hidden_states, attention_mask=mask, past_key_values=past_key_values)


def scores_in_float32(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Eager attention of families that take it in float32 whatever the model's dtype is."""
    out, probabilities = eager_attention_forward(
        module, q.float(), k.float(), v.float(), mask, **options
    )
    return out.to(v.dtype), probabilities


class GPTNeoAttention(A3Attention):
    """GPT-Neo's local layers hide all but the last `window_size` keys; the mask is causal only."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int, dense: nn.Module) -> None:
        super().__init__(config, layer_idx, dense)
        self.eager = scores_in_float32
        self.local = dense.attention_type == "local"

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, L, d); attention_mask (B, 1, L, K)."""
        if self.local:
            length, seen = attention_mask.shape[-2:]
            keys = torch.arange(seen, device=attention_mask.device)
            oldest = keys[seen - length :, None] - self.config.window_size
            lowest = torch.finfo(attention_mask.dtype).min
            attention_mask = attention_mask.masked_fill(keys <= oldest, lowest)
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)


class GPTJAttention(A3Attention):
    """GPT-J hands over positions; each of its layers has a table of their sines and cosines."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int, dense: nn.Module) -> None:
        super().__init__(config, layer_idx, dense)
        self.eager = scores_in_float32

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (B, L, d); position_ids (B or 1, L)."""
        dims = torch.arange(0, self.config.rotary_dim, 2, device=hidden_states.device)
        frequencies = 1 / 10000 ** (dims / self.config.rotary_dim)
        angles = position_ids[..., None].float() * frequencies
        tables = (angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype))
        return super().forward(hidden_states, tables, **kwargs)


class CohereAttention(A3Attention):
    """Cohere's tables have every angle twice, side by side."""

    def tables(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """As in A3Attention."""
        cos, sin = position_embeddings
        return super().tables((cos[..., ::2], sin[..., ::2]))


class Gemma2Attention(A3Attention):
    """Gemma 2 caps its scores. Gemma 3 has the key, too, and ignores it."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int, dense: nn.Module) -> None:
        super().__init__(config, layer_idx, dense)
        self.options["softcap"] = dense.attn_logit_softcapping


# Families whose layers call their attention, or rotate, in a way of their own.
ATTENTION = {
    "bloom": BloomAttention,
    "cohere": CohereAttention,
    "cohere2": CohereAttention,
    "gemma2": Gemma2Attention,
    "gpt_neo": GPTNeoAttention,
    "gptj": GPTJAttention,
    "mpt": MptAttention,
}


def dropout_of(attention: nn.Module) -> float:
    """Dropout of the attention probabilities, by whichever name a family has for it."""
    names = ("attention_dropout", "attn_dropout", "attn_dropout_p", "dropout")
    found = next((getattr(attention, name) for name in names if hasattr(attention, name)), 0.0)
    return found.p if isinstance(found, nn.Dropout) else found


class Expert(nn.Module):
    """A gated MLP of `rank` channels, without its activation function."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, rank, bias=False)
        self.up_proj = nn.Linear(hidden_size, rank, bias=False)
        self.down_proj = nn.Linear(rank, hidden_size, bias=False)


class Experts(nn.ModuleList):
    """A mixture's experts, each of its own size: those that few tokens reached are dense."""

    def __init__(self, dense: nn.Module, ranks: list[int]) -> None:
        super().__init__(Expert(dense.hidden_dim, rank) for rank in ranks)
        self.act_fn = dense.act_fn

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """hidden_states (T, d); index and weights (T, top k): where each token goes."""
        out = torch.zeros_like(hidden_states)
        for number in index.unique().tolist():
            token, place = torch.where(index == number)
            expert, x = self[number], hidden_states[token]
            x = expert.down_proj(self.act_fn(expert.gate_proj(x)) * expert.up_proj(x))
            out.index_add_(0, token, (x * weights[token, place, None]).to(out.dtype))
        return out


def compress(body: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give every layer of a family's model without a head its own sizes."""
    a3 = config.a3
    attention = ATTENTION.get(a3["family"], A3Attention)
    for layer, rank in enumerate(a3["mlp_ranks"]):
        places = {
            projection: inside(name).format(layer) for projection, name in a3["modules"].items()
        }
        where = places.pop("attention")
        body.set_submodule(where, attention(config, layer, body.get_submodule(where)))
        if name := places.pop("experts", None):
            body.set_submodule(name, Experts(body.get_submodule(name), rank))
        for name in dict.fromkeys(places.values()):
            # More than one where gate and up are fused.
            projections = [projection for projection in places if places[projection] == name]
            body.set_submodule(name, resized(body.get_submodule(name), projections, rank, config))
        # A product stands under the name of the first of the projections that are fused.
        places |= {projection: f"{where}.{projection}_proj" for projection in "qkvo"}
        factorise(body, {places[projection]: of for projection, of in a3["factors"][layer].items()})
    if a3["same_pairs"]:
        gather_once(body)
    record_attentions(body)
    if "quantised" in a3:
        # Simulated by a3 only; such a folder does not load without it.
        import_module("a3.models.quantised").simulate(body, a3["quantised"])


def inside(name: str) -> str:
    """The name of a module in the model without a head, from that in the one with it."""
    return name.partition(".")[2]


def resized(
    dense: nn.Module, projections: list[str], rank: int, config: PreTrainedConfig
) -> nn.Linear | Conv1D:
    """The module of the MLP that is `projections` of it, gate, up or down, for `rank` channels."""
    d, down = config.hidden_size, projections == ["down"]
    inputs, outputs = (rank, d) if down else (d, rank * len(projections))
    if isinstance(dense, Conv1D):
        return Conv1D(outputs, inputs)
    bias = dense.bias is not None or (down and config.a3["down_bias"])
    return nn.Linear(inputs, outputs, bias)


def gather_once(body: PreTrainedModel) -> None:
    """Gather the kept pairs of cos and sin where they are made, and not in every layer."""
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
    """Let transformers record our attention's probabilities where it records the family's.

    It goes by the class of a module, in a table that each class of models has.
    """
    for model in body.modules():
        table = getattr(model, "_can_record_outputs", None) or {}
        if "attentions" in table:
            known = table["attentions"]
            known = known if isinstance(known, list) else [known]
            table["attentions"] = [*known, *([] if A3Attention in known else [A3Attention])]


class Compressed:
    """Mixed into a family's classes of models: layers differ in size."""

    # Flash attention's kernels want one head size for q, k and v.
    _supports_flash_attn = False

    # Files that stand beside the weights: of the tokenizer, where a3.compress made the model.
    beside: dict[str, bytes] = {}  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        body = self.base_model
        # Some classes with a head take ours for the model below it, which AutoModel knows.
        if body is self or not isinstance(body, Compressed):
            compress(body, config)
        self.post_init()

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As transformers does, and the files `beside`, first: it may upload the folder."""
        for name, content in self.beside.items():
            path = Path(save_directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        super().save_pretrained(save_directory, *args, **kwargs)


# What loads a family's models, without a head and with those that families have.
AUTO = (
    (AutoModel, MODEL_MAPPING),
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    (AutoModelForQuestionAnswering, MODEL_FOR_QUESTION_ANSWERING_MAPPING),
)


@cache
def classes(family: str) -> dict[str, type]:
    """Classes of a family's compressed models by the auto class that loads each, registered there.

    The configuration's `a3` holds: family, heads, kv_heads; `modules`, where attention, the MLP's
    projections or the experts are, {} for the layer; `scaling`, the dense model's softmax scale;
    qkv_bias, o_bias, `down_bias` that the family may not have; qk_norm; rope, nope_layers;
    `same_pairs`, whether all rotated layers kept the same pairs; `rope_pairs`, `qk_ranks`,
    `ov_ranks` and `mlp_ranks`, one number a layer (of experts, one list a layer); `factors`, a
    dictionary a layer, the rank of each factored matrix; `quantised`, where the
    model is (a3.models.quantised). head_dim stays the dense
    one, because RoPE's frequencies derive from it.
    """
    dense_config = CONFIG_MAPPING[family]
    config = type(
        f"A3{dense_config.__name__}",
        (dense_config,),
        {
            "__annotations__": {"a3": dict[str, Any] | None},
            "__module__": __name__,
            "a3": None,
            "model_type": "a3",
            "base_model_tp_plan": None,
            # What save_pretrained writes has this file beside it, too.
            "_auto_class": "AutoConfig",
        },
    )
    found: dict[str, type] = {"AutoConfig": config}
    for auto, mapping in AUTO:
        if dense_config in mapping:
            found[auto.__name__] = model_class(mapping[dense_config], config, auto)
            # Llama's model for question answering has another name for what its files call "model".
            found[auto.__name__].base_model_prefix = MODEL_MAPPING[dense_config].base_model_prefix
    return found


def model_class(
    dense: type[PreTrainedModel], config: type[PreTrainedConfig], auto: type
) -> type[PreTrainedModel]:
    """The compressed kind of one of a family's classes of models, known to the auto class."""
    own = {"__module__": __name__, "config_class": config, "_auto_class": auto.__name__}
    model = type(f"A3{dense.__name__}", (Compressed, dense), own)
    # What a family's files call otherwise than its modules, ours call alike.
    renaming = get_checkpoint_conversion_mapping(dense.__name__)
    if renaming is not None:
        register_checkpoint_conversion_mapping(model.__name__, renaming, overwrite=True)
    auto.register(config, model)
    return model


def adapt_by_default(constants: ModuleType) -> None:
    """Tell peft where adapters of a compressed model are if nobody says: where they are in Llama.

    `constants` is peft.utils.constants: tables of such modules, one a method, by model_type. The
    modules of attention have Llama's names in every family's compressed models, others do not.
    """
    attention = {f"{projection}_proj" for projection in "qkvo"}
    tables = [
        vars(constants)[name] for name in dir(constants) if name.endswith("_TARGET_MODULES_MAPPING")
    ]
    for table in tables:
        if table.get("llama") and attention.issuperset(table["llama"]):
            table["a3"] = table["llama"]


# Where peft is imported later, a3 sees to it (a3/__init__.py).
if PEFT in sys.modules:
    adapt_by_default(sys.modules[PEFT])


def __getattr__(name: str) -> type:
    """The classes as `auto_map` calls them: "A3LlamaConfig", "A3LlamaForCausalLM"."""
    dense = getattr(transformers, name.removeprefix("A3"), None) if name.startswith("A3") else None
    if dense is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = dense if issubclass(dense, PreTrainedConfig) else dense.config_class
    return next(own for own in classes(config.model_type).values() if own.__name__ == name)
