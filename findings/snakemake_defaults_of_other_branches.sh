#!/usr/bin/env bash
# Guess: Snakemake's validate() fills in the defaults of the part of a schema that the config satisfies: where oneOf
#        tells kinds of settings apart, an entry of kind "b" gets the defaults of "b". What is valid for jsonschema,
#        which takes `default` as a note, is valid for Snakemake.
# What happens: defaults go into the entry while each branch is tried, also by a branch that then does not fit, and
#        stay: entries of either kind come out with the defaults of both. If branches forbid what they do not know
#        (additionalProperties: false, the usual way to catch typos), "b" finds the key that "a" has left and the
#        config is refused for a key that nobody wrote; "a", the first, passes, and what comes out breaks the very
#        schema that it was held to. Without defaults both pass and stay as they are.
# Versions: snakemake 9.27.1, jsonschema 4.26.0.
# Who is hit: workflows whose config has entries of several kinds (methods with their own options) and schemas with
#        defaults: options that do not belong to a kind reach its rules and change parameters, names and hashes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q snakemake==9.27.1 jsonschema==4.26.0
cat > "$folder/branches.py" <<'PY'
import json
import pathlib
import sys

import jsonschema
from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

path = pathlib.Path(sys.argv[1])


def branch(kind: str, option: str, closed: bool, default: bool) -> dict:
    """The settings of one kind: its name and one option."""
    number = {"type": "integer"} | ({"default": 5} if default else {})
    known = {"type": "object", "properties": {"kind": {"const": kind}, option: number}, "required": ["kind"]}
    return known | ({"additionalProperties": False} if closed else {})


def seen(kind: str, closed: bool, default: bool) -> str:
    """What becomes of a config with one entry of this kind."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "properties": {"step": {"oneOf": [branch("a", "rank", closed, default), branch("b", "bits", closed, default)]}},
    }
    path.write_text(json.dumps(schema))
    config = {"step": {"kind": kind}}
    jsonschema.validate(config, schema)
    try:
        validate(config, str(path))
    except WorkflowError:
        return "refused"
    return json.dumps(config["step"], sort_keys=True)


found = {}
for closed in (False, True):
    for default in (False, True):
        for kind in "ab":
            found[kind, closed, default] = seen(kind, closed, default)
            print(f"kind {kind}, other keys {'forbidden' if closed else 'allowed'}, ", end="")
            print(f"{'with' if default else 'without'} defaults: {found[kind, closed, default]}")
assert found["a", True, True] == '{"bits": 5, "kind": "a", "rank": 5}'
assert found["b", False, True] == '{"bits": 5, "kind": "b", "rank": 5}'
assert found["b", True, True] == "refused"
assert all(found[kind, closed, False] == f'{{"kind": "{kind}"}}' for kind in "ab" for closed in (False, True))
PY
"$folder/venv/bin/python" "$folder/branches.py" "$folder/schema.json"
