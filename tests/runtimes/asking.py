"""Questions to llama.cpp, in its environment, which has no torch, and in a process of its own."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-runtimes/bin/python"


def ask(path, asked):
    """What llama.cpp says of a GGUF file, as in_llama.py does; None where it ends the process."""
    question, out = path.with_suffix(".json"), path.with_suffix(".npz")
    question.write_text(json.dumps(asked))
    command = [PYTHON, HERE / "in_llama.py", path, question, out]
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Where it aborts it would print what every thread does.
    alone["GGML_NO_BACKTRACE"] = "1"
    done = subprocess.run(list(map(str, command)), env=alone, capture_output=True, text=True)
    if done.returncode < 0:
        return None
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


def texts_of(ids):
    """The ids of each text; -1 stands after each."""
    texts, one = [], []
    for number in ids.tolist():
        if number == -1:
            texts.append(one)
            one = []
        else:
            one.append(number)
    return texts
