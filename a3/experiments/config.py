"""Reads the workflow's configuration: validates it against the schema and adds the catalogue.

Read by the Snakefile at every start, so nothing heavy is imported here.
"""

import difflib
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema

from a3.core.errors import A3Error
from a3.core.files import HIDDEN_SEAL, load_yaml
from a3.experiments.entries import CATALOGUE
from a3.models.inputs import wheel_name, wheels_in

# A link, so that an installed a3 has it too.
SCHEMA = Path(__file__).parent / "config.schema.yaml"

# Sections of the catalogue.
SECTIONS = ("models", "texts", "perplexity", "harness", "quantisations")

# For each section, the folder with one subfolder per entry.
MADE = {"models": "models", "trained": "models", "texts": "texts", "items": "harness"}

# Refuse floats as integers: 512.0 would pass as a number of tokens and fail later.
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
        key=lambda error: [str(key) for key in error.absolute_path],
    )
    if not errors:
        return
    # With alternatives (`oneOf`), report the error of the closest one.
    error = jsonschema.exceptions.best_match(errors)
    where = ".".join(str(key) for key in error.absolute_path) or "the top level"
    if error.validator == "additionalProperties":
        known = sorted(error.schema["properties"])
        unknown = sorted(set(error.instance) - set(known))
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise A3Error(
            f"{what}: unknown key {unknown[0]!r} at {where}; expected one of "
            f"{', '.join(known)}.{hint}"
        )
    if error.validator == "not":
        raise A3Error(
            f"{what}: {where}: {error.instance!r} has no effect with this kind of source. Remove "
            "the key."
        )
    raise A3Error(f"{what}: {where}: {error.message}. Correct this key.")


def validate_entry(entry: Any, name: str, what: str) -> None:
    """Raise A3Error unless this is a valid entry of type `name`: model, text, quantisation …"""
    definitions = load_yaml(SCHEMA)["$defs"]
    validate(entry, {"$ref": f"#/$defs/{name}", "$defs": definitions}, what)


def require_plain(value: Any, where: str, what: str) -> None:
    """Raise A3Error for a key that is not a string, and for NaN and infinity.

    Strings must be usable in paths: neither NUL nor unpaired surrogates.
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
        raise A3Error(f"{what}: {where}: {value} is not a finite number. Correct this key.")
    elif isinstance(value, str) and not re.fullmatch("[^\\0\ud800-\udfff]*", value):
        raise A3Error(f"{what}: {where}: {value!r} has invalid characters. Correct this key.")


def complete(config: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Validate, add the catalogue's entries, and check that every name is defined.

    Returns a new dictionary in which each calibration, perplexity and harness entry has all of its
    keys (with the schema's defaults for missing ones).
    """
    validate(config, schema)
    catalogue = load_yaml(CATALOGUE)
    named = {key: catalogue[key] | config.get(key, {}) for key in SECTIONS}
    whole = with_defaults(config | named, schema, schema.get("$defs", {}))
    for section in ("calibrations", "heal", "perplexity", "harness"):
        for name, entry in whole[section].items():
            for text in texts_of(entry):
                defined("text", text, whole["texts"], f"{section}.{name}")
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
                f"config: harness.{name}.fewshot_as_multiturn requires a "
                "chat template. Set apply_chat_template too."
            )
    if dev := whole["evaluate"].get("fit", {}).get("dev"):
        defined("text", dev, whole["texts"], "evaluate.fit.dev")
        if not whole["texts"][dev].get("split", {}).get("dev"):
            raise A3Error(
                f"config: evaluate.fit.dev names {dev!r}, which has no dev split. Give texts.{dev} "
                "a share for dev (split), or name another text."
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
    """Raise A3Error if a source lies in a folder that the workflow writes, for any entry."""
    path = config[section][name]["source"].get("path")
    if path is None:
        return
    source = Path(path).resolve()
    for folder, of in MADE.items():
        for entry in config.get(of, {}):
            made = Path(config["results"], folder, entry)
            if made.resolve() in (source, *source.parents):
                raise A3Error(
                    f"config: {section}.{name}.source.path is {path}, in {made}, which the "
                    f"workflow deletes before it makes {of}.{entry}. Change results or the name."
                )


def check_models_made(config: dict[str, Any]) -> None:
    """Raise A3Error if a model's folder exists that no stage made.

    Snakemake would delete its config.json before a stage could refuse to write there.
    """
    for name in config["models"]:
        made = Path(config["results"], "models", name)
        if any(made.glob("*")) and not (made / HIDDEN_SEAL).exists():
            raise A3Error(
                f"config: models.{name} is made in {made}, which exists already and is not of this "
                "version of a3. Choose other results or another name, or delete it first."
            )


def check_mixture(name: str, texts: dict[str, Any], above: tuple[str, ...] = ()) -> None:
    """Raise A3Error if a mixture contains itself or undefined texts, or its sum is not 1."""
    shares = texts[name]["source"].get("mix", {})
    where = f"texts.{name}.source.mix"
    if shares and abs(sum(shares.values()) - 1) > 1e-6:
        raise A3Error(f"config: {where}: the shares' sum is {sum(shares.values())}. Make it 1.")
    for member in shares:
        defined("text", member, texts, where)
        if member in (*above, name):
            raise A3Error(
                f"config: {where} names {member!r}, which is itself a mixture of it. Remove it."
            )
        check_mixture(member, texts, (*above, name))


def texts_of(entry: dict[str, Any]) -> list[str]:
    """The texts that an entry names: one, those of a set, or none."""
    return entry.get("texts", [entry["text"]] if "text" in entry else [])


def calibrates(name: str, texts: dict[str, Any]) -> bool:
    """Whether a text has a calibration split.

    Then calibrations, mixtures and trained models read that split of it, and nothing else.
    """
    return texts[name].get("split", {}).get("calibration", 0) > 0


def members_of(name: str, texts: dict[str, Any]) -> list[str]:
    """The texts in a mixture, at any depth; the text itself if it is not a mixture."""
    mix = texts[name]["source"].get("mix", {})
    return [member for other in mix for member in members_of(other, texts)] if mix else [name]


def excluded(name: str, texts: dict[str, Any]) -> list[str]:
    """The texts that a text excludes; an excluded mixture counts as all its members."""
    return excluded_from(texts[name], texts)


def excluded_from(entry: dict[str, Any], texts: dict[str, Any]) -> list[str]:
    """As `excluded`, of an entry that need not be among the texts."""
    found = [member for other in entry.get("exclude", []) for member in members_of(other, texts)]
    return list(dict.fromkeys(found))


def check_made(name: str, source: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise A3Error if a model is made from a text or model that is not defined."""
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


def wheels_of(config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Every wheel that a model or text comes from, by its file name."""
    entries = [*config["models"].values(), *config["texts"].values()]
    wheels = [wheel for entry in entries for wheel in wheels_in(entry["source"])]
    return {wheel_name(wheel): wheel for wheel in wheels}


def prefer_own_scripts() -> None:
    """Make rules use the `a3` of the environment that runs Snakemake, activated or not."""
    scripts = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join((scripts, os.environ["PATH"]))
