"""The registry of modes: what each reads, where it fits, and how a ratio becomes a rank.

The mode `rxx-w` of part `mlp` is the function `rxx_w` of `a3.solutions.mlp`. Only names stand
here, so that the workflow and the command line read this table without importing torch.
"""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from a3.errors import A3Error

ROPE = ("mha-rope", "gqa-rope")
NOPE = ("mha", "gqa")
PARTS = ("qk", "ov", "mlp")
# The name, in every place where a mode is named, for a part that stays as it is.
DENSE = "dense"


@dataclass(frozen=True)
class Mode:
    """The statistics that a solution reads, in its order, and the types it fits."""

    kinds: tuple[str, ...]
    fits: tuple[str, ...]


MODES: dict[str, dict[str, Mode]] = {
    "qk": {
        "qk": Mode(("q_blocks", "k_blocks"), NOPE),
        "q-only": Mode(("q_blocks",), NOPE),
        "k-only": Mode(("k_blocks",), NOPE),
        "identity": Mode((), NOPE),
        "rxx-w-rxx": Mode(("q_blocks", "k_blocks"), ROPE),
        "rxx-w-rxx-uniform": Mode(("q_blocks", "k_blocks"), ROPE),
    },
    "ov": {
        "xkv": Mode(("v_blocks",), NOPE + ROPE),
        "axkv": Mode(("o_proj_blocks",), NOPE + ROPE),
        "identity": Mode((), NOPE + ROPE),
    },
    "mlp": {
        "rxx-w": Mode(("down_diagonal",), ("2-layer", "3-layer")),
        "rxx": Mode(("down_diagonal",), ("2-layer", "3-layer")),
    },
}


def find_mode(part: str, name: str) -> Mode:
    """The mode of a part; raises A3Error, listing those that exist, for a name not known."""
    if name not in MODES[part]:
        raise A3Error(
            f"{part} mode {name!r} is not known. Modes of {part}: "
            f"{', '.join(MODES[part])}, or {DENSE} to leave it as it is."
        )
    return MODES[part][name]


def check_fit(part: str, name: str, kind_of_part: str) -> None:
    """Raise A3Error where the mode does not fit the attention or MLP type, naming those that do."""
    if kind_of_part not in find_mode(part, name).fits:
        fitting = [other for other, mode in MODES[part].items() if kind_of_part in mode.fits]
        raise A3Error(
            f"{part} mode {name!r} does not fit {kind_of_part}. Modes that do: "
            f"{', '.join(fitting) or 'none'}, or {DENSE}."
        )


def kinds_needed(modes: dict[str, str]) -> list[str]:
    """Statistics that the given modes ({"qk": name, …}) read, sorted."""
    chosen = [find_mode(part, name) for part, name in modes.items() if name != DENSE]
    return sorted({kind for mode in chosen for kind in mode.kinds})


def parse_ratio(text: str) -> Decimal:
    """A compression ratio from text, exactly; raises A3Error outside [0, 1)."""
    try:
        ratio = Decimal(text)
    except InvalidOperation:
        raise A3Error(f"ratio {text!r} is not a number; expected one in [0, 1).") from None
    if not (ratio.is_finite() and 0 <= ratio < 1):
        raise A3Error(f"ratio is {text}; expected 0 (keep all) up to, but not including, 1.")
    return ratio


def rank_of(size: int, ratio: Decimal, multiple: int = 1, least: int = 1) -> int:
    """(1 - ratio) · size to the nearest multiple (of 2 for whole RoPE pairs), ties up.

    Raises A3Error where less than `least` would be left (2 where a RoPE pair has to stay).
    """
    rank = int((1 - ratio) * size / multiple + Decimal("0.5")) * multiple
    if rank < least:
        what = "RoPE pair" if least == 2 else "dimension"
        raise A3Error(f"ratio {ratio} of {size} leaves no {what}. Take a smaller ratio.")
    return rank
