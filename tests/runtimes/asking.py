"""Questions to runtimes, each in a process of its own and in its environment, without torch."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".venv-runtimes"

# Scripts of the environments.
NAMES = {"onnx": "onnxruntime"}
# What makes a runtime's own files of a folder of a3 export hf.
CONVERTERS = {
    "ctranslate2": "from ctranslate2.converters import TransformersConverter as C; import sys;"
    "C(sys.argv[1]).convert(sys.argv[2])",
    "genai": "import runpy, sys; source, out = sys.argv[1:];"
    "sys.argv = [''] + f'-i {source} -o {out} -p fp32 -e cpu -c {out}.cache'.split();"
    "runpy.run_module('onnxruntime_genai.models.builder', run_name='__main__')",
    # .venv's datasets want a newer huggingface_hub than optimum-intel does.
    "openvino": "import sys; sys.modules['datasets'] = None;"
    "from optimum.intel import OVModelForCausalLM as M; of = {'load_in_8bit': False};"
    "M.from_pretrained(sys.argv[1], export=True, compile=False, **of).save_pretrained(sys.argv[2])",
}


def home_of(runtime):
    """The environment of a runtime; the test is skipped, or fails, where it could not be had."""
    home = ENVIRONMENTS / runtime
    # Nothing installs node, so nobody can require it.
    if runtime == "transformers-js" and not all(map(shutil.which, ("node", "npm"))):
        pytest.skip(f"no {runtime}: no node or npm here")
    if not (home / ".ready").exists():
        missing = ENVIRONMENTS / f"{runtime}.missing"
        why = missing.read_text().strip() if missing.exists() else "make test-runtimes makes it"
        if os.environ.get("A3_REQUIRE") == "1":
            pytest.fail(f"no {runtime}: {why}, and A3_REQUIRE=1")
        pytest.skip(f"no {runtime}: {why}")
    return home


def libraries(runtime):
    """Where the libraries of a runtime are."""
    (found,) = (home_of(runtime) / "lib").glob("python*/site-packages")
    return found


def beside_torch(runtime, *words):
    """Run Python with a3, its libraries and those of a runtime, which go before; how it ended."""
    env = os.environ | {"PYTHONPATH": f"{libraries(runtime)}:{HERE.parents[1]}"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def converted(runtime, folder, out):
    """How the converter of a runtime ended, which also needs torch; it writes to `out`."""
    return beside_torch(runtime, "-c", CONVERTERS[runtime], folder, out)


def run_in(runtime, *words):
    """Run a script of this folder in the environment of a runtime; how it ended."""
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Where llama.cpp aborts it would print what every thread does.
    alone["GGML_NO_BACKTRACE"] = "1"
    python = home_of(runtime) / "bin/python"
    if runtime == "vllm":
        # It needs torch, and a3's plugin needs a3.
        python = sys.executable
        alone["PYTHONPATH"] = os.pathsep.join(map(str, (libraries(runtime), plugin(), ROOT)))
    command = [str(word) for word in (python, *words)]
    return subprocess.run(command, env=alone, capture_output=True, text=True)


def plugin():
    """A folder that says a3's entry points for vLLM, as an installation of a3 does."""
    group = "vllm.general_plugins"
    with (ROOT / "pyproject.toml").open("rb") as stream:
        found = tomllib.load(stream)["project"]["entry-points"][group]
    said = ENVIRONMENTS / "vllm-plugin"
    info = said / "a3-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a3\nVersion: 0\n")
    lines = [f"[{group}]", *(f"{name} = {where}" for name, where in found.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return said


def ask(path, asked):
    """What llama.cpp says of a GGUF file, as in_llama.py does; None where it ends the process."""
    question, out = path.with_suffix(".json"), path.with_suffix(".npz")
    question.write_text(json.dumps(asked))
    done = run_in("llama", HERE / "in_llama.py", path, question, out)
    if done.returncode < 0:
        return None
    assert done.returncode == 0, done.stderr
    return dict(np.load(out))


def answers_of(runtime, folder, asked, place):
    """What a runtime says of a folder, as answering.py does; files are made at `place`."""
    question, out = place / f"{runtime}.asked.json", place / f"{runtime}.npz"
    question.write_text(json.dumps(asked))
    if runtime == "transformers-js":
        return from_node(folder, question, place)
    run = beside_torch if runtime == "executorch" else run_in
    done = run(runtime, HERE / f"in_{NAMES.get(runtime, runtime)}.py", folder, question, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out))


def from_node(folder, question, place):
    """What transformers.js says."""
    home = home_of("transformers-js")
    answers, logits = place / "js.json", place / "js.bin"
    script = HERE / "in_transformers_js.mjs"
    command = ["node", script, home, folder, question, answers, logits]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(answers.read_text())
    said["logits"] = np.fromfile(logits, np.float32).reshape(said["shape"])[0]
    return said


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
