"""The workflow's configuration: validated against its schema, joined with the catalogue.

Read by the Snakefile at every start, so nothing heavy is imported here.
"""

import csv
import difflib
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema

from a3.errors import A3Error
from a3.files import load_yaml
from a3.recipes import PLAIN, parse_quantisation
from a3.results import Place
from a3.solutions.modes import PARTS, Choice, choose, kinds_needed
from a3.surgery import find_surgery, parse_size

CATALOGUE = Path(__file__).parent / "catalogue.yaml"
# A link, so that an installed a3 has it too.
SCHEMA = Path(__file__).parent / "config.schema.yaml"
# What the catalogue has entries of.
SECTIONS = ("models", "texts", "perplexity", "harness", "quantisations")
COLUMNS = ("model", "calibration", *PARTS, "ratio")
SURGERY_COLUMNS = ("model", "calibration", "mode", "size")
# Of tables with quantised rows one more.
QUANTISE = "quantise"


# A whole number has no point: 512.0 would pass for a number of tokens, and break what counts them.
STRICT = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: type(value) is int
    ),
)


def validate(config: Any, schema: dict[str, Any], what: str = "config") -> None:
    """Raise A3Error that names the first wrong key, what was found and what was expected.

    `what` is what the user calls it.
    """
    require_plain(config, "the top level", what)
    errors = sorted(
        STRICT(schema).iter_errors(config),
        key=lambda error: [str(part) for part in error.absolute_path],
    )
    if not errors:
        return
    # Of alternatives (`oneOf`), the one that came closest says what is wrong.
    error = jsonschema.exceptions.best_match(errors)
    where = ".".join(str(part) for part in error.absolute_path) or "the top level"
    if error.validator == "additionalProperties":
        known = sorted(error.schema["properties"])
        unknown = sorted(set(error.instance) - set(known))
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise A3Error(
            f"{what}: unknown key {unknown[0]!r} at {where}; expected one of "
            f"{', '.join(known)}.{hint}"
        )
    raise A3Error(f"{what}: {where}: {error.message}. Correct this key.")


def validate_entry(entry: Any, kind: str, what: str) -> None:
    """Raise A3Error unless this is what the config calls a `kind`: model, text, quantisation …"""
    definitions = load_yaml(SCHEMA)["$defs"]
    validate(entry, {"$ref": f"#/$defs/{kind}", "$defs": definitions}, what)


def require_plain(value: Any, where: str, what: str) -> None:
    """Raise A3Error for a key that is no text, as all keys of ours are, and for NaN and infinity.

    Text is of characters that a path can have: neither NUL nor half a surrogate pair.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise A3Error(f'{what}: the key {key!r} at {where}: expected text. Put it in "".')
            require_plain(item, key, what)
    elif isinstance(value, list):
        for item in value:
            require_plain(item, where, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise A3Error(f"{what}: {where}: {value} is no number. Correct this key.")
    elif isinstance(value, str) and not re.fullmatch("[^\\0\ud800-\udfff]*", value):
        raise A3Error(f"{what}: {where}: {value!r} has characters that are none. Correct this key.")


def complete(config: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Validate, add the catalogue's entries, and check that every name is defined.

    Returns a new dictionary in which each calibration, perplexity and harness entry has all of
    its keys (the schema's defaults where the file says nothing).
    """
    validate(config, schema)
    catalogue = load_yaml(CATALOGUE)
    named = {key: catalogue[key] | config.get(key, {}) for key in SECTIONS}
    whole = with_defaults(config | named, schema, schema.get("$defs", {}))
    for section in ("calibrations", "perplexity", "harness"):
        for name, entry in whole[section].items():
            if "text" in entry:
                defined("text", entry["text"], whole["texts"], f"{section}.{name}.text")
    for name, model in whole["models"].items():
        check_made(name, model["source"], whole)
        check_outside("models", name, whole)
    for name, text in whole["texts"].items():
        check_mixture(name, whole["texts"])
        check_outside("texts", name, whole)
        for other in text.get("exclude", []):
            defined("text", other, whole["texts"], f"texts.{name}.exclude")
    for name, entry in whole["harness"].items():
        if entry["fewshot_as_multiturn"] and not entry["apply_chat_template"]:
            raise A3Error(
                f"config: harness.{name}.fewshot_as_multiturn makes examples turns of a chat, and "
                "there is none. Set apply_chat_template too."
            )
    for section in ("perplexity", "harness", "speed"):
        for name in whole["evaluate"][section]:
            defined(section, name, whole[section], f"evaluate.{section}")
    return whole


def with_defaults(value: Any, schema: dict[str, Any], definitions: dict[str, Any]) -> Any:
    """`value` with the schema's defaults filled in, at every depth."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[-1]]
    if not isinstance(value, dict):
        return value
    fields = schema.get("properties", {})
    filled = {key: field["default"] for key, field in fields.items() if "default" in field} | value
    other = schema.get("additionalProperties", {})
    return {
        key: with_defaults(item, fields.get(key, other or {}), definitions)
        for key, item in filled.items()
    }


def defined(what: str, name: str, table: dict[str, Any], where: str) -> None:
    """Raise A3Error unless `name` is a key of `table`."""
    if name not in table:
        raise A3Error(
            f"config: {where} names the {what} {name!r}, which is not defined; defined are "
            f"{', '.join(sorted(table)) or 'none'}."
        )


def check_outside(section: str, name: str, config: dict[str, Any]) -> None:
    """Raise A3Error where a source is what the workflow would delete to make something of it."""
    path = config[section][name]["source"].get("path")
    made = Path(config["results"], section, name)
    if path is not None and made.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
        raise A3Error(
            f"config: {section}.{name}.source.path is {path}, and {made} is what is made of it and "
            "deleted before. Choose other results, or another name."
        )


def check_mixture(name: str, texts: dict[str, Any], above: tuple[str, ...] = ()) -> None:
    """Raise A3Error where a mixture is of itself or of texts not defined, or its sum is not 1."""
    shares = texts[name]["source"].get("mix", {})
    where = f"texts.{name}.source.mix"
    if shares and abs(sum(shares.values()) - 1) > 1e-6:
        raise A3Error(f"config: {where}: the shares' sum is {sum(shares.values())}. Make it 1.")
    for part in shares:
        defined("text", part, texts, where)
        if part in (*above, name):
            raise A3Error(f"config: {where} names {part!r}, which is a mixture of it. Take it out.")
        check_mixture(part, texts, (*above, name))


def parts_of(name: str, texts: dict[str, Any]) -> list[str]:
    """The texts that a text is a mixture of, at any depth; itself where it is none."""
    mix = texts[name]["source"].get("mix", {})
    return [part for other in mix for part in parts_of(other, texts)] if mix else [name]


def excluded(name: str, texts: dict[str, Any]) -> list[str]:
    """The texts that a text excludes; of a mixture, all that it is of."""
    found = [part for other in texts[name].get("exclude", []) for part in parts_of(other, texts)]
    return list(dict.fromkeys(found))


def check_made(name: str, source: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise A3Error where a model is made from a text or model that is not there."""
    if "train" in source:
        text = source["train"]["text"]
        defined("text", text, config["texts"], f"models.{name}.source.train.text")
    if "repeat_kv" in source:
        base = source["repeat_kv"]
        defined("model", base, config["models"], f"models.{name}.source.repeat_kv")
        if "repeat_kv" in config["models"][base]["source"]:
            raise A3Error(
                f"config: models.{name}.source.repeat_kv names {base!r}, whose heads are repeated "
                "already. Name another model."
            )


def texts_seen(row: dict[str, str], config: dict[str, Any]) -> dict[str, str]:
    """Texts that calibration or training has used for one row: what used it, and its name."""
    calibration = row["calibration"]
    seen = {f"calibration {calibration!r}": config["calibrations"][calibration]["text"]}
    model = row["model"]
    source = config["models"][model]["source"]
    if "repeat_kv" in source:
        model = source["repeat_kv"]
        source = config["models"][model]["source"]
    if "train" in source:
        seen[f"model {model!r}"] = source["train"]["text"]
    return seen


def read_experiments(path: Path, config: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of the experiments table, each with the keys of COLUMNS, all text.

    Raises A3Error, with the file's line, for wrong columns, names not defined, unknown modes,
    wrong sizes, two rows that say the same, and evaluation text that is calibrated on.
    """
    rows = read_rows(path, COLUMNS, "experiments", QUANTISE)
    seen: list[tuple[str, str, dict[str, Choice], str]] = []
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        check_row(row, config, where)
        # What a row says, however it is spelled: xkv@0.2 is xkv at the ratio 0.2.
        meaning = row["model"], row["calibration"], choose(row), row.get(QUANTISE, PLAIN)
        if meaning in seen:
            raise A3Error(f"{where}: says the same as row {seen.index(meaning) + 1}. Delete one.")
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
            raise A3Error(f"{where}: says the same as row {rows.index(row) + 1}. Delete one.")
    return rows


def read_rows(
    path: Path, columns: tuple[str, ...], key: str, optional: str | None = None
) -> list[dict[str, str]]:
    """Rows of a table, each with the keys `columns`, all text; `key` is what the config calls it.

    There may be one column more, `optional`. Raises A3Error where the file is missing, not a table,
    has other columns or no rows.
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
    path: Path, lines: list[str], columns: tuple[str, ...], optional: str | None = None
) -> list[dict[str, str]]:
    """Rows of the lines of a table; raises A3Error as `read_rows` does, and csv.Error."""
    reader = csv.DictReader(lines, delimiter="\t")
    if tuple(reader.fieldnames or ()) not in (columns, (*columns, optional)):
        more = f" (and {optional}, where rows have it)" if optional else ""
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
    """Raise A3Error where the method that rows are compared to is that of none of them."""
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
    except A3Error as error:
        raise A3Error(f"{where}: {error}") from error
    check_place(row, config, where)


def check_place(row: dict[str, str], config: dict[str, Any], where: str) -> None:
    """Raise A3Error for a model or calibration not defined, or text that is seen and scored."""
    try:
        defined("model", row["model"], config["models"], "model")
        defined("calibration", row["calibration"], config["calibrations"], "calibration")
    except A3Error as error:
        raise A3Error(f"{where}: {error}") from error
    texts = config["texts"]
    scored = [(s, n) for s in ("perplexity", "harness") for n in config["evaluate"][s]]
    for what, used in texts_seen(row, config).items():
        for seen in parts_of(used, texts):
            for section, name in scored:
                check_unseen(f"{where}: {what}", seen, section, name, config)


def check_unseen(what: str, seen: str, section: str, name: str, config: dict[str, Any]) -> None:
    """Raise A3Error where an entry is scored on a text that was `seen`, and does not leave it out.

    A protocol that scores all of a text, as published, leaves nothing out: only the same text is
    refused there.
    """
    entry, texts = config[section][name], config["texts"]
    text = entry.get("text")
    if text is None:
        return
    if entry.get("split") == "all":
        if seen in parts_of(text, texts):
            raise A3Error(
                f"{what} uses the text {seen!r}, and {section} {name!r} is scored on all of it. "
                "Calibrate on another text."
            )
    elif seen not in excluded(text, texts):
        raise A3Error(
            f"{what} uses the text {seen!r}, and {section} {name!r} is scored on {text!r} without "
            f"excluding it. Add {seen!r} to texts.{text}.exclude."
        )


def kinds_of(rows: list[dict[str, str]]) -> list[str]:
    """Statistics of dense models that all rows read, sorted."""
    kinds = {kind for row in rows for kind in kinds_needed(choose(row))}
    places = [Place(**row) for row in rows if row.get(QUANTISE, PLAIN) != PLAIN]
    return sorted(kinds.union(*(kinds_to_quantise(place) for place in places if place.is_whole)))


def kinds_to_quantise(place: Place) -> list[str]:
    """Statistics of a row's base that it is quantised by; none where it is not."""
    return parse_quantisation(place.quantise).kinds() if place.is_quantised else []


def wheels_of(config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Every wheel that a model or text comes from, by its file name."""
    entries = [*config["models"].values(), *config["texts"].values()]
    wheels = [entry["source"]["wheel"] for entry in entries if "wheel" in entry["source"]]
    return {f"{wheel['name']}-{wheel['version']}.whl": wheel for wheel in wheels}


def prefer_own_scripts() -> None:
    """Let rules find the `a3` of the environment that runs Snakemake, activated or not."""
    scripts = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join((scripts, os.environ["PATH"]))
