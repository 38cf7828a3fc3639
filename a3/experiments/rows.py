"""Rows of an experiment table, checked against the configuration."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from a3.artifacts.places import Place
from a3.core.errors import A3Error
from a3.experiments.config import calibrates, defined, excluded, members_of, texts_of
from a3.solutions.modes import COMPONENTS, Choice, choose, kinds_needed
from a3.solutions.recipes import PLAIN, parse_quantisation
from a3.solutions.surgeries import find_surgery, parse_size

COLUMNS = ("model", "calibration", *COMPONENTS, "ratio")

SURGERY_COLUMNS = ("model", "calibration", "mode", "size")

# Tables with quantised or trained rows have more columns.
QUANTISE, HEAL = "quantise", "heal"


def texts_seen(row: dict[str, str], config: dict[str, Any]) -> dict[str, str]:
    """Texts that a row has used for calibration or training: the use, and the text's name."""
    calibration = row["calibration"]
    seen = {f"calibration {calibration!r}": config["calibrations"][calibration]["text"]}
    model = row["model"]
    source = config["models"][model]["source"]
    if "repeat_kv" in source:
        model = source["repeat_kv"]
        source = config["models"][model]["source"]
    if "train" in source:
        seen[f"model {model!r}"] = source["train"]["text"]
    if (name := row.get(HEAL, PLAIN)) != PLAIN:
        seen[f"heal {name!r}"] = config["heal"][name]["text"]
    return seen


def read_experiments(path: Path, config: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of the experiments table, each with the keys of COLUMNS, all text.

    Raises A3Error, with the file's line, for wrong columns, names not defined, unknown modes,
    wrong sizes, two rows that say the same, and evaluation text that is calibrated on.
    """
    rows = read_rows(path, COLUMNS, "experiments", (QUANTISE, HEAL))
    seen: list[tuple[str, str, dict[str, Choice], str, str]] = []
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        check_row(row, config, where)
        # Compare rows by meaning, not by spelling: xkv@0.2 is the same as xkv at ratio 0.2.
        then = (row.get(QUANTISE, PLAIN), row.get(HEAL, PLAIN))
        meaning = row["model"], row["calibration"], choose(row), *then
        if meaning in seen:
            raise A3Error(f"{where}: means the same as row {seen.index(meaning) + 1}. Delete one.")
        seen.append(meaning)
    check_reference(rows, config.get("reference"))
    return rows


def read_surgeries(path: Path, config: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of the table of surgeries, each with the keys of SURGERY_COLUMNS, all text.

    Raises A3Error, with the row, for wrong columns, names not defined, unknown modes, wrong sizes,
    two rows that say the same, and evaluation text that is calibrated on.
    """
    rows = read_rows(path, SURGERY_COLUMNS, "surgery.rows")
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        try:
            find_surgery(row["mode"])
            parse_size(row["size"])
        except A3Error as error:
            raise A3Error(f"{where}: {error}") from error
        check_place(row, config, where)
        if row in rows[: number - 1]:
            raise A3Error(f"{where}: means the same as row {rows.index(row) + 1}. Delete one.")
    return rows


def read_rows(
    path: Path, columns: tuple[str, ...], key: str, optional: tuple[str, ...] = ()
) -> list[dict[str, str]]:
    """Rows of a table, each with the keys `columns`, all text; `key` is the config's key for it.

    The table may also have columns of `optional`, in this order. Raises A3Error if the file is
    missing or not a table, or if it has other columns or no rows.
    """
    try:
        with path.open(newline="") as stream:
            lines = [line for line in stream if line.strip() and not line.startswith("#")]
    except OSError as error:
        raise A3Error(f"{path}: {error.strerror}. Correct {key} in the config.") from error
    except UnicodeDecodeError as error:
        raise A3Error(f"{path}: not UTF-8 ({error}). Save the table as UTF-8.") from error
    try:
        return check_table(path, lines, columns, optional)
    except csv.Error as error:
        raise A3Error(f"{path}: not a table ({error}). Correct it.") from error


def check_table(
    path: Path, lines: list[str], columns: tuple[str, ...], optional: tuple[str, ...] = ()
) -> list[dict[str, str]]:
    """Rows of the lines of a table; raises A3Error as `read_rows` does, and csv.Error."""
    reader = csv.DictReader(lines, delimiter="\t")
    found = tuple(reader.fieldnames or ())
    if found != (*columns, *(name for name in optional if name in found[len(columns) :])):
        more = f" (and {', '.join(optional)}, where rows have it)" if optional else ""
        raise A3Error(
            f"{path}: columns are {reader.fieldnames}, expected {', '.join(columns)}{more}, "
            "separated by tabs."
        )
    rows = list(reader)
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            cells = len(reader.fieldnames or ())
            raise A3Error(f"{path}: row {number}: expected {cells} cells separated by tabs.")
    if not rows:
        raise A3Error(f"{path}: no experiments. Add a row.")
    return rows


def check_reference(rows: list[dict[str, str]], reference: str | None) -> None:
    """Raise A3Error if no row has the method with which all rows are to be compared."""
    methods = sorted({Place(**row).method for row in rows})
    if reference is not None and reference not in methods:
        raise A3Error(
            f"reference is {reference!r}, expected the modes of a row of the table, joined by +: "
            f"{', '.join(methods)}."
        )


def check_row(row: dict[str, str], config: dict[str, Any], where: str) -> None:
    """Raise A3Error that starts with `where` for anything wrong in one row."""
    try:
        choose(row)
        if (cell := row.get(QUANTISE, PLAIN)) != PLAIN:
            recipe = parse_quantisation(cell).recipe
            defined("recipe", recipe, config["quantisations"], QUANTISE)
        check_heal(row, config)
    except A3Error as error:
        raise A3Error(f"{where}: {error}") from error
    check_place(row, config, where)


def check_heal(row: dict[str, str], config: dict[str, Any]) -> None:
    """Raise A3Error unless a row can be trained by its entry of the configuration."""
    if (name := row.get(HEAL, PLAIN)) == PLAIN:
        return
    defined("training", name, config["heal"], HEAL)
    if row.get(QUANTISE, PLAIN) != PLAIN or Place(**row).is_whole:
        raise A3Error(
            f"heal is {name!r}, but only a compressed row that is not quantised is trained. Write "
            f"{PLAIN} there."
        )


def check_place(row: dict[str, str], config: dict[str, Any], where: str) -> None:
    """Raise A3Error for an undefined model or calibration, or if a scored text was already seen."""
    try:
        defined("model", row["model"], config["models"], "model")
        defined("calibration", row["calibration"], config["calibrations"], "calibration")
    except A3Error as error:
        raise A3Error(f"{where}: {error}") from error
    texts = config["texts"]
    scored = [(s, n) for s in ("perplexity", "harness") for n in config["evaluate"][s]]
    dev = config["evaluate"].get("fit", {}).get("dev")
    for what, used in texts_seen(row, config).items():
        for seen in members_of(used, texts):
            for section, name in scored:
                check_unseen(f"{where}: {what}", seen, section, name, config)
            if dev:
                require_excluded(f"{where}: {what}", seen, "evaluate.fit.dev", dev, texts)


def check_unseen(what: str, seen: str, section: str, name: str, config: dict[str, Any]) -> None:
    """Raise A3Error if an entry scores a text that was `seen` and does not exclude it.

    A published protocol scores all of a text and excludes nothing, so only the same text is refused
    there. A text with a calibration split excludes that from its other splits.
    """
    entry, texts = config[section][name], config["texts"]
    for text in texts_of(entry):
        if entry.get("split") == "all":
            if seen in members_of(text, texts):
                raise A3Error(
                    f"{what} uses the text {seen!r}, and {section} {name!r} is scored on all of "
                    "it. Calibrate on another text."
                )
        else:
            require_excluded(what, seen, f"{section} {name!r}", text, texts)


def require_excluded(what: str, seen: str, scored: str, text: str, texts: dict[str, Any]) -> None:
    """Raise A3Error if the `text` that is `scored` does not exclude a text that was `seen`."""
    if seen not in excluded(text, texts) and not (seen == text and calibrates(text, texts)):
        raise A3Error(
            f"{what} uses the text {seen!r}, and {scored} is scored on {text!r} without excluding "
            f"it. Add {seen!r} to texts.{text}.exclude, or, if it is the same text, give it a "
            f"calibration split (texts.{text}.split)."
        )


def kinds_of(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Statistics of dense models that the rows read together, sorted."""
    kinds = {kind for row in rows for kind in kinds_needed(choose(row))}
    places = [Place(**row) for row in rows if row.get(QUANTISE, PLAIN) != PLAIN]
    return sorted(kinds.union(*(kinds_to_quantise(place) for place in places if place.is_whole)))


def kinds_to_quantise(place: Place) -> list[str]:
    """Statistics of a row's base that quantisation reads; empty if the row is not quantised."""
    return parse_quantisation(place.quantise).kinds() if place.is_quantised else []
