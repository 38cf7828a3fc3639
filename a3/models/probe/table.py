"""The table of model types: which parts a3 compresses, by adapters and probes, and why not others.

`table.json` beside this file is written by docs/probe.py, and tests hold it to transformers' own
list of causal models and to probes.
"""

from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from a3.core.errors import A3Error
from a3.core.files import read_json
from a3.models.families import BACKBONES, FAMILIES, REFUSED
from a3.models.probe.probe import COMPONENTS, Outcome, probe
from a3.models.probe.tiny import require_causal, require_few_layers
from a3.models.wrappers import REFUSED_WRAPPERS, WRAPPERS

TABLE = Path(__file__).with_name("table.json")

ADAPTER = "adapter"

HELD = "held"


def read_table() -> dict[str, Any]:
    """transformers' version, and by type a row: in `types`, of causal types, `by`, the parts by
    component, and `why`; in `wrappers`, of models of several modalities, `text` and `why`.
    """
    return read_json(TABLE)


def row_of(model_type: str) -> dict[str, Any]:
    """The row of a type.

    `by` is "adapter" for families with one; "held" for the language model in a model of several
    modalities; "a3" or "own" where a probe confirmed a3's attention or
    the family's own; "mlp" where attention stays; "" if nothing is compressed, and `why` says it.
    """
    if model_type in FAMILIES:
        return {"by": ADAPTER, "parts": dict.fromkeys(COMPONENTS, "all"), "why": {}}
    if model_type in REFUSED | REFUSED_WRAPPERS:
        return nothing((REFUSED | REFUSED_WRAPPERS)[model_type])
    if model_type in WRAPPERS:
        text = CONFIG_MAPPING[model_type]().get_text_config().model_type
        return row_of(text) | {"by": HELD}
    try:
        outcome = probe(model_type)
    except A3Error as error:
        return nothing(str(error))
    return {"by": how(outcome), "parts": outcome.parts, "why": outcome.why}


def row_of_config(path: Path) -> dict[str, dict[str, Any]]:
    """The row of a config.json's type by its name, as `row_of`; probed even with an adapter.

    Raises A3Error for a type that transformers does not know, and where it cannot be probed.
    """
    content = read_json(path)
    found = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(found, str) or found not in CONFIG_MAPPING:
        raise A3Error(f"{path}: model_type is {found!r}, which transformers does not know.")
    require_few_layers(path, content)
    if found in REFUSED_WRAPPERS:
        return {found: nothing(REFUSED_WRAPPERS[found])}
    config, text = CONFIG_MAPPING[found].from_dict(content), found
    if found in WRAPPERS:
        text = config.get_text_config().model_type
        if text in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            config = config.get_text_config()
        if text in BACKBONES:
            return {found: {"by": HELD, "parts": dict.fromkeys(COMPONENTS, "all"), "why": {}}}
    else:
        require_causal(path, text)
    outcome = probe(config.model_type, config.to_dict())
    return {found: {"by": how(outcome), "parts": outcome.parts, "why": outcome.why}}


def nothing(why: str) -> dict[str, Any]:
    """The row of a type of which nothing is compressed, for one reason."""
    return {"by": "", "parts": dict.fromkeys(COMPONENTS, ""), "why": {"all": why}}


def how(outcome: Outcome) -> str:
    """Whose attention a probe confirmed."""
    if outcome.structure is None:
        return ""
    if not (outcome.parts["qk"] or outcome.parts["ov"]):
        return "mlp"
    return "own" if outcome.structure["own"] else "a3"


def lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Rows as text: a type, what is compressed, and why not the rest."""
    width = max(map(len, rows))
    return [
        f"{name:{width}}  {said_parts(row)}" + (f"  ({why})" if (why := said_why(row)) else "")
        for name, row in rows.items()
    ]


def wrapper_lines(rows: dict[str, dict[str, str]]) -> list[str]:
    """Rows of models of several modalities as text: a type, its language model's, and why not."""
    width = max(map(len, rows))
    return [f"{name:{width}}  {said_held(row)}" for name, row in rows.items()]


def said_held(row: dict[str, str]) -> str:
    """Whether the language model in a type is compressed, in words."""
    return f"unsupported  ({row['why']})" if row["why"] else f"as {row['text']}"


def said_parts(row: dict[str, Any]) -> str:
    """What is compressed, in words: "qk, ov, mlp (3 of 4 layers)"."""
    parts = [
        component if layers == "all" else f"{component} ({layers} layers)"
        for component, layers in row["parts"].items()
        if layers
    ]
    return ", ".join(parts) or "unsupported"


def said_why(row: dict[str, Any]) -> str:
    """Why components are not compressed, each reason once."""
    by_reason: dict[str, list[str]] = {}
    for component, why in row["why"].items():
        by_reason.setdefault(why, []).append(component)
    return "; ".join(
        why if components == ["all"] else f"{', '.join(components)}: {why}"
        for why, components in by_reason.items()
    )
