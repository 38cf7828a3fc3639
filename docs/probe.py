"""Probes every causal model type of transformers, and writes the table of what a3 compresses.

    python docs/probe.py [TYPE …]

Without types all of them, in about five minutes on one core; other rows stay. Types of models of
several modalities are tried, too. Then run docs/generate.py.
"""

import json
import sys

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging

from a3.models.arch import describe
from a3.models.probe.table import TABLE, lines, read_table, row_of, wrapper_lines
from a3.models.probe.wrapper import wrapper_row

if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = read_table() if TABLE.exists() else {"types": {}, "wrappers": {}}
    causal, held = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    rows = {name: known["types"][name] for name in causal if name in known["types"]}
    wrappers = {name: known["wrappers"][name] for name in held if name in known["wrappers"]}
    wanted = sys.argv[1:]
    for name in [name for name in causal if name in wanted or not wanted]:
        rows[name] = row_of(name)
        print(*lines({name: rows[name]}), flush=True)
    for name in [name for name in held if name in wanted or not wanted]:
        wrappers[name] = wrapper_row(name, describe)
        print(*wrapper_lines({name: wrappers[name]}), flush=True)
    content = {
        "transformers": transformers.__version__,
        "types": dict(sorted(rows.items())),
        "wrappers": dict(sorted(wrappers.items())),
    }
    TABLE.write_text(json.dumps(content, indent=1) + "\n")
