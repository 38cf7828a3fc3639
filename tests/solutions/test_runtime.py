"""`--for RUNTIME`: every matrix has sizes that the runtime takes, and its export goes through."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import document, run, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import a3
from a3.cli.main import main
from a3.core.errors import A3Error
from a3.models.arch import sketch
from a3.solutions.modes import PRESETS, choose
from a3.solutions.plan import LEAST, Plan
from a3.solutions.runtime import RUNTIMES, Runtime, runtime_named

# Of SmolLM2-135M, of LLaMA-3.1-8B, and of a model whose query heads are no power of two.
SHAPES = {
    "smollm2": {"d": 576, "heads": (9, 3), "mlp": 1536},
    "llama3": {"d": 4096, "heads": (32, 8), "mlp": 14336},
    "odd": {"d": 1280, "heads": (20, 5), "mlp": 3456},
}


@pytest.fixture(scope="module", params=SHAPES)
def arch(request, tmp_path_factory):
    """What is known of a model of a shape."""
    shape, folder = SHAPES[request.param], tmp_path_factory.mktemp(request.param)
    LlamaConfig(
        hidden_size=shape["d"],
        intermediate_size=shape["mlp"],
        num_attention_heads=shape["heads"][0],
        num_key_value_heads=shape["heads"][1],
        num_hidden_layers=1,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return sketch(folder)


def wrong_sizes(runtime: Runtime, arch, component, rank):
    """The sizes of a component's matrices at a rank that a runtime does not take."""
    queries, keys = arch.heads * rank, arch.kv_heads * rank
    inputs = {"qk": [], "ov": [queries], "mlp": [rank]}[component]
    outputs = {"qk": [queries, keys], "ov": [keys], "mlp": [rank]}[component]
    wrong = [size for size in inputs if size % runtime.inputs]
    wrong += [size for size in outputs if size % runtime.outputs]
    return wrong + [rank] * (component != "mlp" and rank % runtime.heads != 0)


@pytest.mark.parametrize("name", RUNTIMES)
def test_ranks_have_sizes_that_the_runtime_takes(arch, name):
    runtime = RUNTIMES[name]
    plan = Plan(choose(PRESETS[runtime.preset] | {"ratio": "0.2"}), runtime=name)
    for component in plan.shared:
        full, *others = plan.allowed(arch, component)
        assert full == arch.full_rank(component)
        assert not any(wrong_sizes(runtime, arch, component, rank) for rank in others)
        # No rank is left out that the runtime takes; heads of one size share their steps.
        taken = [r for r in range(1, full) if not wrong_sizes(runtime, arch, component, r)]
        assert component in plan.one_size or set(others) == {
            rank for rank in taken if rank >= full * LEAST and (component != "qk" or rank % 2 == 0)
        }
    modes = {"qk": "uniform-global", "ov": "joint", "mlp": "obs"}
    ratio = Plan(choose(modes | {"ratio": "0.5"}), multiple=1, runtime=name)
    if name == "int4" and arch.heads == 9:
        with pytest.raises(
            A3Error, match=r"ov: no size below 64 is a multiple of 128, .* --ov dense"
        ):
            ratio.ranks(arch)
        return
    for component, rank in ratio.ranks(arch).items():
        assert rank == arch.full_rank(component) or not wrong_sizes(runtime, arch, component, rank)


def test_the_rank_of_two_factors_is_a_size_that_the_runtime_takes(tmp_path):
    tiny_llama(tmp_path, hidden_size=1024, intermediate_size=2048, num_attention_heads=8)
    factors = Plan(choose(PRESETS["svd"] | {"ratio": "0.2"}), runtime="int4").factors(
        sketch(tmp_path)
    )
    assert factors
    assert all(rank % 128 == 0 for rank in factors.values())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a model and a text."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "dense", head_dim=64)
    (tmp_path / "text.jsonl").write_text("".join(map(document, range(40))))
    return tmp_path


def made(name, *others):
    """Make a model for a runtime."""
    words = ["compress", "dense", "--for", name, "--text", "text.jsonl", "-o", "small"]
    run(*words, "--tokens", "512", "--block-length", "64", "--threads", "1", *others)


def test_what_is_made_for_ordinary_checkpoints_is_one(folder):
    sizes = {"tokens": 512, "block_length": 64, "progress": False}
    small = a3.compress("dense", texts="text.jsonl", runtime="hf", ratio=0.3, **sizes)
    said = small.config.a3
    for ranks in (said["qk_ranks"] + said["ov_ranks"], said["mlp_ranks"]):
        assert len(set(ranks)) == 1
    small.save_pretrained("small")
    run("export", "hf", "small", "-o", "stock")


def test_what_is_made_for_llama_cpp_is_exported_with_every_matrix_in_blocks(folder):
    pytest.importorskip("gguf")
    made("llama.cpp", "--params", "0.15M")
    run("export", "gguf", "small", "--type", "q8_0", "-o", "small.gguf")
    with safe_open("small/model.safetensors", "pt") as file:
        widths = [file.get_slice(name).get_shape()[-1] for name in file.keys() if "proj" in name]  # noqa: SIM118
    assert widths
    assert all(width % 32 == 0 for width in widths)


def test_modes_that_the_runtime_cannot_run_are_refused_at_once(folder, capsys):
    words = ["compress", "dense", "--for", "hf", "--preset", "a3-plus", "--ratio", "0.3"]
    assert main([*words, "--text", "text.jsonl", "-o", "small"]) == 1
    said = capsys.readouterr().err
    assert "heads of different sizes, and hf wants one. Write --qk uniform-global~" in said
    for preset, says in (("a3", "keeps other RoPE pairs in each group"), ("svd", "two factors")):
        with pytest.raises(A3Error, match=says):
            Plan(choose(PRESETS[preset] | {"ratio": "0.3"}), runtime="hf")
    with pytest.raises(A3Error, match=r"runtime is 'cpu'; expected one of llama\.cpp, "):
        runtime_named("cpu")


def test_a_model_in_memory_gets_the_dtype_that_was_asked(folder):
    model = AutoModelForCausalLM.from_pretrained("dense")
    sizes = {"tokens": 512, "block_length": 64, "progress": False}
    tokenizer = AutoTokenizer.from_pretrained("dense")
    asked = {"fit": "0.29MB:bfloat16", "texts": "text.jsonl"}
    small = a3.compress(model, tokenizer, **asked, **sizes)
    assert small.dtype == torch.bfloat16
    small.save_pretrained("saved")
    assert Path("saved/model.safetensors").stat().st_size <= 290_000
