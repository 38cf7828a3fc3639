"""Compressed folders on a machine that has transformers and not a3."""

import json
import os
import shutil
import site
import subprocess
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_compressed import MODELS, SETTINGS, TEXT, load, logits, modes_of, redraw, tokens
from tiny import tiny_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from a3.models import modeling_a3
from a3.models.arch import load_arch
from a3.models.families import FAMILIES
from a3.models.packing import CODE
from a3.solutions.modes import choose, kinds_needed
from a3.solutions.plan import Plan
from a3.stages.approx.approximate import approximate
from a3.stages.collect.collect import collect

CASES = ["llama", "qwen3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe", "bloom"]
# Other modes than the paper's: experts that are merged.
OTHERS = {"qwen3_moe": {"mlp": "hc-smoe"}}
# What a user without a3 does, for all folders in one process; saved models load again.
SCRIPT = """
import importlib.util, json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
)

assert importlib.util.find_spec("a3") is None
options = {"trust_remote_code": True, "dtype": torch.float64, "experts_implementation": "eager"}
found, work = {}, Path(sys.argv[1])
for folder in sorted(path for path in work.iterdir() if path.is_dir()):
    ids = load_file(work / "ids.safetensors")["ids"]
    model = AutoModelForCausalLM.from_pretrained(folder / "small", **options)
    assert AutoTokenizer.from_pretrained(folder / "small", trust_remote_code=True)("dog").input_ids
    model.generate(ids, max_new_tokens=2, do_sample=False)
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", **options)
    body = AutoModel.from_pretrained(folder / "small", **options).eval()
    headed = AutoModelForSequenceClassification.from_pretrained(folder / "small", **options).eval()
    with torch.inference_mode():
        found |= {folder.name: model(ids).logits, f"{folder.name} again": again(ids).logits}
        for trunk in (body, headed.base_model):
            hidden = trunk(ids).last_hidden_state
            torch.testing.assert_close(hidden, model.base_model(ids).last_hidden_state)
save_file(found, work / "logits.safetensors")
print(json.dumps(sorted(name for name in sys.modules if name.split(".")[0] == "a3")))
"""


def small(folder: Path, case: str) -> torch.nn.Module:
    """A tiny model of a family, compressed by the paper's modes or OTHERS into `small`."""
    model_type, config = MODELS[case]
    tiny_model(folder / "dense", model_type, **config)
    redraw(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    modes = modes_of(load_arch(folder / "dense")) | OTHERS.get(case, {})
    plan = Plan(choose(modes | {"ratio": "0.25"}))
    outputs = {kind: folder / f"{kind}.safetensors" for kind in kinds_needed(plan.choices)}
    collect(folder / "dense", folder / "text.txt", outputs, **SETTINGS)
    approximate(folder / "dense", folder, plan, folder / "small")
    return load(folder / "small")


def python_without_a3(folder: Path) -> Path:
    """A virtual environment with all that this one has, but what is installed as editable."""
    venv.create(folder, with_pip=False, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "all.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "bin" / "python"


def test_logits_are_the_same_without_a3(tmp_path):
    expected, work = {}, tmp_path / "work"
    for case in CASES:
        model = small(work / case, case)
        expected[case] = logits(model, tokens(work))
        shutil.rmtree(work / case / "dense")
    save_file({"ids": tokens(work)}, work / "ids.safetensors")
    python = python_without_a3(tmp_path / "venv")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [python, "-I", "-c", SCRIPT, work], env=path | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    found = load_file(work / "logits.safetensors")
    for case in CASES:
        torch.testing.assert_close(found[case], expected[case], rtol=0, atol=1e-12)
        torch.testing.assert_close(found[f"{case} again"], expected[case], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_map_finds_the_classes_of_every_family_by_name(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {family}")
    for own in modeling_a3.classes(family).values():
        assert getattr(modeling_a3, own.__name__) is own


def test_names_that_are_no_model_are_not_there():
    for name in ("A3Nothing", "LlamaConfig", "__path__"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_a3, name)


def test_the_code_that_travels_needs_torch_and_transformers_only():
    imported = {
        line.split()[1].split(".")[0]
        for module in CODE
        for line in Path(module.__file__).read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    # One imports the other, "" by its relative name.
    own = {"", "collections", "functools", "importlib", "pathlib", "sys", "types", "typing"}
    assert imported == own | {"torch", "transformers"}
