"""Graphs of `a3 export onnx` in onnxruntime, OpenVINO and transformers.js; models in ExecuTorch.

Tiny models of several families at once; SmolLM2 as `a3-plus` makes it, whose layers have other
ranks and whose groups keep other RoPE pairs.
"""

import json
import os

import numpy as np
import pytest
import torch
from asking import HERE, answers_of, beside_torch, libraries
from smollm2 import MODEL, a3_, continued, greedy, logits_of, perplexity, row, scored
from tiny import run, small_model, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from a3.core.files import read_record

SCORED, PROMPT, NEW = 600, 48, 40
RUNTIMES = ("onnx", "openvino", "transformers-js")
TEXT = "It's 1969:  600 million\n\n\tviewers… 月 café 🚀 x=3.14 <|im_end|>\n"
GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 40,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
ALIBI = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
# Family, config, modes of QK, OV and MLP.
PLUS = ("--preset", "a3-plus")
MHA = ("--qk", "qk", "--ov", "xkv", "--mlp", "rxx-w")
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": True}, PLUS),
    "gemma3": ("gemma3_text", GEMMA3, PLUS),
    "mixtral": ("mixtral", {}, PLUS),
    "gpt2": ("gpt2", {"n_inner": 96}, MHA),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, MHA),
}
DENSE = {"qwen3": ("qwen3", {"head_dim": 24})}
# Of one head size, as `a3 export hf` makes it; RoPE is `longrope`.
STOCK = ("--qk", "uniform-global@12", "--ov", "xkv@12", "--mlp", "rxx-w")
# For ExecuTorch. XNNPACK computes what it can of Llama, which takes twice the time to lower.
LOWERED = ("llama", "gemma3", "gpt2", "stock")
# Layers of SmolLM2 there, from the first: all take two minutes more, and are for the table (0).
KEPT = 0 if os.environ.get("A3_RECORD") == "1" else 6
# Whose graph has numbers that onnxruntime lacks on CPUs (bfloat16).
REFUSED = {"falcon-alibi": ("falcon", ALIBI)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder of each export by name, and what was said of it."""
    folder = tmp_path_factory.mktemp("graphs")
    of = {name: small_model(folder / name, *said) for name, said in MODELS.items()}
    dense = DENSE | REFUSED
    of |= {name: tiny_model(folder / name, family, **c) for name, (family, c) in dense.items()}
    asked = {name: [of[name], folder / f"{name}-out", "f32", {}] for name in of}
    asked["half"] = [of["llama"], folder / "half-out", "f16", {}]
    asked["outside"] = [of["llama"], folder / "outside-out", "f32", {"LARGEST": 0}]
    asked["strict"] = [of["llama"], folder / "strict-out", "f32", {"LIMITS": {"f32": 0}}]
    question = folder / "asked.json"
    question.write_text(json.dumps([[*map(str, one[:3]), one[3]] for one in asked.values()]))
    done = beside_torch("onnx", HERE / "exporting.py", question)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    outs = {name: one[1] for name, one in asked.items()}
    return of, outs, dict(zip(asked, said, strict=True))


@pytest.mark.parametrize("name", [*MODELS, *DENSE, "half"])
def test_every_family_has_a_graph_with_its_logits(exported, tmp_path, name):
    of, outs, said = exported
    assert said[name] is None
    record = read_record(outs[name] / "export.json")
    print(f"{name}: differs by {record['largest_difference_of_range']:.2g} of the range")
    asked = {"tokens": list(range(5, 45)), "prompt": 8, "greedy": 4}
    found = answers_of("onnx", outs[name], asked, tmp_path)
    assert found["held"] == record["kv_bytes_per_token"] * 40
    if name in of:
        worst = np.abs(found["logits"] - logits_of(of[name], asked["tokens"])).max()
        assert worst < 2e-5
        assert found["in_two"] < 2e-5


@pytest.mark.parametrize("name", ["half", "outside"])
def test_float16_and_weights_in_a_file_of_their_own(exported, tmp_path, name):
    out = exported[1][name]
    files = sorted(path.name for path in (out / "onnx").iterdir())
    assert files == (["model_fp16.onnx"] if name == "half" else ["model.onnx", "model.onnx_data"])
    asked = {"tokens": list(range(5, 45)), "prompt": 8, "greedy": 10, "texts": []}
    ours, theirs = (answers_of(runtime, out, asked, tmp_path) for runtime in RUNTIMES[::2])
    assert list(ours["greedy"]) == theirs["greedy"]
    np.testing.assert_allclose(ours["logits"], theirs["logits"], atol=1e-3)


def test_nothing_but_records_names_a_path_of_this_machine(exported):
    of, outs, _ = exported
    for name in (*MODELS, *DENSE):
        files = [path for path in outs[name].iterdir() if path.is_file()]
        small = {path.name: path.read_text() for path in files if path.name != "export.json"}
        small.pop("source.json", None)
        assert not [one for one, text in small.items() if str(of[name].parent) in text]
    card = (outs["llama"] / "README.md").read_text()
    assert 'InferenceSession("FOLDER/onnx/model.onnx")' in card
    assert "AutoModelForCausalLM" not in card


def test_a_graph_that_differs_is_not_left(exported):
    _, outs, said = exported
    assert "differ from the model's by" in said["strict"]
    assert not outs["strict"].exists()


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_that_onnxruntime_does_not_run_is_not_left(exported, name):
    _, outs, said = exported
    assert "falcon: onnxruntime cannot run the graph of this family" in said[name]
    assert not outs[name].exists()


def test_a_tied_head_is_stored_once(exported):
    of, outs, _ = exported
    weights = (of["llama"] / "model.safetensors").stat().st_size
    assert (outs["llama"] / "onnx/model.onnx").stat().st_size < 1.6 * weights


@pytest.fixture(scope="module")
def graph(preset):
    """SmolLM2 as a3-plus makes it, and its export."""
    small = preset("a3-plus")
    a3_("export", "onnx", small, "-o", small.parent / "graph", path=libraries("onnx"))
    return small


@pytest.fixture(scope="module")
def expected(graph):
    """A block, and what transformers makes of it."""
    block = scored(SCORED)
    return block, logits_of(graph, block[0].tolist()), continued(graph, block, PROMPT, NEW)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_smollm2_is_the_same_in_every_runtime(graph, expected, record_property, tmp_path, runtime):
    block, logits, continuation = expected
    ranks = json.loads((graph / "config.json").read_text())["a3"]
    assert len(set(ranks["qk_ranks"])) > 1
    assert not ranks["same_pairs"]
    asked = {"tokens": block[0].tolist(), "prompt": PROMPT, "greedy": NEW, "texts": [TEXT]}
    found = answers_of(runtime, graph.parent / "graph", asked, tmp_path)
    worst = float(np.abs(found["logits"] - logits).max())
    ours, theirs = (perplexity(one, block) for one in (found["logits"], logits))
    bytes_ = read_record(graph.parent / "graph/export.json")["kv_bytes_per_token"]
    name = "SmolLM2-135M, a3-plus at 0.2, ONNX f32"
    record_property("measured", row(name, found, logits, block, continuation))
    assert worst < 0.02
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert list(found["greedy"]) == continuation
    assert found["in_two"] < 0.02
    assert found["held"] == bytes_ * SCORED
    if "ids" in found:
        assert found["ids"] == [AutoTokenizer.from_pretrained(MODEL)(TEXT).input_ids]


# --- ExecuTorch -----------------------------------------------------------------------------------


def lower(folder, asked):
    """Lower models to programs in `folder`: by name a folder, layers, whether with XNNPACK."""
    rows = [[str(of), *how, str(folder / f"{name}.pte")] for name, (of, *how) in asked.items()]
    (folder / "lower.json").write_text(json.dumps(rows))
    done = beside_torch("executorch", HERE / "lowering.py", folder / "lower.json")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def lowered(exported, tmp_path_factory):
    """The folder of the programs, and that of each tiny model."""
    folder = tmp_path_factory.mktemp("lowered")
    run("export", "hf", small_model(folder / "x", "llama", {}, STOCK), "-o", folder / "stock")
    of = exported[0] | {"stock": folder / "stock"}
    lower(folder, {name: (of[name], 0, name == "llama") for name in LOWERED})
    return folder, of


@pytest.mark.parametrize("name", LOWERED)
def test_tiny_models_are_executorchs(lowered, tmp_path, name):
    folder, of = lowered
    asked = {"tokens": list(range(5, 45)), "prompt": 8, "greedy": 4}
    found = answers_of("executorch", folder / f"{name}.pte", asked, tmp_path)
    worst = np.abs(found["logits"] - logits_of(of[name], asked["tokens"])).max()
    print(f"{name}: largest difference {worst:.2g}, in two calls {found['in_two']:.2g}")
    assert worst < 2e-5
    assert found["in_two"] < 2e-5


def test_smollm2_is_the_same_in_executorch(graph, record_property, tmp_path):
    lower(tmp_path, {"smollm2": (graph, KEPT, False)})
    block = scored(SCORED)
    model = AutoModelForCausalLM.from_pretrained(graph, dtype=torch.float32)
    model.model.layers = model.model.layers[: KEPT or None]
    with torch.inference_mode():
        said = model(block, use_cache=True)
    logits, continuation = said.logits[0].numpy(), greedy(model, block, PROMPT, NEW)
    asked = {"tokens": block[0].tolist(), "prompt": PROMPT, "greedy": NEW}
    found = answers_of("executorch", tmp_path / "smollm2.pte", asked, tmp_path)
    if not KEPT:
        name = "SmolLM2-135M, a3-plus at 0.2, ExecuTorch f32"
        record_property("measured", row(name, found, logits, block, continuation))
    assert np.abs(found["logits"] - logits).max() < 0.02
    assert perplexity(found["logits"], block) == pytest.approx(perplexity(logits, block), rel=1e-4)
    assert found["greedy"].tolist() == continuation
    assert found["in_two"] < 0.02
    held = [
        x for one in said.past_key_values.layers[: KEPT or None] for x in (one.keys, one.values)
    ]
    assert found["held"] == sum(x.nbytes for x in held)
