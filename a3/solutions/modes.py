"""The registry of modes: which statistics each needs, what it fits, and how a size becomes a rank.

The mode `rxx-w` of the component `mlp` is the function `rxx_w` of `a3.solutions.mlp`. This table
has only names, so that the workflow and the command line can read it without importing torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation

from a3.core.errors import A3Error
from a3.solutions.target import Target, is_target

ROPE = ("mha-rope", "gqa-rope")

NOPE = ("mha", "gqa")

# MLPs; `experts` are many gated ones in a layer.
MLPS = ("2-layer", "3-layer")

EXPERTS = "experts"

COMPONENTS = ("qk", "ov", "mlp")

# The projections of each component.
PROJECTIONS = {"qk": ("q", "k"), "ov": ("v", "o"), "mlp": ("gate", "up", "down")}

# Head sizes that fused attention kernels of serving runtimes support.
SERVABLE = (64, 80, 96, 112, 120, 128, 256)

# Written in place of a mode for a component that is not compressed.
DENSE = "dense"

# Longest text of a size, in characters, because paths contain it.
LONGEST_RATIO = 20

# Written in place of the ratio if every compressed component has its own ratio or rank.
NO_RATIO = "-"

# Least squares overfits a short calibration. It is ridge-regularised, equivalent to so many
# pseudo-tokens of uncorrelated inputs of the same mean square (docs/log.md).
OV_PRIOR, MLP_PRIOR = 320, 4096

# Channels of the MLP on which its prior was measured. Of an expert with fewer, fewer weights are
# fitted to its tokens, and the prior is smaller in proportion.
PRIOR_CHANNELS = 1536

# Suffix of a mode whose size is an average, allocated across layers and components (a3 allocate).
SHARED = "~"

# Modes that support allocation: they predict the model's loss at each rank, in the same unit.
SHARING = {"qk": "fisher", "ov": "joint", "mlp": "obs"}

# QK modes with one set of RoPE pairs for the whole model, as stock checkpoints need. If they are
# allocated, all heads get one size, OV's too, and the budget is of parameters alone.
ONE_SIZE = ("uniform-global", "uniform-contiguous")

# All modes that `~` may follow.
MARKED = {component: (mode, *ONE_SIZE * (component == "qk")) for component, mode in SHARING.items()}

# What options name: the paper's modes, better ones beyond it (docs/log.md), and baselines.
PRESETS: dict[str, dict[str, str]] = {
    "a3": {"qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w"},
    "a3-plus": {component: mode + SHARED for component, mode in SHARING.items()},
    "a3-stock": {"qk": ONE_SIZE[0] + SHARED, "ov": "joint" + SHARED, "mlp": "obs" + SHARED},
    **{
        name: dict.fromkeys(COMPONENTS, name)
        for name in ("modegpt", "svd-llm", "svd-llm-v2", "asvd", "fwsvd", "svd")
    },
    "flap": {"qk": DENSE, "ov": DENSE, "mlp": "flap"},
    "wanda": {"qk": "wanda", "ov": DENSE, "mlp": "wanda"},
    "magnitude": {"qk": "abs-w", "ov": DENSE, "mlp": "abs-w"},
}

# What each preset is, in a line.
BRIEFS = {
    "a3": "the paper's modes",
    "a3-plus": "the most accurate: elimination by predicted loss, ranks allocated",
    "a3-stock": "the most accurate that stock llama.cpp runs: one head size for the model",
    "modegpt": "baseline: MoDeGPT, smaller heads and MLPs, one ratio for all layers",
    "svd-llm": "baseline: SVD-LLM, two factors in place of each matrix; the KV cache stays",
    "svd-llm-v2": "baseline: SVD-LLM with a ratio of its own for each matrix",
    "asvd": "baseline: ASVD, two factors, inputs scaled by their mean magnitude",
    "fwsvd": "baseline: FWSVD, two factors, rows weighted by Fisher information",
    "svd": "baseline: two factors by the weights alone",
    "flap": "baseline: FLAP, MLP channels that fluctuate least go into a bias",
    "wanda": "baseline: Wanda, structured: RoPE pairs and MLP channels by weight × activation",
    "magnitude": "baseline: RoPE pairs and MLP channels by the size of their weights",
}

# Ranks of models of one head size are multiples of these unless the plan has its own: of MLPs the
# block of llama.cpp's weight types, of heads what leaves several sizes below 64.
STOCK_STEPS = {"qk": 4, "ov": 4, "mlp": 32}


@dataclass(frozen=True)
class Mode:
    """The statistics that a solution reads, in argument order, and the types that it fits.

    For modes that replace each projection by two factors, `factors` maps the projection to the kind
    of its metric (a3.solutions.factors), None for no metric. Their ranks keep as many weights as
    modes that shrink heads or the intermediate size at the same ratio. With `latent`, the cache
    holds the product of the input and the first factor, which has the size of a smaller head. If
    the solution is ridge-regularised, it also gets `prior` divided by the number of tokens of the
    first kind. With `drops`, whole experts are dropped, and with `merges` they are merged with
    others: then the rank is how many there are left. With `aligned`, channels of experts are put in
    one order before. With `normed`, tokens are weighed as norms of
    outputs weigh them, where a model has these. With `biased`, the output gets a bias, which a
    family may lack.
    """

    kinds: tuple[str, ...]
    fits: tuple[str, ...]
    factors: Mapping[str, str | None] = field(default_factory=dict)
    latent: bool = False
    prior: int = 0
    drops: bool = False
    merges: bool = False
    aligned: bool = False
    normed: bool = False
    biased: bool = False

    @property
    def keeps_sizes(self) -> bool:
        """Whether heads or channels stay as many as they are."""
        return bool(self.factors) or self.of_experts

    @property
    def of_experts(self) -> bool:
        """Whether it makes experts fewer, and none of them smaller."""
        return self.drops or self.merges


@dataclass(frozen=True)
class Choice:
    """How to compress a component: its mode, and the ratio to remove (Decimal) or rank to keep.

    If it is `shared`, the ratio is the average over all shared components of the model, or there is
    a target that the model has to meet.
    """

    mode: str
    size: Decimal | int | Target
    shared: bool = False

    @property
    def name(self) -> str:
        """The mode as it is written in tables: `xkv`, `obs~`."""
        return self.mode + SHARED * self.shared

    def __str__(self) -> str:
        """The form used in tables: `xkv@0.3`."""
        return f"{self.name}@{self.size}"


def two_factors(component: str, metrics: dict[str, str] | None = None) -> Mode:
    """A mode that factors the matrices of a component, each by the metric of its input."""
    named = {name: metrics[name] if metrics else None for name in PROJECTIONS[component]}
    kinds = tuple(dict.fromkeys(kind for kind in named.values() if kind))
    return Mode(kinds, MLPS if component == "mlp" else NOPE + ROPE, named)


# Which statistic is the metric of a matrix's input. If the output is smaller than the input, the
# output's statistic is equivalent (a3.numerics.linalg.two_factors) and smaller.
METRICS: dict[str, dict[str, str] | None] = {
    "svd": None,
    "fwsvd": dict.fromkeys("qkv", "attention_fisher")
    | {"o": "o_proj_fisher"}
    | dict.fromkeys(("gate", "up"), "mlp_fisher")
    | {"down": "down_fisher"},
    "asvd": dict.fromkeys("qkv", "attention_input_abs")
    | {"o": "o_proj_input_abs"}
    | dict.fromkeys(("gate", "up"), "mlp_input_abs")
    | {"down": "down_input_abs"},
    "svd-llm": dict.fromkeys("qkv", "attention_input")
    | {"o": "o_proj_input"}
    | dict.fromkeys(("gate", "up"), "mlp_input")
    | {"down": "down_output"},
}

METRICS["svd-llm-v2"] = METRICS["svd-llm"]

FACTORED = {
    component: {name: two_factors(component, metrics) for name, metrics in METRICS.items()}
    for component in COMPONENTS
}

QK = ("q_blocks", "k_blocks")

MODES: dict[str, dict[str, Mode]] = {
    "qk": {
        "qk": Mode(QK, NOPE),
        "qk-cov": Mode((*QK, "k_mean"), NOPE),
        "q-only": Mode(("q_blocks",), NOPE),
        "k-only": Mode(("k_blocks",), NOPE),
        "identity": Mode((), NOPE),
        "rxx-w-rxx": Mode(QK, ROPE),
        "rxx-w-rxx-uniform": Mode(QK, ROPE),
        "uniform-global": Mode((*QK, "pair_gradient"), ROPE),
        "uniform-contiguous": Mode((*QK, "pair_gradient"), ROPE),
        "abs-w": Mode(QK, ROPE),
        "wanda": Mode((*QK, "attention_input_diagonal"), ROPE),
        "modegpt": Mode(QK, NOPE + ROPE),
        "palu": Mode(("k_blocks",), NOPE),
        "palu-rope": Mode(("attention_input",), ROPE, {"k": "attention_input"}, latent=True),
        "fisher": Mode((*QK, "pair_gradient"), ROPE),
        **FACTORED["qk"],
    },
    "ov": {
        "xkv": Mode(("v_blocks",), NOPE + ROPE),
        "axkv": Mode(("o_proj_blocks",), NOPE + ROPE),
        "identity": Mode((), NOPE + ROPE),
        "modegpt": Mode(("v_blocks",), NOPE + ROPE),
        "palu": Mode(("v_blocks",), NOPE + ROPE),
        "joint": Mode(
            ("o_proj_input", "attention_gradient"), NOPE + ROPE, prior=OV_PRIOR, normed=True
        ),
        **FACTORED["ov"],
    },
    "mlp": {
        "rxx-w": Mode(("down_diagonal",), (*MLPS, EXPERTS)),
        "rxx": Mode(("down_diagonal",), (*MLPS, EXPERTS)),
        "abs-w": Mode(("down_diagonal",), (*MLPS, EXPERTS)),
        "wanda": Mode(("down_diagonal",), (*MLPS, EXPERTS)),
        "flap": Mode(("down_diagonal", "down_mean"), (*MLPS, EXPERTS), biased=True),
        "modegpt": Mode(("down_input",), (*MLPS, EXPERTS)),
        "ls": Mode(("down_input",), (*MLPS, EXPERTS), prior=MLP_PRIOR, normed=True),
        "obs": Mode(("down_input", "mlp_gradient"), (*MLPS, EXPERTS), prior=MLP_PRIOR, normed=True),
        "frequency": Mode(("expert_norm",), (EXPERTS,), drops=True),
        "reap": Mode(("expert_norm",), (EXPERTS,), drops=True),
        "hc-smoe": Mode(("expert_output",), (EXPERTS,), merges=True),
        "m-smoe": Mode(("expert_norm", "router_logits"), (EXPERTS,), merges=True, aligned=True),
        **FACTORED["mlp"],
    },
}


def find_mode(component: str, name: str) -> Mode:
    """The mode of a component; for an unknown name raises A3Error, which lists the known ones."""
    if name not in MODES[component]:
        raise A3Error(
            f"{component} mode {name!r} is not known. Modes of {component}: "
            f"{', '.join(MODES[component])}, or {DENSE} to skip it."
        )
    return MODES[component][name]


def check_fit(component: str, name: str, layer_type: str) -> None:
    """Raise A3Error, which lists the modes that fit, if this one does not fit the type."""
    if layer_type not in find_mode(component, name).fits:
        fitting = [other for other, mode in MODES[component].items() if layer_type in mode.fits]
        raise A3Error(
            f"{component} mode {name!r} does not fit {layer_type}. Modes that do: "
            f"{', '.join(fitting) or 'none'}, or {DENSE}."
        )


def kinds_needed(choices: dict[str, Choice]) -> list[str]:
    """Statistics that the modes of the given components read, sorted."""
    chosen = [find_mode(component, choice.mode) for component, choice in choices.items()]
    return sorted({kind for mode in chosen for kind in mode.kinds})


def choose(row: Mapping[str, str]) -> dict[str, Choice]:
    """The choice for each component that a row (qk, ov, mlp, ratio) compresses.

    A component is `dense`, a mode, which takes the row's ratio, or a mode with its own size:
    `xkv@0.3` (a ratio) or `xkv@48` (a rank). `obs~` allocates the row's ratio across layers and all
    components with `~`. The ratio is `-` if no component uses it; in its place there may be targets
    (a3.solutions.target), if every compressed component is marked. Raises A3Error for an unknown
    mode, and for a size that is missing, unused or malformed.
    """
    ratio = row["ratio"]
    cells = {component: row[component] for component in COMPONENTS if row[component] != DENSE}
    choices = {component: parse_choice(component, cell, ratio) for component, cell in cells.items()}
    for component, choice in choices.items():
        find_mode(component, choice.mode)
    if ratio != NO_RATIO:
        parse_amount(ratio)
        if cells and all("@" in cell for cell in cells.values()):
            raise A3Error(
                f"ratio {ratio} has no effect: every compressed component has its own ratio or "
                f"rank. Remove it (in a table: {NO_RATIO})."
            )
    return choices


def eliminating(row: Mapping[str, str]) -> dict[str, str]:
    """The components of a row whose modes eliminate, so that `a3 losses` knows them, and the modes.

    Cells are as in `choose`; sizes and `~` make no difference.
    """
    modes = {one: row.get(one, DENSE).partition("@")[0] for one in COMPONENTS}
    modes = {component: mode.removesuffix(SHARED) for component, mode in modes.items()}
    return {component: mode for component, mode in modes.items() if mode == SHARING[component]}


def parse_choice(component: str, cell: str, ratio: str) -> Choice:
    """`xkv`, `xkv@0.3` or `xkv@48` of a row with this ratio; raises A3Error for the size only."""
    mode, at, size = cell.partition("@")
    if mode.endswith(SHARED):
        if at or ratio == NO_RATIO or mode[:-1] not in MARKED[component]:
            expected = " or ".join(name + SHARED for name in MARKED[component])
            raise A3Error(
                f"{component} is {cell!r}; expected {expected} and a ratio of "
                f"the row: {SHARED} allocates it by the loss that this mode estimates at each rank."
            )
        return Choice(mode[:-1], parse_amount(ratio), shared=True)
    if mode == DENSE:
        raise A3Error(
            f"{component} is {cell!r}: a skipped component has no ratio or rank. Write {DENSE}."
        )
    if at and not is_target(ratio):
        return Choice(mode, parse_size(size, f"{component} mode {cell!r}"))
    if ratio == NO_RATIO:
        raise A3Error(
            f"{component} mode {mode!r} has no ratio or rank. Give a ratio for all components, or "
            f"for this one: {mode}@0.2 removes a fifth, {mode}@48 keeps rank 48."
        )
    if is_target(ratio):
        marked = " or ".join(name + SHARED for name in MARKED[component])
        raise A3Error(
            f"{component} mode {mode!r}: {ratio} is for modes whose ranks are allocated. Take "
            f"{marked}, as --preset a3-plus does, or {DENSE}; or give a ratio."
        )
    return Choice(mode, parse_ratio(ratio))


def parse_amount(text: str) -> Decimal | Target:
    """What a row says in place of a size of its own: a ratio, or targets of allocated modes."""
    return Target.parse(text) if is_target(text) else parse_ratio(text)


def parse_size(text: str, where: str) -> Decimal | int:
    """A rank (an integer from 1 on) or a ratio; raises A3Error, which starts with `where`."""
    if re.fullmatch(r"[1-9][0-9]{0,17}", text):
        return int(text)
    try:
        return parse_ratio(text)
    except A3Error as error:
        raise A3Error(f"{where}: {error} A rank is an integer from 1 on.") from None


def parse_ratio(text: str) -> Decimal:
    """A compression ratio from text, exactly.

    Raises A3Error outside [0, 1), and for `0.20` or `.2`: paths contain the ratio's text, and each
    checkpoint must have only one path.
    """
    if len(text) > LONGEST_RATIO:
        raise A3Error(f"ratio {text[:LONGEST_RATIO]!r} …: expected fewer digits, such as 0.125.")
    try:
        ratio = Decimal(text)
    except InvalidOperation:
        raise A3Error(f"ratio {text!r} is not a number; expected one in [0, 1).") from None
    if not (ratio.is_finite() and 0 <= ratio < 1):
        raise A3Error(f"ratio is {text}; expected 0 (keep all) up to, but not including, 1.")
    if not re.fullmatch(r"0|0\.[0-9]*[1-9]", text):
        raise A3Error(f"ratio is {text!r}; spell it {abs(ratio.normalize()):f}.")
    return ratio


def rank_of(full: int, size: Decimal | int, multiple: int = 1, least: int = 1) -> int:
    """The rank that a size leaves of `full` dimensions.

    A ratio leaves (1 - ratio) · full to the nearest multiple (of 2 for whole RoPE pairs), ties up,
    and no more than `full`. Raises A3Error if less than `least` would be left (2 if a RoPE pair
    must remain), and for a rank that is not a multiple between `least` and `full`.
    """
    if isinstance(size, Decimal):
        rank = int((1 - size) * full / multiple + Decimal("0.5")) * multiple
        if rank < least:
            what = "RoPE pair" if least == 2 else "dimension"
            raise A3Error(f"ratio {size} of {full} leaves no {what}. Take a smaller ratio.")
        return min(rank, full)
    nearest = min(max(size // multiple * multiple, least), full)
    if size != nearest:
        even = "an even number, since RoPE turns pairs," if multiple == 2 else "one"
        raise A3Error(f"rank is {size}; expected {even} from {least} to {full}. Take {nearest}.")
    return size


# Modes whose ratio is allocated across layers.
ALLOCATED = ("svd-llm-v2",)
