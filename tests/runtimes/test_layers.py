"""Models with MLPs of other sizes in each layer, in unmodified llama.cpp (its architecture `deci`).

Tiny models at once; SmolLM2 as `a3-stock` makes it, of which llama.cpp scores 2,000 tokens.
"""

import json

import numpy as np
import pytest
from asking import ask
from gguf import GGUFReader
from smollm2 import KINDS, a3_, continued, logits_of, perplexity, row, scored
from tiny import run, tiny_model

TOKENS = list(range(5, 65))
SCORED, PROMPT, NEW = 2000, 48, 40
FAMILIES = {
    "llama": ("llama", {}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "linear": ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear"}}),
}
FAMILIES["linear"][1]["rope_parameters"]["factor"] = 4.0


def architecture(path):
    return GGUFReader(path).fields["general.architecture"].contents()


@pytest.mark.parametrize("mode", ["uniform-global", "uniform-contiguous"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_models_are_llama_cpps(tmp_path, name, mode):
    family, config = FAMILIES[name]
    tiny_model(tmp_path / "dense", family, num_hidden_layers=3, intermediate_size=128, **config)
    (tmp_path / "text.txt").write_text("A river moves towards an ocean. In 1969 a fox jumps. " * 60)
    files = [tmp_path / f"rxx/{kind}.safetensors" for kind in KINDS]
    cut = ["--text", tmp_path / "text.txt", "--tokens", 512, "--block-length", 64]
    run("collect", tmp_path / "dense", *cut, "-o", *files)
    words = [tmp_path / "dense", "--rxx", tmp_path / "rxx", "--ratio", "0.5"]
    words += ["--preset", "a3-stock", "--qk", f"{mode}@12", "--ov", "joint@12"]
    run("allocate", *words, "--multiple", 4, "-o", tmp_path / "ranks.json")
    run("approx", *words, "--allocation", tmp_path / "ranks.json", "-o", tmp_path / "small")
    ranks = json.loads((tmp_path / "small/config.json").read_text())["a3"]["mlp_ranks"]
    assert len(set(ranks)) > 1
    path = tmp_path / "small.gguf"
    run("export", "gguf", tmp_path / "small", "--type", "f32", "-o", path)
    assert architecture(path) == "deci"
    asked = {"tokens": TOKENS, "caches": ["f32"], "texts": [], "size": 512}
    expected = logits_of(tmp_path / "small", TOKENS)
    for calls in (1, 2):
        worst = np.abs(ask(path, asked | {"calls": calls})["logits_f32"] - expected).max()
        print(f"{name}, {mode}, {calls} calls, {ranks}: largest difference {worst:.2g}")
        assert worst < 2e-5


@pytest.fixture(scope="module")
def small(preset):
    """SmolLM2 as a3-stock makes it, and GGUF files of it."""
    folder = preset("a3-stock").parent
    for kind in ("f32", "q8_0"):
        a3_("export", "gguf", folder / "small", "--type", kind, "-o", folder / f"{kind}.gguf")
    return folder


@pytest.fixture(scope="module")
def answers(small):
    """The tokens, what transformers makes of them, and what llama.cpp does of each file."""
    blocks = scored(SCORED)
    asked = {"tokens": blocks[0].tolist(), "texts": [], "caches": ["f32"], "size": 2048}
    asked |= {"calls": 2, "prompt": PROMPT, "greedy": NEW}
    found = {kind: ask(small / f"{kind}.gguf", asked) for kind in ("f32", "q8_0")}
    return blocks, logits_of(small / "small", blocks[0].tolist()), found


def test_smollm2_has_the_logits_of_transformers(small, answers):
    blocks, expected, found = answers
    assert architecture(small / "f32.gguf") == "deci"
    worst = np.abs(found["f32"]["logits_f32"] - expected).max()
    ours, theirs = (perplexity(one, blocks) for one in (found["f32"]["logits_f32"], expected))
    print(f"f32: largest difference {worst:.2g}; perplexity {ours:.4f} and {theirs:.4f}")
    assert worst < 0.02
    assert ours == pytest.approx(theirs, rel=1e-4)
    of_q8 = perplexity(found["q8_0"]["logits_f32"], blocks)
    print(f"q8_0: perplexity {of_q8:.4f}")
    assert of_q8 == pytest.approx(theirs, rel=0.02)


def test_all_matrices_of_q8_are_q8(small):
    """MLP ranks of a3-stock are multiples of the block of llama.cpp's types."""
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(small / "q8_0.gguf").tensors}
    assert {kind for name, kind in kinds.items() if ".ffn_" in name and "norm" not in name} == {
        "Q8_0"
    }


def test_smollm2_continues_as_transformers_does(small, answers, record_property):
    blocks, logits, found = answers
    expected = continued(small / "small", blocks, PROMPT, NEW)
    for kind, said in found.items():
        said |= {"logits": said["logits_f32"], "held": said["cache_f32"]}
        name = f"SmolLM2-135M, a3-stock at 0.2, GGUF {kind}"
        record_property("measured", row(name, said, logits, blocks, expected))
    assert found["f32"]["greedy"].tolist() == expected
