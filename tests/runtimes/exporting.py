"""Run where a3 and the libraries of its extra onnx are: exports several models in one process.

python exporting.py asked.json: a list of [folder, out, type, limit or null]; prints what is wrong
with each, or null. A limit takes the place of that of the check of logits.
"""

import json
import sys
from pathlib import Path

import a3.stages.export.onnx as stage
from a3.core.errors import A3Error


def main(asked):
    """Print a list of messages, as JSON."""
    said = []
    for folder, out, kind, limit in json.loads(Path(asked).read_text()):
        usual = stage.LIMITS
        stage.LIMITS = usual if limit is None else {kind: limit}
        try:
            stage.export_onnx(Path(folder), Path(out), kind)
            said.append(None)
        except A3Error as error:
            said.append(str(error))
        stage.LIMITS = usual
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])
