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
from a3.core.files import read_json
from a3.models.arch import sketch
from a3.solutions.modes import PRESETS, choose
from a3.solutions.plan import LEAST, Plan
from a3.solutions.runtime import RUNTIMES, Runtime, runtime_named

DENSE_ROW = dict.fromkeys(("qk", "ov", "mlp"), "dense")

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
    none = [
        one
        for one in modes
        if all(wrong_sizes(runtime, arch, one, rank) for rank in range(1, arch.full_rank(one)))
    ]
    if none:
        with pytest.raises(A3Error, match=rf"({'|'.join(none)}): no size below 64 is a .* dense"):
            ratio.ranks(arch)
        return
    for component, rank in ratio.ranks(arch).items():
        assert rank < arch.full_rank(component)
        assert not wrong_sizes(runtime, arch, component, rank)


MODES = {"qk": "uniform-global", "ov": "joint", "mlp": "obs"}


def smollm2(folder):
    """What is known of SmolLM2."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1}
    LlamaConfig(
        num_attention_heads=9,
        num_key_value_heads=3,
        architectures=["LlamaForCausalLM"],
        **sizes,
    ).save_pretrained(folder)
    return sketch(folder)


@pytest.mark.parametrize(
    ("name", "modes", "ratio", "says"),
    [
        ("hf", {"qk": "uniform-global@50"}, "-", r"qk .*@50: hf takes multiples of 4 here. Take "
         r"uniform-global@48 or uniform-global@52\."),
        ("gpu", {"qk": "fisher@3"}, "-", r"multiples of 8 here. Take fisher@8\."),
        ("gpu", {"mlp": "obs@1535"}, "-", r"mlp obs@1535: .* Take obs@1528 or obs@1536\."),
        ("nf4", {"ov": "joint@48"}, "-", r"multiples of 64 here. Take joint@64\."),
        ("gpu", {"qk": "palu-rope@50"}, "-", r"Take palu-rope@48 or palu-rope@56\."),
        # 64 · 0.9 is nearer to 64 than to 32.
        ("llama.cpp-quantised-cache", MODES, "0.1", r"all 64 are the nearest, which removes "
         r"nothing\. Take uniform-global@32, or leave it as it is: --qk dense\."),
        ("int4", {"mlp": "obs"}, "0.01", r"mlp obs@0\.01: .* Take obs@1408, or .* --mlp dense"),
        ("llama.cpp", {"qk": "uniform-global@32"}, "-", r"qk keeps 32 dimensions .* ov 64, .* "
         r"--qk uniform-global@32 --ov joint@32\."),
        ("vllm", {"mlp": "flap"}, "0.2", "flap: gives the MLP's output a bias, and vllm runs"),
        ("hf", {"qk": "rxx-w-rxx-uniform@48"}, "-", "keeps other RoPE pairs in each layer"),
        ("hf", {"qk": "uniform-global~", "ov": "joint@48"}, "0.2", "--qk uniform-global~ --ov j"),
        ("hf", {"qk": "dense", "ov": "joint~"}, "0.2", "heads of different sizes, and hf wants"),
    ],
)  # fmt: skip
def test_sizes_that_the_runtime_does_not_take_are_refused(tmp_path, name, modes, ratio, says):
    arch = smollm2(tmp_path)
    with pytest.raises(A3Error, match=says):
        Plan(choose(DENSE_ROW | modes | {"ratio": ratio}), runtime=name).ranks(arch)


def test_sizes_that_the_runtime_takes_are_kept(tmp_path):
    arch = smollm2(tmp_path)
    taken = {"qk": "uniform-global@32", "ov": "joint@32", "mlp": "obs@1536"}
    plan = Plan(choose(taken | {"ratio": "-"}), runtime="llama.cpp")
    assert plan.ranks(arch) == {"qk": 32, "ov": 32, "mlp": 1536}
    # One size for both, also where their own multiples differ.
    assert Plan(choose(MODES | {"ratio": "0.3"}), runtime="llama.cpp-quantised-cache").ranks(
        arch
    ) == {"qk": 32, "ov": 32, "mlp": 1088}
    # Ratio 0 keeps all, and is taken for what it says.
    assert Plan(choose(MODES | {"ratio": "0"}), runtime="gpu").ranks(arch)["qk"] == 64
    rounded = Plan(choose(MODES | {"ratio": "0.1"}), servable=True, runtime="hf")
    with pytest.raises(A3Error, match="none is smaller"):
        rounded.ranks(arch)


def test_factors_that_multiples_make_no_smaller_than_the_matrix_are_refused(tmp_path):
    tiny_llama(tmp_path)
    plan = Plan(choose(DENSE_ROW | {"qk": "svd", "ratio": "0.2"}), runtime="nf4")
    with pytest.raises(A3Error, match=r"q of 64 × 64 is no larger than two factors of rank 64"):
        plan.ranks(sketch(tmp_path))


def test_whole_heads_that_a_quantised_cache_cannot_have_are_refused(tmp_path):
    tiny_llama(tmp_path, head_dim=48)
    modes = {"qk": "uniform-global~", "ov": "joint~", "mlp": "obs~"}
    for row in (modes | {"ratio": "0.2"}, DENSE_ROW | {"mlp": "obs", "ratio": "0.3"}):
        plan = Plan(choose(row), runtime="llama.cpp-quantised-cache")
        with pytest.raises(A3Error, match=r"heads of 48 would stay whole, .* --qk uniform-g.*@32"):
            plan.ranks(sketch(tmp_path))


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


@pytest.mark.parametrize("name", ["llama.cpp", "vllm"])
def test_heads_that_a_runtime_has_in_no_smaller_size_stay_whole(folder, capsys, name):
    """The MLP gives what they keep: at a ratio, too, which all components share."""
    tiny_llama(folder / "dense")
    made(name, "--ratio", "0.2")
    assert capsys.readouterr().err.count("qk stays whole") == 1
    said = read_json(folder / "small/config.json")["a3"]
    assert set(said["qk_ranks"]) == set(said["ov_ranks"]) == {16}
    assert min(said["mlp_ranks"]) < 64
