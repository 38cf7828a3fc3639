"""Probes every causal model type of transformers, and writes the table of what a3 compresses.

    python docs/probe.py [TYPE …]

Without types all of them, in about four minutes on one core; other rows stay. Then run
docs/generate.py.
"""

import json
import sys

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from a3.models.probe.table import TABLE, lines, read_table, row_of

if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = read_table()["types"] if TABLE.exists() else {}
    rows = {name: known[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in known}
    for name in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        rows[name] = row_of(name)
        print(*lines({name: rows[name]}), flush=True)
    content = {"transformers": transformers.__version__, "types": dict(sorted(rows.items()))}
    TABLE.write_text(json.dumps(content, indent=1) + "\n")
