"""Converts compressed models to stock checkpoints, which their family's own code runs.

If all layers have the same sizes and keep the same RoPE pairs, a compressed model is a model of its
family with a smaller `head_dim`. The kept frequencies are no longer a geometric series, so they are
stored as factors on the frequencies of the smaller head (`longrope`). The softmax scale of the
dense model is folded into the queries.

A contiguous run of pairs is a RoPE of its own: pairs a … a + r/2 - 1 of a head of h dimensions turn
by θ^(-2(a + i)/h) = θ'^(-2i/r) / s, with θ' = θ^(r/h) and s = θ^(2a/h), which is a smaller base
and, where a > 0, `linear` scaling. Every runtime has these, so that no factors are needed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from a3.core.errors import A3Error
from a3.core.files import read_json
from a3.models.built import empty_model
from a3.models.checkpoint import Checkpoint
from a3.models.load import load_config
from a3.models.registry import dense_type
from a3.models.wrappers import held_by, text_of, wrapper_in

# Families whose own code takes `head_dim` and RoPE factors from the config.
FAMILIES = ("llama", "mistral", "ministral", "qwen2")

# RoPE types whose frequencies don't depend on the length; longrope only if its two lists agree.
FIXED = ("default", "linear", "llama3", "yarn", "longrope")

# Types whose frequencies are a geometric series.
PLAIN = ("default", "linear")

Q = re.compile(r"\.self_attn\.q_proj\.(weight|bias)$")

K = re.compile(r"\.self_attn\.k_proj\.(weight|bias)$")

PAIRS = ".rope_pairs"

# RoPE buffers in old checkpoints; models now compute them.
COMPUTED = ".rotary_emb.inv_freq"

LAYER = re.compile(r"model\.layers\.(\d+)\.")

# Keys under which configs of different versions have RoPE's parameters. (In these families only
# some types of RoPE use the last one.)
ROPE_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)

# Block size of llama.cpp's quantised caches, along a row.
BLOCK = 32

HOW = "One that it can: a3 compress MODEL --qk uniform-global --ov xkv --mlp rxx-w --ratio 0.25"

HOW_GGUF = "One that it can: a3 compress MODEL --preset a3-stock --ratio 0.2"

HOW_PLAIN = "Export the model that it was made of, or quantise weights alone (x, products: none)."


@dataclass(frozen=True)
class Stock:
    """A folder, dense or compressed, converted to a model of its family.

    `content` is the content of the new config.json, `q_scale` the factor on its queries, and
    `frequencies` (head_dim / 2,) the angles per position by which RoPE rotates each pair, float32.
    `mlp_ranks` are the intermediate sizes of all layers; the content has the first one.
    """

    folder: Path
    content: dict[str, Any]
    q_scale: float
    frequencies: Tensor
    mlp_ranks: list[int]

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The content as a config object of the family."""
        return CONFIG_MAPPING[self.content["model_type"]].from_dict(self.content)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tensors of the folder under the family's own names, except the kept pairs."""
        return Checkpoint(self.folder, "model")

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return 2 * len(self.frequencies)

    @property
    def theta(self) -> float:
        """Base of RoPE's frequencies."""
        return self.config.rope_parameters["rope_theta"]

    @property
    def linear(self) -> float | None:
        """The one divisor of all of RoPE's frequencies (1: none); None if each has its own."""
        rope = self.config.rope_parameters
        return {"default": 1.0, "linear": rope.get("factor")}.get(rope["rope_type"])

    @property
    def rope_factors(self) -> Tensor:
        """Divisors of RoPE's unscaled frequencies, (head_dim / 2,) float64."""
        return geometric(self.theta, self.head_dim) / self.frequencies.double()

    @cached_property
    def repaired(self) -> list[str]:
        """Quantised modules whose tensors A (in, k) and B (k, out) are added to their weight."""
        modules = quantised(self.folder)["modules"]
        return [name for name, said in modules.items() if said["rank"]]

    @property
    def folded(self) -> str:
        """A message about what happens to simulated low precision; empty if there is none."""
        if not self.repaired:
            return ""
        stored = {self.checkpoint.dtype(f"{name}.weight") for name in self.repaired}
        return (
            f"A B of {len(self.repaired)} matrices added to W in float64 and rounded to "
            f"{', '.join(sorted(stored))}, no longer numbers of few bits"
        )

    def names(self) -> list[str]:
        """Names of the tensors that the family's code reads; only these are kept.

        Raises A3Error if a folder has other tensors, because their effect would be lost.
        """
        read = set(empty_model(self.config).state_dict())
        used = {f"{name}.{factor}" for name in self.repaired for factor in "AB"}
        names = [name for name in self.checkpoint.names() if name not in used]
        if left := [name for name in names if name not in read and not self.ignored(name)]:
            raise A3Error(
                f"{self.folder}: {len(left)} tensors that {self.config.model_type} does not read, "
                f"{', '.join(left[:3])}{' …' if len(left) > 3 else ''}. The export would be "
                "another model without them: this one is not supported."
            )
        return [name for name in names if name in read]

    def ignored(self, name: str) -> bool:
        """Whether a model does not read a tensor: it is computed, or belongs to a dropped layer."""
        layer = LAYER.match(name)
        dropped = layer is not None and int(layer[1]) >= self.config.num_hidden_layers
        return dropped or name.endswith((PAIRS, COMPUTED))

    def tensor(self, name: str) -> Tensor:
        """One tensor, in its stored dtype; changes are computed in float64."""
        value = self.checkpoint.tensor(name)
        module, scaled = name.removesuffix(".weight"), self.q_scale != 1 and Q.search(name)
        repaired = name.endswith(".weight") and module in self.repaired
        if not (repaired or scaled):
            return value
        exact = value.double()
        if repaired:
            A, B = (self.checkpoint.tensor(f"{module}.{factor}").double() for factor in "AB")
            exact += (A @ B).T
        return (exact * self.q_scale if scaled else exact).to(value.dtype)

    def files(self) -> Iterator[dict[str, Tensor]]:
        """The tensors, file by file; only one file is in memory at a time."""
        read = set(self.names())
        for names in self.checkpoint.files().values():
            yield {name: self.tensor(name) for name in names.values() if name in read}


def stock(folder: Path, by_layer: bool = False) -> Stock:
    """Convert a dense or compressed folder to a model of its family.

    `by_layer`: the runtime takes MLPs of other sizes in each layer. Raises A3Error, with all
    reasons and how to make one that is, where it is none.
    """
    if wrapper := wrapper_in(read_json(folder / "config.json")):
        raise A3Error(f"{folder}: {held_by(wrapper)}. Run it in transformers, after import a3.")
    if found := obstacles(folder, by_layer):
        how = HOW_GGUF if by_layer else HOW
        how = HOW_PLAIN if found == precision_obstacles(quantised(folder)) else how
        raise A3Error(f"{folder}: its family's own code cannot run it: {'; '.join(found)}. {how}")
    dense, kept, content = dense_config(folder), kept_pairs(folder), own_content(folder)
    rope, frequencies = dict(dense.rope_parameters), rotary(dense).inv_freq
    rope.pop("partial_rotary_factor", None)
    if kept is None:
        ranks = [dense.intermediate_size] * dense.num_hidden_layers
        return Stock(folder, content | {"rope_parameters": rope}, 1.0, frequencies, ranks)
    a3 = read_json(folder / "config.json")["a3"]
    whole = len(kept) == len(frequencies)
    if not whole:
        rope = kept_rope(dense, kept, frequencies)
    # A full-size head has exactly the family's own scale.
    q_scale = 1.0 if whole else a3["scaling"] * (2 * len(kept)) ** 0.5
    content |= {"rope_parameters": rope}
    return Stock(folder, content, q_scale, frequencies[kept], a3["mlp_ranks"])


def llama_cpp_cache(head_dim: int) -> str:
    """The KV-cache types that work in llama.cpp for this head size."""
    if head_dim % BLOCK == 0:
        return "every type of KV cache"
    return (
        f"keys in f32, f16 or bf16 only: heads of {head_dim} are no multiple of {BLOCK}, and with "
        "quantised keys (q8_0, q4_0 …) and no flash attention, llama.cpp gives NaN without a "
        "message, or aborts. --multiple 32 takes sizes that every type of KV cache has"
    )


def kept_type(rope_type: str, kept: list[int], whole: int) -> str:
    """The type of RoPE that the pairs `kept` of `whole` ones have, of a RoPE of a type."""
    first = kept[0]
    if len(kept) == whole:
        return rope_type
    if rope_type not in PLAIN or kept != list(range(first, first + len(kept))):
        return "longrope"
    return "linear" if first else rope_type


def kept_rope(dense: PreTrainedConfig, kept: Tensor, frequencies: Tensor) -> dict[str, Any]:
    """RoPE's parameters of a smaller head with the pairs `kept` (r / 2,) of the dense model's
    `frequencies` (h / 2,): plain where the pairs are contiguous, else with factors (longrope)."""
    rope, rank = dense.rope_parameters, 2 * len(kept)
    theta, first = rope["rope_theta"], int(kept[0])
    if kept_type(rope["rope_type"], kept.tolist(), len(frequencies)) in PLAIN:
        head_dim = 2 * len(frequencies)
        base, factor = theta ** (rank / head_dim), theta ** (2 * first / head_dim)
        # A default RoPE may have a factor that nothing reads.
        factor *= rope["factor"] if rope["rope_type"] == "linear" else 1.0
        return plain_rope(base, factor)
    factors = geometric(theta, rank) / frequencies[kept].double()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "attention_factor": 1.0,
        # Some runtimes derive a factor from the ratio of this to max_position_embeddings.
        "original_max_position_embeddings": dense.max_position_embeddings,
    }


def plain_rope(theta: float, factor: float) -> dict[str, Any]:
    """RoPE's parameters for a geometric series whose frequencies are divided by a factor."""
    if factor == 1:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def obstacles(folder: Path, by_layer: bool = False) -> list[str]:
    """Reasons why the family's code cannot run a folder, dense or compressed; empty if it can.

    `by_layer`: sizes of MLPs may differ between layers.
    """
    load_config(folder)  # refuses an invalid config
    if wrapper := wrapper_in(read_json(folder / "config.json")):
        return [held_by(wrapper)]
    config = dense_config(folder)
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        return [f"a3 writes no ordinary checkpoints of {config.model_type} (of {known} it does)"]
    a3 = read_json(folder / "config.json").get("a3")
    found = [] if a3 is None else [*size_obstacles(a3, by_layer), *pair_obstacles(folder)]
    return [*found, *rope_obstacles(config), *precision_obstacles(quantised(folder))]


def quantised(folder: Path) -> dict[str, Any]:
    """The config's entry for simulated low precision: `modules` and `products`."""
    a3 = read_json(folder / "config.json").get("a3") or {}
    return a3.get("quantised") or {"modules": {}, "products": {}}


def precision_obstacles(said: dict[str, Any]) -> list[str]:
    """Effects of low precision that weights cannot store; `said` is from `quantised`."""
    rounded = {name: one["x"] for name, one in said["modules"].items() if one["x"] != "none"}
    found = []
    if rounded:
        formats = ", ".join(sorted(set(rounded.values())))
        found.append(f"the inputs of {len(rounded)} of its matrices are rounded ({formats})")
    if formats := ", ".join(sorted(set(said["products"].values()) - {"none"})):
        found.append(f"the operands of its attention are rounded ({formats})")
    return found


def size_obstacles(a3: dict[str, Any], by_layer: bool) -> list[str]:
    """Reasons in the sizes, which no family supports; `a3` is the entry of the config.

    `by_layer`: sizes of MLPs may differ between layers.
    """
    ranks = {"QK": a3["qk_ranks"], "OV": a3["ov_ranks"]}
    if not by_layer:
        ranks["MLP"] = a3["mlp_ranks"]
    found = [
        f"ranks of {component} differ between layers, {min(of)} to {max(of)}"
        for component, of in ranks.items()
        if len(set(of)) > 1
    ]
    qk, ov = a3["qk_ranks"][0], a3["ov_ranks"][0]
    if not found and qk != ov:
        found.append(f"a head has one size, and QK keeps {qk} dimensions, OV {ov}")
    if any(a3["factors"]):
        found.append("some of its matrices are factored")
    if a3["down_bias"]:
        found.append("its down projections have a bias")
    return found


def pair_obstacles(folder: Path) -> list[str]:
    """Whether layers or groups of a compressed model keep different RoPE pairs."""
    rows = {tuple(row) for pairs in all_pairs(folder) for row in pairs.tolist()}
    if len(rows) == 1:
        return []
    return [f"RoPE has one set of frequencies, and it keeps {len(rows)} different sets of pairs"]


def rope_obstacles(config: PreTrainedConfig) -> list[str]:
    """RoPE scalings that depend on the length or change the magnitude of scores."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (turned := 2 * len(rotary(config).inv_freq)) != head_dim:
        return [f"RoPE's tables are {turned} numbers wide and heads {head_dim}"]
    changes = kind == "longrope" and rope["short_factor"] != rope["long_factor"]
    if kind not in FIXED or changes:
        return [f"its RoPE is {kind}, whose frequencies depend on the length"]
    if (scale := rotary(config).attention_scaling) != 1:
        return [f"its RoPE, {kind}, multiplies queries and keys by {scale:.4g}"]
    return []


def all_pairs(folder: Path) -> list[Tensor]:
    """The RoPE pairs (G, r / 2) that each layer of a folder keeps; empty for a dense one."""
    checkpoint = Checkpoint(folder)
    return [checkpoint.tensor(name) for name in checkpoint.names() if name.endswith(PAIRS)]


def kept_pairs(folder: Path) -> Tensor | None:
    """The pairs (r / 2,) that a folder keeps in all layers; None for a dense one."""
    found = all_pairs(folder)
    return found[0][0] if found else None


def own_content(folder: Path) -> dict[str, Any]:
    """config.json of a folder in its family's form, without RoPE and references to code."""
    content = read_json(folder / "config.json")
    for key in (*ROPE_KEYS, "auto_map"):
        content.pop(key, None)
    if (a3 := content.pop("a3", None)) is None:
        return content
    return content | {
        "model_type": a3["family"],
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[a3["family"]]],
        "head_dim": a3["qk_ranks"][0],
        "intermediate_size": a3["mlp_ranks"][0],
    }


def rope_type(folder: Path) -> str:
    """The type of RoPE of a folder, dense or compressed."""
    rope = getattr(text_of(dense_config(folder)), "rope_parameters", None) or {}
    return rope.get("rope_type", "none")


def dense_config(folder: Path) -> PreTrainedConfig:
    """The config of a dense folder, or of the model that a compressed one was made of."""
    content = read_json(folder / "config.json")
    if "a3" not in content:
        return load_config(folder)
    family = dense_type(content.pop("a3"))
    try:
        return CONFIG_MAPPING[family].from_dict(content | {"model_type": family})
    # transformers raises exceptions of any type for values that contradict each other.
    except Exception as error:
        raise A3Error(
            f"{folder / 'config.json'}: not the config of a compressed {family} "
            f"({type(error).__name__}: {str(error).strip()}). Save or build the model again."
        ) from error


def rotary(config: PreTrainedConfig) -> Any:
    """The family's own module that computes RoPE's tables: `inv_freq`, `attention_scaling`."""
    name, family = type(config).__name__.removesuffix("Config"), config.model_type
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, f"{name}RotaryEmbedding")(config)


def geometric(theta: float, head_dim: int) -> Tensor:
    """RoPE's frequencies without scaling, (head_dim / 2,) float64."""
    return 1 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
