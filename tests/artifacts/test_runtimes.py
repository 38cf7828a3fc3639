"""What a3 says of runtimes: of each one verdict, in inspect, the card and warnings of exports."""

import json
from dataclasses import replace

import pytest
from test_compressed import prepare
from tiny import run, tiny_llama

from a3.artifacts.runtimes import (
    GGUF,
    HF,
    REFUSES,
    RIGHT,
    SEEN,
    UNTESTED,
    WRONG,
    Facts,
    said_of,
    said_of_graphs,
    verdicts,
    warnings_of,
)
from a3.solutions.modes import choose
from a3.solutions.plan import Plan
from a3.stages.approx.approximate import approximate
from a3.stages.export.inspect import inspect

PLAIN = Facts(head_dim=64, rope="default", usual=True, by_layer=False)


def verdict(facts, reads, runtime):
    (found,) = [one for one in verdicts(facts, reads) if one.runtime.startswith(runtime)]
    return found.verdict


def test_every_runtime_has_one_verdict_on_every_model():
    for reads in (HF, GGUF):
        names = list(dict.fromkeys(one.runtime for one in SEEN if one.reads == reads))
        for facts in (PLAIN, replace(PLAIN, head_dim=60, rope="longrope", usual=False)):
            assert [one.runtime for one in verdicts(facts, reads)] == names
    assert {one.verdict for one in SEEN} == {RIGHT, REFUSES, WRONG, UNTESTED}
    for one in SEEN:
        assert bool(one.why) == (one.verdict in (REFUSES, WRONG))


@pytest.mark.parametrize(
    ("change", "reads", "runtime", "expected"),
    [
        ({}, HF, "transformers 4.57", RIGHT),
        ({"older_keys": False}, HF, "transformers 4.57", WRONG),
        ({"older_keys": False}, HF, "transformers 5.23", RIGHT),
        ({"older_keys": False}, HF, "MLX", WRONG),
        ({"rope": "longrope"}, HF, "onnxruntime-genai", WRONG),
        ({"rope": "linear"}, HF, "onnxruntime-genai", WRONG),
        ({"rope": "llama3", "head_dim": 60}, HF, "onnxruntime-genai", REFUSES),
        ({"rope": "longrope"}, HF, "CTranslate2", REFUSES),
        ({"rope": "linear", "usual": False}, HF, "CTranslate2", REFUSES),
        ({}, HF, "CTranslate2", RIGHT),
        ({"usual": False}, HF, "optimum-onnx", REFUSES),
        ({"rope": "longrope"}, GGUF, "OpenVINO GenAI", WRONG),
        ({"rope": "linear"}, GGUF, "OpenVINO GenAI", UNTESTED),
        ({"by_layer": True}, GGUF, "llama.cpp", RIGHT),
    ],
)
def test_what_was_seen_is_said(change, reads, runtime, expected):
    facts = replace(PLAIN, **change)
    assert verdict(facts, reads, runtime) == expected
    (line,) = [text for text in said_of(facts, reads) if runtime in text]
    assert line.startswith(expected)
    warned = [text for text in warnings_of(facts, reads) if runtime in text]
    assert bool(warned) == (expected == WRONG)


def test_what_was_tried_on_few_models_says_so():
    (line,) = said_of_graphs()
    assert line.startswith("where it accepts the family, right: onnxruntime 1.32, ")
    assert "transformers.js 4.3 (tried on the family llama alone)" in line
    assert "MLX 0.32 (tried on the family llama alone)" in said_of(PLAIN, HF)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with factors, and a plain one."""
    folder = tmp_path_factory.mktemp("runtimes")
    prepare(folder, "llama", {"num_hidden_layers": 3, "head_dim": 24})
    for name in ("global", "contiguous"):
        row = {"qk": f"uniform-{name}@12", "ov": "xkv@12", "mlp": "rxx-w@64", "ratio": "-"}
        approximate(folder / "dense", folder / "rxx", Plan(choose(row)), folder / name)
    return folder


def test_inspect_the_card_and_exports_say_it(made, tmp_path, capsys):
    said = inspect(made / "global")
    wrong = "wrong text: onnxruntime-genai 0.18 (its builder drops every scaling"
    card = (made / "global/README.md").read_text()
    assert f"after a3 export hf, {wrong}" in said
    assert f"- after `a3 export hf`, {wrong}" in card
    assert "- after `a3 export gguf`, right: llama.cpp" in card
    run("export", "hf", made / "global", "-o", tmp_path / "stock")
    said = capsys.readouterr().err
    assert "onnxruntime-genai 0.18 gives wrong text without a message" in said
    run("export", "gguf", made / "global", "-o", tmp_path / "x.gguf")
    said = capsys.readouterr().err
    assert "OpenVINO GenAI 2026.4 gives wrong text without a message" in said
    assert "CTranslate2" not in said
    run("export", "gguf", made / "contiguous", "-o", tmp_path / "y.gguf")
    assert "wrong text" not in capsys.readouterr().err
    assert "rope_freqs.weight" not in inspect(made / "contiguous")


def test_a_dense_folder_without_older_keys_is_told(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    assert "rope_theta" not in content
    assert "wrong text: transformers 4.57, MLX 0.32" in inspect(folder)
    (folder / "config.json").write_text(json.dumps(content | {"rope_theta": 1e4}))
    assert "wrong text" not in inspect(folder)
