"""Quantised models and their low-rank repair: LQER, QERA, alone and on compressed models."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import root
from safetensors.torch import load_file
from test_compressed import MODELS
from tiny import BLOCK, TAIL, run, tiny_llama, tiny_model, tiny_results
from transformers import AutoModelForCausalLM

from a3.artifacts.places import Place
from a3.cli.main import main
from a3.core.errors import A3Error
from a3.experiments.rows import read_experiments
from a3.models.load import load_tokenizer
from a3.models.quantised import QuantisedLinear, QuantisedProducts
from a3.numerics.formats import parse_format, quantise
from a3.report.tables.frames import read_csv
from a3.rxx.container import Rxx
from a3.solutions import lqer
from a3.solutions.recipes import complete_recipe, entry_for, parse_quantisation
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

ROOT = Path(__file__).parents[2]
SITES = ("attention_input", "o_proj_input", "mlp_input", "down_input")
KINDS = [f"{site}{form}" for site in SITES for form in ("", "_peak")]
METHODS = ("none", "lqer-svd", "lqer-act", "qera")
TEXT = "A river moves towards an ocean, or a lake; the dog does not mind at all. "
PLAIN = {"layers": [{"match": ".*"}]}
LOW = {
    "layers": [{"match": ".*", "W": "bfp3/16", "x": "bfp8/16", "A": "bfp8/16", "B": "bfp8/16"}],
    "products": dict.fromkeys("qkpv", "bfp8/16"),
}


def collect(model, folder, tokens=512):
    """All statistics that quantisation reads."""
    (folder / "text.txt").write_text(TEXT * 99)
    outputs = [folder / "rxx" / model.name / f"{kind}.safetensors" for kind in KINDS]
    run("collect", model, "--text", folder / "text.txt", "--tokens", tokens, *BLOCK, "-o", *outputs)
    return outputs[0].parent


def make(model, rxx, recipe, method, rank, out):
    """A quantised folder; its approx.json."""
    ranked = [] if rank is None else ["--rank", rank]
    options = ["--recipe", json.dumps(recipe), "--method", method, *ranked]
    run("quantise", model, "--rxx", rxx, *options, "-o", out)
    return json.loads((out / "approx.json").read_text())


def load(folder):
    """A model in double precision, so that only what is simulated rounds."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def tokens(count=40):
    torch.manual_seed(1)
    return torch.randint(2, 300, (1, count))


# --- the repair ---


def correlated(m, n):
    """An error E (m, n) and a positive definite R (m, m) far from a diagonal."""
    torch.manual_seed(0)
    x = torch.randn(400, m, dtype=torch.float64) @ torch.randn(m, m, dtype=torch.float64)
    x = x * torch.logspace(-1, 1, m, dtype=torch.float64)
    return torch.randn(m, n, dtype=torch.float64), x.T @ x / 400


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_each_repair_is_the_svd_of_the_scaled_error(shape):
    E, R = correlated(*shape)
    peak = torch.rand(shape[0], dtype=torch.float64) + 0.1
    metrics = {
        "lqer_svd": (None, torch.eye(shape[0], dtype=torch.float64)),
        "lqer_act": (peak, torch.diag(peak.square())),
        "qera": (R, R),
    }
    for method, (statistic, metric) in metrics.items():
        half, inverse = root(metric)
        for rank in (1, 5, min(shape)):
            A, B = lqer.repair(E, getattr(lqer, method)(E, statistic), rank)
            U, S, V = torch.linalg.svd(half @ E, full_matrices=False)
            best = inverse @ (U[:, :rank] * S[:rank]) @ V[:rank]
            assert A.shape == (shape[0], rank)
            torch.testing.assert_close(A @ B, best, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(B @ B.T, torch.eye(rank, dtype=E.dtype))


def test_no_repair_leaves_less_of_the_output_error_than_qera():
    E, R = correlated(24, 16)
    W = torch.randn_like(E)
    left = {}
    for method, statistic in (("qera", R), ("lqer_act", R.diagonal().sqrt()), ("lqer_svd", None)):
        A, B = lqer.repair(E, getattr(lqer, method)(E, statistic), 4)
        left[method] = lqer.output_error(E - A @ B, W, R)
    x = torch.linalg.cholesky(R).T
    expected = (x @ E).square().sum() / (x @ W).square().sum()
    assert lqer.output_error(E, W, R) == pytest.approx(expected.item())
    assert 0 < left["qera"] < left["lqer_act"] < left["lqer_svd"] < expected


def test_an_error_of_lower_rank_is_repaired_whole_and_without_nan():
    _, R = correlated(24, 16)
    E = torch.zeros(24, 16, dtype=torch.float64)
    E[:, 3] = 1.0
    A, B = lqer.repair(E, R, 8)
    torch.testing.assert_close(A @ B, E)
    A, B = lqer.repair(0 * E, R, 8)
    assert torch.equal(A @ B, 0 * E)


def test_a_channel_that_never_fires_has_the_least_published_scale():
    scale = lqer.lqer_act(torch.ones(2, 2), torch.tensor([0.0, 2.0]))
    assert scale.tolist() == pytest.approx([1e-8, 4.0])


# --- statistics ---


def test_peaks_are_of_blocks_means_and_shards_join_to_the_whole(tmp_path):
    tiny_llama(tmp_path / "dense")
    whole = collect(tmp_path / "dense", tmp_path)
    text = ["--text", tmp_path / "text.txt", "--tokens", "512", *BLOCK]
    name = "attention_input_peak.safetensors"
    shards = [tmp_path / f"{i}of2" / name for i in range(2)]
    for shard in shards:
        run("collect", tmp_path / "dense", *text, "--shard", shard.parent.name, "-o", shard)
    run("merge", *shards, "-o", tmp_path / name)
    found = [Rxx(p / name, "attention_input_peak").R(1, (64,)) for p in (whole, tmp_path)]
    assert torch.equal(*found)
    peaks = [Rxx(p, "attention_input_peak").R(1, (64,)) for p in shards]
    assert torch.equal(found[0], torch.maximum(*peaks))
    mean = Rxx(whole / "attention_input.safetensors", "attention_input").R(1, (64, 64))
    # The mean of |x| is at most the root mean square, and the largest of eight blocks not far off.
    assert (found[0] < 2 * mean.diagonal().sqrt()).all()
    assert (found[0] > mean.diagonal().sqrt() / 3).all()


def test_a_compressed_model_has_statistics_of_its_own_inputs(tmp_path, capsys):
    tiny_llama(tmp_path / "dense")
    modes = ["--qk", "rxx-w-rxx@0.25", "--ov", "identity@0.5", "--mlp", "rxx-w@0.25"]
    (tmp_path / "text.txt").write_text(TEXT * 99)
    text = ["--text", tmp_path / "text.txt", "--tokens", "512", *BLOCK]
    run("compress", tmp_path / "dense", *modes, *text, "-o", tmp_path / "small")
    rxx = collect(tmp_path / "small", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    sums, count = {}, 0

    def keep(name):
        def hook(_, inputs):
            x = inputs[0][0].double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return hook

    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(keep("down_input"))
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(keep("o_proj_input"))
    blocks = token_blocks(
        load_documents(tmp_path / "text.txt"),
        load_tokenizer(tmp_path / "small"),
        block_length=64,
        tokens=512,
        seed=0,
        bos=True,
    )
    with torch.inference_mode():
        for block in blocks:
            model(block[None])
            count += len(block)
    for kind, width in (("down_input", 72), ("o_proj_input", 32)):
        R = Rxx(rxx / f"{kind}.safetensors", kind).R(1, (width, width))
        torch.testing.assert_close(R, sums[kind] / count, rtol=1e-5, atol=1e-7)
    out = tmp_path / "q_blocks.safetensors"
    assert main([*map(str, ["collect", tmp_path / "small", *text, "-o", out])]) == 1
    assert "'q_blocks': a compressed model has only statistics of inputs" in capsys.readouterr().err
    again = tmp_path / "streamed" / f"{KINDS[0]}.safetensors"
    streamed = ["collect", tmp_path / "small", *text, "--stream", "-o", again]
    assert main([*map(str, streamed)]) == 0
    assert again.read_bytes() == (rxx / again.name).read_bytes()


# --- the model ---


FAMILIES = ("llama-biased", "gpt2", "opt", "bloom", "gemma2", "gemma3", "gpt_neo", "mpt", "falcon")


@pytest.mark.parametrize("name", FAMILIES)
def test_formats_that_leave_all_as_it_is_leave_the_model_as_it_is(tmp_path, name):
    model_type, config = MODELS[name]
    tiny_model(tmp_path / "dense", model_type, **config)
    rxx = collect(tmp_path / "dense", tmp_path, 64)
    record = make(tmp_path / "dense", rxx, PLAIN, "none", None, tmp_path / "low")
    dense, low = load(tmp_path / "dense"), load(tmp_path / "low")
    expected = dense(tokens()).logits
    torch.testing.assert_close(low(tokens()).logits, expected, rtol=1e-6, atol=1e-6)
    assert sum(isinstance(m, QuantisedLinear) for m in low.modules()) == len(record["matrices"])
    # The same with attention that could quantise, of whichever mask the family has.
    low.config._attn_implementation = "eager"
    for module in low.modules():
        if hasattr(module, "eager"):
            module.eager = QuantisedProducts(dict.fromkeys("qkpv", "none"))
    torch.testing.assert_close(low(tokens()).logits, expected, rtol=1e-6, atol=1e-6)


def test_a_layer_is_what_the_formula_says(tmp_path):
    tiny_llama(tmp_path / "dense", attention_bias=True, mlp_bias=True)
    rxx = collect(tmp_path / "dense", tmp_path)
    one = {"match": r".*\.(q|k|v|o)_proj", "W": "int4/16", "x": "bfp6/16", "A": "e4m3", "rank": 3}
    recipe = {"layers": [one | {"B": "bfp8/2", "bias": "bfp5/row"}]}
    record = make(tmp_path / "dense", rxx, recipe, "qera", 8, tmp_path / "low")
    dense, low = load(tmp_path / "dense"), load(tmp_path / "low")
    was, now = (m.model.layers[1].self_attn.o_proj for m in (dense, low))
    W = was.weight.detach().T
    E = W - quantise(W.T, "int4/16").T
    R = Rxx(rxx / "o_proj_input.safetensors", "o_proj_input").R(1, (64, 64))
    A, B = lqer.repair(E, R, 3)
    A, B = quantise(A.T, "e4m3").T, quantise(B.T, "bfp8/2").T
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    x_q = quantise(x, "bfp6/16")
    bias = quantise(was.bias.detach(), "bfp5/row")
    expected = x_q @ (W - E) + quantise(x_q @ A, "bfp6/16") @ B + bias
    torch.testing.assert_close(now(x), expected, rtol=1e-9, atol=1e-9)
    said = record["matrices"]["model.layers.1.self_attn.o_proj"]
    assert said["rank"] == 3
    left = E - A @ B
    assert said["relative_error"] == pytest.approx(lqer.output_error(left, W, R), rel=1e-6)
    # The MLP is not named, and stays.
    assert type(low.model.layers[1].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(
        low.model.layers[1].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight
    )


def test_attention_products_are_of_quantised_operands():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 6, 8, dtype=torch.float64) for heads in (4, 2, 2))
    mask = torch.full((6, 6), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    module = torch.nn.Module()
    module.num_key_value_groups, module.qk_rank, module.ov_rank = 2, 8, 8
    formats = {"q": "bfp4/4", "k": "bfp5/4", "p": "int4/3", "v": "bfp3/8"}
    out, _ = QuantisedProducts(formats)(module, q, k, v, mask, scaling=0.3)
    for head in range(4):
        for m in range(6):
            keys = quantise(k[0, head // 2, : m + 1], "bfp5/4")
            scores = 0.3 * keys @ quantise(q[0, head, m], "bfp4/4")
            weights = torch.zeros(6, dtype=torch.float64)
            weights[: m + 1] = scores.softmax(0)
            expected = quantise(weights, "int4/3") @ quantise(v[0, head // 2], "bfp3/8")
            torch.testing.assert_close(out[0, m, head], expected, rtol=1e-5, atol=1e-6)


def test_generation_with_a_cache_is_that_without(tmp_path):
    tiny_llama(tmp_path / "dense")
    rxx = collect(tmp_path / "dense", tmp_path)
    make(tmp_path / "dense", rxx, LOW, "qera", 8, tmp_path / "low")
    model, ids = load(tmp_path / "low"), tokens(12)
    whole = model(ids).logits
    first = model(ids[:, :7], use_cache=True)
    rest = [first.logits]
    for i in range(7, 12):
        step = model(ids[:, i : i + 1], past_key_values=first.past_key_values, use_cache=True)
        rest.append(step.logits)
    torch.testing.assert_close(torch.cat(rest, 1), whole, rtol=1e-6, atol=1e-6)
    dense = load(tmp_path / "dense")(ids).logits
    assert (whole - dense).norm() / dense.norm() > 0.01


def test_methods_order_by_their_layers_errors_and_bits_add_up(tmp_path):
    tiny_llama(tmp_path / "dense")
    rxx = collect(tmp_path / "dense", tmp_path)
    errors, records = {}, {}
    for method in METHODS:
        rank = None if method == "none" else 8
        record = make(tmp_path / "dense", rxx, LOW, method, rank, tmp_path / method)
        errors[method] = {k: m["relative_error"] for k, m in record["matrices"].items()}
        records[method] = record
    for module, least in errors["qera"].items():
        assert all(least <= errors[method][module] for method in METHODS), module
        assert errors["none"][module] == records["none"]["matrices"][module]["quantisation_error"]
    # q and o 64 × 64, k and v 64 × 32, gate, up 64 × 96, down 96 × 64: all divisible by 16.
    shapes = [(64, 64), (64, 64), (64, 32), (64, 32), (64, 96), (64, 96), (96, 64)]
    weights = sum(m * n for m, n in shapes)
    # Of B, 8 numbers make a block: one exponent for 8.
    repaired = sum(8 * m * 8.5 + 8 * n * 9 for m, n in shapes)
    sizes = {method: records[method]["size"]["compressed"] for method in METHODS}
    assert sizes["none"]["bits_per_weight"] == pytest.approx(3.5)
    assert sizes["qera"]["bits_per_weight"] == pytest.approx(3.5 + repaired / weights)
    dense = records["none"]["size"]["dense"]
    added = 2 * sum(8 * (m + n) for m, n in shapes)
    assert sizes["none"]["parameters"] == dense["parameters"]
    assert sizes["qera"]["parameters"] == dense["parameters"] + added
    assert sizes["qera"]["flops_per_token"] == dense["flops_per_token"] + 2 * added


def test_weights_lie_in_the_folders_dtype_where_it_holds_them(tmp_path):
    tiny_llama(tmp_path / "dense")
    rxx = collect(tmp_path / "dense", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").bfloat16()
    model.save_pretrained(tmp_path / "half")
    for path in (tmp_path / "dense").glob("tokenizer*"):
        (tmp_path / "half" / path.name).write_bytes(path.read_bytes())
    rxx = collect(tmp_path / "half", tmp_path)
    key = "model.layers.0.mlp.up_proj.weight"
    for spelled, dtype in (("bfp4/16", torch.bfloat16), ("int4/16", torch.float32)):
        recipe = {"layers": [{"match": ".*", "W": spelled}]}
        out = tmp_path / spelled[:3]
        record = make(tmp_path / "half", rxx, recipe, "none", None, out)
        W = load_file(out / "model.safetensors")[key]
        assert W.dtype == dtype
        expected = quantise(model.model.layers[0].mlp.up_proj.weight.detach().double(), spelled)
        assert torch.equal(W.double(), expected)
        bits = parse_format(spelled).bits(1, 16, 16) / 16
        assert record["size"]["compressed"]["bits_per_weight"] == pytest.approx(bits)


def test_a_compressed_model_is_quantised_and_counted_by_the_dense_one(tmp_path, capsys):
    tiny_llama(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT * 99)
    text = ["--text", tmp_path / "text.txt", "--tokens", "512", *BLOCK]
    run("compress", tmp_path / "dense", "--ratio", "0.25", *text, "-o", tmp_path / "small")
    rxx = collect(tmp_path / "small", tmp_path)
    record = make(tmp_path / "small", rxx, LOW, "qera", 8, tmp_path / "low")
    small = json.loads((tmp_path / "small/approx.json").read_text())
    assert record["base"] == small["base"]
    assert record["layers"] == small["layers"]
    assert record["approx"] == small["provenance"]
    # All sizes are three quarters, and still multiples of what makes 3.5 bits a number, but for o.
    shapes = [(64, 48), (48, 64), (64, 24), (64, 24), (64, 72), (64, 72), (72, 64)]
    bits = sum(n * (3 * m + 8 * -(-m // 16)) for m, n in shapes)
    bits += sum(8 * (8 * m + 8 * -(-m // 16)) + n * 72 for m, n in shapes)
    dense = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    assert record["size"]["compressed"]["bits_per_weight"] == pytest.approx(bits / dense)
    scoring = ["--text", tmp_path / "text.txt", "--tokens", "256", *BLOCK]
    run("eval", "ppl", tmp_path / "low", *scoring, "-o", tmp_path / "ppl.json")
    assert json.loads((tmp_path / "ppl.json").read_text())["perplexity"] > 1
    # Neither are they quantised twice,
    again = ["quantise", tmp_path / "low", "--rxx", collect(tmp_path / "low", tmp_path)]
    assert main([*map(str, again), "--rank", "4", "-o", str(tmp_path / "x")])
    assert "quantised (a3 quantise); dequantise it first" in capsys.readouterr().err
    # nor by statistics of the dense model, which is another one.
    rxx = collect(tmp_path / "dense", tmp_path)
    assert main(["quantise", *map(str, [tmp_path / "small", "--rxx", rxx, "--rank", 4]), "-o", "x"])
    assert "made from another model" in capsys.readouterr().err


# --- what is refused ---


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"layers": [{"match": "q_proj"}]}, "a whole name such as model.layers.0.self_attn.q_proj"),
        ({"layers": [{"match": "("}]}, "not a regular expression"),
        ({"layers": [{}]}, "'match' is a required property"),
        ({"layers": [{"match": ".*", "w": "none"}]}, "unknown key 'w' at layers.0"),
        ({"layers": [{"match": ".*", "W": "bfp4"}]}, "layers.0.W: 'bfp4' does not match"),
        ({"layers": [{"match": ".*"}], "products": {"s": "none"}}, "unknown key 's' at products"),
        ({"products": {}}, "'layers' is a required property"),
    ],
)
def test_recipes_that_say_nothing_sensible_are_refused(tmp_path, capsys, recipe, said):
    tiny_llama(tmp_path / "dense")
    rxx = collect(tmp_path / "dense", tmp_path, 64)
    words = ["quantise", tmp_path / "dense", "--rxx", rxx, "--recipe", json.dumps(recipe)]
    assert main([*map(str, words), "--rank", "4", "-o", str(tmp_path / "low")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "low").exists()


def test_a_repair_as_large_as_its_matrix_is_refused(tmp_path, capsys):
    """k of 64 × 32 numbers: 21 (64 + 32) are fewer, 22 are not; by the table or by an entry."""
    tiny_llama(tmp_path / "dense")
    rxx = collect(tmp_path / "dense", tmp_path, 64)
    own = {"layers": [{"match": r".*k_proj", "W": "int4/16", "rank": 22}]}
    for recipe, rank in ((own, 4), (own | {"layers": [{"match": r".*k_proj"}]}, 1000)):
        words = ["quantise", tmp_path / "dense", "--rxx", rxx, "--recipe", json.dumps(recipe)]
        assert main([*map(str, words), "--rank", str(rank), "-o", str(tmp_path / "low")]) == 1
        said = capsys.readouterr().err
        assert "self_attn.k_proj, which is 32 × 64" in said
        assert "Take a rank of at most 21." in said
        assert not (tmp_path / "low").exists()


def test_products_of_two_and_mixtures_are_refused(tmp_path, capsys):
    tiny_model(tmp_path / "mixture", *MODELS["mixtral"][:1], **MODELS["mixtral"][1])
    words = ["quantise", str(tmp_path / "mixture"), "--rxx", "x", "--rank", "4", "-o", "low"]
    assert main(words) == 1
    assert "a mixture of experts, which a3 cannot quantise yet" in capsys.readouterr().err
    tiny_llama(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT * 99)
    text = ["--text", tmp_path / "text.txt", "--tokens", "512", *BLOCK]
    svd = ["--qk", "svd@0.25", "--ov", "dense", "--mlp", "dense"]
    run("compress", tmp_path / "dense", *svd, *text, "-o", tmp_path / "small")
    rxx = collect(tmp_path / "small", tmp_path, 64)
    words = ["quantise", tmp_path / "small", "--rxx", rxx, "--rank", "4", "-o", tmp_path / "low"]
    assert main([*map(str, words)]) == 1
    assert "q_proj is a factored matrix" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("qera@32", "expected a recipe, a method and its rank"),
        ("w4a8+qera", "has no rank"),
        ("w4a8+none@4", "has rank 4"),
        ("w4a8+gptq@4", "is not known. Methods: none, lqer-svd, lqer-act, qera"),
        ("w4a8+qera@0", "expected a recipe"),
    ],
)
def test_cells_of_a_table_say_what_is_wrong_with_them(cell, said):
    with pytest.raises(A3Error) as error:
        parse_quantisation(cell)
    assert said in str(error.value)


# --- the published templates, and the table ---


def test_the_first_expression_that_fits_a_whole_name_counts():
    rules = [{"match": r"model\.layers\.[0-9]+\.self_attn\.(k|q|v|o)_proj", "rank": 1}]
    recipe = complete_recipe({"layers": [*rules, {"match": r".*\.1\..*", "rank": 2}]})
    assert entry_for(recipe, "model.layers.1.self_attn.k_proj")["rank"] == 1
    assert entry_for(recipe, "model.layers.1.mlp.up_proj")["rank"] == 2
    assert entry_for(recipe, "model.layers.0.mlp.up_proj") is None


def test_a_row_has_a_place_of_its_own():
    results = Path("results")
    low = Place("m", "c", "dense", "dense", "dense", "-", "w4a8+qera@32")
    tail = "m/c/dense+dense+dense/-/w4a8+qera@32"
    assert low.weights(results) == results / "quantised" / tail / "approx.json"
    assert low.perplexity(results, "t") == results / "eval" / tail / "ppl/t.json"
    assert low.rxx(results, "k") == results / "rxx/m/c/k.safetensors"
    assert (low.method, low.nominal, low.is_dense) == ("w4a8+qera@32", None, False)
    assert low.base == Place("m")
    both = Place("m", "c", "a", "b", "d", "0.1", "w4a8+none")
    assert both.method == "a+b+d+w4a8+none"
    assert both.rxx(results, "k") == results / "rxx/m/c/a+b+d/0.1/k.safetensors"
    assert both.base == Place("m", "c", "a", "b", "d", "0.1")


def test_a_table_may_have_the_column_and_names_recipes_that_there_are(tmp_path):
    config = {
        "models": {"m": {"source": {"path": "m"}}},
        "calibrations": {"c": {"text": "t"}},
        "texts": {"t": {"source": {}}},
        "evaluate": {"perplexity": [], "harness": []},
        "quantisations": {"w4a8": PLAIN},
    }
    head = "model\tcalibration\tqk\tov\tmlp\tratio\tquantise"
    row = "m\tc\tdense\tdense\tdense\t-\t{}"

    def read(*cells):
        path = tmp_path / "t.tsv"
        path.write_text("\n".join([head, *map(row.format, cells)]) + "\n")
        return read_experiments(path, config)

    assert [r["quantise"] for r in read("w4a8+none", "w4a8+qera@8")] == ["w4a8+none", "w4a8+qera@8"]
    with pytest.raises(A3Error, match=r"row 2: means the same as row 1"):
        read("w4a8+none", "w4a8+none")
    with pytest.raises(A3Error, match=r"row 1: config: quantise names the recipe 'w2a8'"):
        read("w2a8+none")


def test_the_table_of_lqer_is_planned_from_the_files_of_the_repository():
    command = [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "--configfile"]
    command += [
        "config/config.yaml",
        "config/studies/lqer/config.yaml",
        "--config",
        "results=none-yet",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Four compressed models, and 31 rows that are quantised, 8 of them of these.
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE))
    assert (jobs["quantise"], jobs["collect_compressed"], jobs["eval_ppl"]) == ("31", "4", "36")


def test_tables_figures_and_verification_know_quantised_rows(tmp_path, capsys):
    made = tiny_results(tmp_path)
    place = dict(zip(("model", "calibration", "modes", "ratio"), TAIL.split("/"), strict=True))
    small = dict(zip(("qk", "ov", "mlp"), place.pop("modes").split("+"), strict=True)) | place
    whole = {"model": "tiny", "calibration": "short", "ratio": "-"}
    whole |= dict.fromkeys(("qk", "ov", "mlp"), "dense")
    rows = [small] + [
        row | {"quantise": cell} for row in (whole, small) for cell in ("low+none", "low+qera@8")
    ]
    scoring = ["--text", made / "texts/score/test.jsonl", "--tokens", "256", *BLOCK]
    text = ["--text", made / "texts/learn/docs.jsonl", "--tokens", "512", *BLOCK]
    for place in (Place(**row) for row in rows[1:]):
        base = place.base.weights(made).parent
        kinds = [place.rxx(made, kind) for kind in KINDS]
        if not kinds[0].exists():
            run("collect", base, *text, "-o", *kinds)
        _, _, rank = place.quantise.partition("@")
        method = place.quantise.split("+")[1].split("@")[0]
        out = place.weights(made).parent
        make(base, kinds[0].parent, LOW, method, int(rank) if rank else None, out)
        run("eval", "ppl", out, *scoring, "-o", place.perplexity(made, "score"))
    inputs = ["--results", made, "--experiments", json.dumps(rows), "--perplexity", "score"]
    run("tables", *inputs, "--reference", "low+qera@8", "-o", tmp_path / "table")
    frame = read_csv(tmp_path / "table/results.csv")
    assert frame["quantise"].tolist() == ["-", "-", *[row["quantise"] for row in rows[1:]]]
    # A quarter of the weights is gone; what is left has some 3.5 bits, some more with a repair.
    bits = frame["bits_per_weight"]
    assert bits[:3].tolist() == pytest.approx([32, 24, 3.5])
    assert bits[4] == pytest.approx(3 * 0.75, rel=0.2)
    assert bits[3] - bits[2] > 1
    said = (tmp_path / "table/results.md").read_text()
    assert "bits a weight" in said
    assert "low + qera@8" in said
    run("figures", *inputs, "-o", tmp_path / "figures")
    assert (tmp_path / "figures/bits-tiny.svg").stat().st_size > 1000
    run("verify", made)
    assert "4 quantised checkpoints" in capsys.readouterr().out
    weights = Place(**rows[-1]).weights(made).parent / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert main(["verify", str(made)]) == 1
    assert "quantised" in capsys.readouterr().err
