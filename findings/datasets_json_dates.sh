#!/usr/bin/env bash
# Guess: load_dataset("json") keeps JSON's types: a string stays the string that it is (JSON has no dates, and even
#        CSV readers leave them alone unless told).
# What happens: where all values of a field look like dates, the field becomes a timestamp, in lists of choices too. A
#        prompt made of it reads "2001-05-04 00:00:00" for "2001-05-04", and "10:00:00+02:00" comes back as 08:00, its
#        offset gone. One row of other text among them, and all of them are strings again: the text of an item depends
#        on the other items, so a subset or a shard of a data set asks other questions than the whole.
# Versions: datasets 5.2.0, pyarrow 26.0.1, Jinja2 3.1.6.
# Who is hit: local tasks of evaluation harnesses and calibration texts in JSON lines (questions after dates and
#        times).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 jinja2==3.1.6
cat > "$folder/dates.py" <<'PY'
import json
import pathlib
import sys

import datasets
import jinja2

folder = sys.argv[1]
datasets.disable_progress_bars()
ITEM = {"answer": "2001-05-04", "choices": ["2001-05-04", "2002-06-07"], "time": "2001-05-04T10:00:00+02:00"}
TEMPLATE = jinja2.Template("{{answer}} | {{choices[1]}} | {{time}}")


def prompt(*rows: dict) -> str:
    """What a template makes of the first of these rows, read from a file of JSON lines."""
    path = pathlib.Path(folder, "items.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=folder)
    return TEMPLATE.render(**found[0])


other = {"answer": "in spring", "choices": ["in spring", "in autumn"], "time": "at noon"}
written, alone, beside = TEMPLATE.render(**ITEM), prompt(ITEM), prompt(ITEM, other)
print("as written:         ", written)
print("read, alone:        ", alone)
print("read, beside a text:", beside)
assert beside == written
assert alone == "2001-05-04 00:00:00 | 2002-06-07 00:00:00 | 2001-05-04 08:00:00"
PY
HF_DATASETS_OFFLINE=1 "$folder/venv/bin/python" "$folder/dates.py" "$folder"
