"""Run where a3 and the libraries of its extra onnx are: exports several models in one process.

python exporting.py asked.json: a list of [folder, out, type, constants], which take the place of
the stage's own; prints what is wrong with each, or null.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import a3.stages.export.onnx as stage
from a3.core.errors import A3Error


def main(asked):
    """Print a list of messages, as JSON."""
    said = []
    for folder, out, kind, constants in json.loads(Path(asked).read_text()):
        try:
            with patch.dict(vars(stage), constants):
                stage.export_onnx(Path(folder), Path(out), kind)
            said.append(None)
        except A3Error as error:
            said.append(str(error))
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])
