"""PCA surgery, held to the definition of PCA in numpy, and to edwinhere/surgery's own choices."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_compressed import MODELS, needs, redraw
from test_workflow import CONFIG, Project
from tiny import BLOCK, LINES, TAIL, run, tiny_llama, tiny_model, tiny_results
from transformers import AutoModelForCausalLM, AutoTokenizer

import a3  # noqa: F401
from a3.cli.main import main
from a3.core.errors import A3Error
from a3.core.files import load_yaml
from a3.experiments.config import complete
from a3.experiments.rows import read_experiments, read_surgeries
from a3.models.arch import load_arch
from a3.solutions.pca import affordable, many_inputs, one_input
from a3.solutions.surgeries import PROJECTIONS, SURGERIES, Size, find_surgery, parse_size
from a3.stages.approx.surgery import Operation, surgery
from a3.stages.collect.collect import collect

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "workflow/schemas/config.schema.yaml"
SETTINGS = {"tokens": 512, "block_length": 64, "seed": 0, "bos": True}
# One of each way in which q, k and v lie in a checkpoint.
LAYOUTS = (
    *("llama-wide-heads", "llama-mqa", "bloom", "falcon-gqa", "gpt2", "gpt_bigcode", "gptj"),
    *("mpt", "opt", "phi3", "qwen3"),
)
PLAIN = [name for name, each in SURGERIES.items() if not each.metric]
METRIC = [name for name, each in SURGERIES.items() if each.metric]


# --- the definition, slow and in numpy: rows of X are samples ---


def reference(X, share, back=True):
    """Rows of X from the fewest components that explain `share`; their number, and the means."""
    mean = X.mean(0)
    _, S, Vt = np.linalg.svd(X - mean, full_matrices=False)
    ratios = np.cumsum(S**2) / np.sum(S**2)
    count = len(S) if share == 1 else int(np.argmax(ratios >= share)) + 1
    return (X - mean) @ Vt[:count].T @ Vt[:count] + mean * back, count, mean


def symmetric_root(R):
    values, V = np.linalg.eigh(R)
    return V * np.sqrt(values.clip(0)) @ V.T


def explained(found, count):
    return 1 - found.left[count].item()


def spread(seed, *shape):
    """Weights with a mean and a falling spectrum."""
    rng = np.random.default_rng(seed)
    m, n = shape
    falling = np.exp(-np.arange(min(m, n)) / 4)
    left, right = rng.normal(size=(m, len(falling))), rng.normal(size=(len(falling), n))
    return left * falling @ right + rng.normal(size=n) * 0.5


def autocorrelation(seed, d, tokens=200):
    x = np.random.default_rng(seed).normal(size=(tokens, d)) * np.linspace(0.1, 3, d)
    return (x + 0.3).T @ (x + 0.3) / tokens


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99, 1])
@pytest.mark.parametrize(("out", "inputs"), [(12, 20), (20, 20), (31, 20)])
def test_one_matrix_is_its_pca_along_the_originals_axis(out, inputs, share):
    """As the original: the samples are the rows of a torch weight, unless there are more of them
    than inputs; then they are its columns."""
    weight = spread(0, out, inputs)
    X = weight if out <= inputs else weight.T
    expected, count, mean = reference(X, share)
    found = one_input([torch.tensor(weight.T)])
    assert share == 1 or found.count(1 - share) == count
    assert found.mean.flatten().numpy() == pytest.approx(mean, abs=1e-12)
    (W,) = found.rebuild(found.count(1 - share))
    assert W.numpy() == pytest.approx(expected.T if out <= inputs else expected, abs=1e-10)
    assert explained(found, found.count(1 - share)) >= share - 1e-12
    stored = count * (out + inputs) + len(mean)
    assert share == 1 or found.parameters(count, mean=True) == stored
    assert share == 1 or found.parameters(count, mean=False) == stored - len(mean)


@pytest.mark.parametrize("share", [0.3, 0.8, 0.99, 1])
def test_keys_and_values_share_the_components_of_their_stack(share):
    k, v = spread(1, 12, 20), spread(2, 12, 20) * 0.3
    expected, count, _ = reference(np.vstack([k, v]), share)
    found = one_input([torch.tensor(k.T), torch.tensor(v.T)])
    assert share == 1 or found.count(1 - share) == count
    for W, rows in zip(found.rebuild(found.count(1 - share)), np.split(expected, 2), strict=True):
        assert W.numpy() == pytest.approx(rows.T, abs=1e-10)
    assert found.parameters(count, mean=True) == count * (20 + 24) + 20


@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_layers_share_the_components_of_all_rows(share):
    weights = [spread(seed, 12, 20) for seed in range(5)]
    expected, count, _ = reference(np.vstack(weights), share)
    found = many_inputs([torch.tensor(W.T) for W in weights])
    assert found.count(1 - share) == count
    for W, rows in zip(found.rebuild(count), np.split(expected, 5), strict=True):
        assert W.numpy() == pytest.approx(rows.T, abs=1e-9)
    assert found.parameters(count, mean=True) == count * (20 + 60) + 20


@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_the_metric_makes_it_the_pca_of_the_outputs(share):
    """R^½ W̃ in place of W̃, and R^-½ of what its components make: a full inverse, as a check."""
    weight, R = spread(3, 12, 20), autocorrelation(0, 20)
    root = symmetric_root(R)
    mean = weight.mean(0)
    _, S, Vt = np.linalg.svd((weight - mean) @ root, full_matrices=False)
    count = int(np.argmax(np.cumsum(S**2) / np.sum(S**2) >= share)) + 1
    expected = (weight - mean) @ root @ Vt[:count].T @ Vt[:count] @ np.linalg.inv(root) + mean
    found = one_input([torch.tensor(weight.T)], torch.tensor(R))
    assert found.count(1 - share) == count
    assert found.rebuild(count)[0].numpy() == pytest.approx(expected.T, abs=1e-9)
    lost = 1 - np.sum(((weight - expected) @ root) ** 2) / np.sum(((weight - mean) @ root) ** 2)
    assert explained(found, count) == pytest.approx(lost, abs=1e-10)


def test_a_metric_that_sees_few_directions_needs_no_inverse():
    R = autocorrelation(1, 20, tokens=6)
    weight = spread(4, 12, 20)
    found = one_input([torch.tensor(weight.T)], torch.tensor(R))
    (W,) = found.rebuild(found.count(1e-9))
    assert found.count(1e-9) <= 6
    assert np.sum((symmetric_root(R) @ (W.numpy() - weight.T)) ** 2) < 1e-6
    assert found.rebuild(12)[0].numpy() == pytest.approx(weight.T, abs=1e-12)


def test_layers_with_inputs_of_their_own_have_the_best_decoders():
    weights = [spread(seed, 12, 20) for seed in range(4)]
    metrics = [autocorrelation(seed, 20) * (seed + 1) for seed in range(4)]
    found = many_inputs([torch.tensor(W.T) for W in weights], list(map(torch.tensor, metrics)))
    mean = np.vstack(weights).mean(0)
    root = symmetric_root(np.mean(metrics, 0))
    _, _, Vt = np.linalg.svd((np.vstack(weights) - mean) @ root, full_matrices=False)
    count = found.count(1 - 0.8)
    encoder = np.linalg.inv(root) @ Vt[:count].T
    kept = whole = 0
    for W, R, rebuilt in zip(weights, metrics, found.rebuild(count), strict=True):
        S = symmetric_root(R)
        decoder, *_ = np.linalg.lstsq(S @ encoder, S @ (W - mean).T)
        expected = encoder @ decoder + mean[:, None]
        assert rebuilt.numpy() == pytest.approx(expected, abs=1e-8)
        whole += np.sum((S @ (W - mean).T) ** 2)
        kept += np.sum((S @ (expected - mean[:, None])) ** 2)
    assert explained(found, count) == pytest.approx(kept / whole, abs=1e-9)
    assert explained(found, count) >= 0.8 > explained(found, count - 1)
    for W, rebuilt in zip(weights, found.rebuild(20), strict=True):
        assert rebuilt.numpy() == pytest.approx(W.T, abs=1e-9)


def test_equal_metrics_of_layers_are_the_metric_of_one_stack():
    weights = [spread(seed, 12, 20) for seed in range(3)]
    R = torch.tensor(autocorrelation(5, 20))
    many = many_inputs([torch.tensor(W.T) for W in weights], [R] * 3)
    one = one_input([torch.tensor(W.T) for W in weights], R)
    assert many.count(0.1) == one.count(0.1)
    for a, b in zip(many.rebuild(many.count(0.1)), one.rebuild(one.count(0.1)), strict=True):
        assert a.numpy() == pytest.approx(b.numpy(), abs=1e-9)


def test_a_budget_is_used_up_but_for_one_component():
    found = [one_input([torch.tensor(spread(seed, 12, 20).T)]) for seed in range(6)]
    for budget in (400, 700, 1200):
        left = affordable(found, budget, mean=True)
        counts = [each.count(left) for each in found]
        stored = sum(count * 32 + 20 for count in counts)
        assert stored <= budget
        assert stored + 32 > budget
        # Nobody has a component more than the share asks for.
        assert all(explained(e, c) >= 1 - left for e, c in zip(found, counts, strict=True))
        assert all(explained(e, c - 1) < 1 - left for e, c in zip(found, counts, strict=True))
    assert affordable(found, 6 * 52 - 1, mean=True) is None


def test_nothing_to_explain_takes_no_component():
    found = one_input([torch.full((20, 12), 0.5, dtype=torch.float64)])
    assert found.count(0.1) == 0
    assert explained(found, 0) == 1
    assert found.rebuild(0)[0].numpy() == pytest.approx(0.5)


# --- whole models ---


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Two layers, groups of two heads, and statistics."""
    folder = tmp_path_factory.mktemp("llama")
    return with_statistics(tiny_llama(folder / "dense"))


def with_statistics(dense):
    (dense.parent / "text.txt").write_text(" ".join(LINES) * 60)
    out = {"attention_input": dense.parent / "rxx" / "attention_input.safetensors"}
    collect(dense, dense.parent / "text.txt", out, **SETTINGS, dtype="float32", device="cpu")
    return dense


def operate(dense, mode, size, out):
    surgery(dense, dense.parent / "rxx", mode, parse_size(size), out)
    return json.loads((out / "approx.json").read_text())


def heads(folder, layer, name):
    return load_file(folder / "model.safetensors")[
        f"model.layers.{layer}.self_attn.{name}_proj.weight"
    ]


@pytest.mark.parametrize("mode", SURGERIES)
def test_all_variance_is_the_dense_model_but_for_a_mean_left_out(llama, tmp_path, mode):
    operate(llama, mode, "variance@1", tmp_path / "out")
    dense, made = (load_file(f / "model.safetensors") for f in (llama, tmp_path / "out"))
    assert dense.keys() == made.keys()
    whole = find_surgery(mode).mean
    for name, W in dense.items():
        operated = any(f"{projection}_proj" in name for projection in PROJECTIONS)
        error = (made[name] - W).abs().max().item()
        assert (error == 0) if not operated else (error < 1e-6) == whole, name
    if not whole:
        k, v = (heads(llama, 0, name).double() for name in "kv")
        mean = (torch.cat((k, v)) if "shared" in mode else k).mean(0)
        expected = (k - mean).float()
        assert torch.allclose(heads(tmp_path / "out", 0, "k"), expected, atol=1e-6)


@pytest.mark.parametrize("mode", PLAIN)
def test_plain_modes_are_the_reference(llama, tmp_path, mode):
    record = operate(llama, mode, "variance@0.7", tmp_path / "out")
    back, shared = find_surgery(mode).mean, find_surgery(mode).shared
    read = {(i, n): heads(llama, i, n).double().numpy() for i in range(2) for n in PROJECTIONS}
    stacks = {
        "": [[each] for each in read],
        "kv": [[(i, n) for n in names] for i in range(2) for names in ("q", "kv")],
        "layers": [[(0, "q"), (1, "q")], [(0, "k"), (0, "v"), (1, "k"), (1, "v")]],
    }[shared]
    parameters = 0
    for stack in stacks:
        X = np.vstack([read[each] for each in stack])
        rebuilt, count, mean = reference(X, 0.7, back)
        parameters += count * sum(X.shape) + back * len(mean)
        cuts = np.cumsum([len(read[each]) for each in stack])[:-1]
        for (layer, name), expected in zip(stack, np.split(rebuilt, cuts), strict=True):
            found = heads(tmp_path / "out", layer, name).numpy()
            assert found == pytest.approx(expected, abs=1e-6), (layer, name)
            said = record["layers"][layer][name]
            assert said["principal_components"] == count
            W = read[layer, name]
            error = np.sum((W - expected) ** 2) / np.sum(W**2)
            assert said["relative_error"] == pytest.approx(error, rel=1e-9)
    assert record["if_stored"]["qkv"] == parameters
    assert record["if_stored"]["qkv_dense"] == 2 * 64 * (64 + 32 + 32)
    assert record["size"]["compressed"]["parameters"] == record["size"]["dense"]["parameters"]
    less = record["if_stored"]["qkv_dense"] - parameters
    assert record["if_stored"]["parameters"] == record["base"]["size"]["parameters"] - less


@pytest.mark.parametrize("mode", METRIC)
def test_the_metric_loses_less_of_the_outputs(llama, tmp_path, mode):
    """At equal stored parameters, by the metric's own measure, on the text it was collected on."""
    size = "parameters@0.5"
    plain = mode.removesuffix("-rxx")
    lost = {}
    R = Operation(llama, llama.parent / "rxx", mode).metric
    for each in (mode, plain):
        record = operate(llama, each, size, tmp_path / each)
        assert 0.47 < record["if_stored"]["qkv"] / record["if_stored"]["qkv_dense"] <= 0.5
        lost[each] = 0
        for layer in range(2):
            for name in PROJECTIONS:
                delta = (heads(tmp_path / each, layer, name) - heads(llama, layer, name)).double()
                lost[each] += torch.trace(delta @ R(layer) @ delta.T).item()
    assert lost[mode] < lost[plain]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_keeps_its_shapes_and_all_that_is_not_operated_on(tmp_path, name):
    model_type, config = MODELS[name]
    needs(model_type)
    dense, out = tiny_model(tmp_path / "dense", model_type, **config), tmp_path / "out"
    redraw(dense)
    record = operate(dense, "pca-separate", "variance@0.3", out)
    assert (out / "config.json").read_bytes() == (dense / "config.json").read_bytes()
    assert record["size"]["compressed"] == record["size"]["dense"]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (dense, out)]
    assert type(models[0]) is type(models[1])
    ids = torch.tensor([[0, 5, 17, 101, 250, 9]])
    with torch.inference_mode():
        before, after = (model(ids).logits for model in models)
    assert (before - after).abs().max() > 1e-3 * before.abs().max()
    # Read back through the adapter, each matrix is the reference's.
    was, now = Operation(dense, None, "pca-separate"), Operation(out, None, "pca-separate")
    for layer in range(2):
        for projection in PROJECTIONS:
            W = was.weight(layer, projection).numpy().T
            X = W if W.shape[0] <= W.shape[1] else W.T
            rebuilt, count, _ = reference(X, 0.3)
            expected = rebuilt if X is W else rebuilt.T
            found = now.weight(layer, projection).numpy().T
            assert found == pytest.approx(expected, abs=1e-5)
            assert record["layers"][layer][projection]["principal_components"] == count
    # As many numbers differ as Q, K and V have: nothing else was touched.
    tensors = [load_file(folder / "model.safetensors") for folder in (dense, out)]
    changed = sum((tensors[0][key] != tensors[1][key]).sum().item() for key in tensors[0])
    assert 0.9 * was.dense_parameters < changed <= was.dense_parameters


def test_weights_in_several_files_stay_in_them(tmp_path):
    dense, out = tiny_llama(tmp_path / "dense"), tmp_path / "out"
    operate(dense, "pca-shared-kv", "variance@0.5", tmp_path / "one")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(dense).save_pretrained(dense, max_shard_size="100KB")
    (dense / "model.safetensors").unlink()
    operate(dense, "pca-shared-kv", "variance@0.5", out)
    files = sorted(path.name for path in dense.glob("model*"))
    assert len(files) > 3
    assert sorted(path.name for path in out.glob("model*")) == files
    files = [load_file(out / name) for name in files if name.endswith(".safetensors")]
    found = {key: W for one in files for key, W in one.items()}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], W) for key, W in whole.items())


def test_an_operated_model_can_be_compressed_and_is_verified(llama, tmp_path):
    out = tmp_path / "out"
    operate(llama, "pca-shared-kv", "variance@0.9", out)
    assert load_arch(out).family == "llama"
    tampered = (out / "config.json").read_text().replace("}", " }", 1)
    (out / "config.json").write_text(tampered)
    assert main(["surgery", str(out), "--size", "variance@0.9", "-o", str(tmp_path / "x")]) == 1


def test_generation_is_the_likeliest_token_each_time(llama, tmp_path):
    run("eval", "generation", llama, "--prompt", "A river", "--new-tokens", 5, "-o", tmp_path / "g")
    record = json.loads((tmp_path / "g").read_text())
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = AutoTokenizer.from_pretrained(llama)("A river").input_ids
    for made in record["token_ids"]:
        with torch.inference_mode():
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == made
        ids.append(made)
    assert len(record["token_ids"]) == 5 or record["token_ids"][-1] == 1


# --- what is refused ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mode", "pca"], "Modes: pca-separate, "),
        (["--size", "0.9"], "expected variance@0.9"),
        (["--size", "variance@0.90"], "without trailing zeros"),
        (["--size", "variance@0"], "expected variance@0.9"),
        (["--size", "parameters@1.5"], "expected variance@0.9"),
        (["--mode", "pca-separate-rxx"], "name its folder with --rxx"),
        (["--mode", "pca-separate-rxx", "--rxx", "nowhere"], "no such file"),
        (["--size", "parameters@0.001"], "Take a larger share"),
    ],
)
def test_what_cannot_be_is_refused(llama, tmp_path, capsys, words, said):
    command = ["surgery", str(llama), "--size", "variance@0.9", "-o", str(tmp_path / "out"), *words]
    assert main(command) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_named(tmp_path):
    dense = tiny_llama(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(dense)
    with pytest.raises(A3Error, match="layer 1, k holds NaN"):
        surgery(dense, None, "pca-separate", Size("variance", 1), tmp_path / "out")


# --- tables, figures, report, workflow ---

ROWS = [
    *[("pca-separate", f"variance@{share}") for share in ("0.9", "0.5")],
    *[("pca-shared-kv", f"variance@{share}") for share in ("0.9", "0.5")],
    ("pca-separate-rxx", "parameters@0.5"),
    ("pca-shared-layers-rxx", "parameters@0.5"),
    ("pca-shared-kv-no-mean", "variance@0.9"),
]
SURGERIES_JSON = [
    {"model": "tiny", "calibration": "short", "mode": mode, "size": size} for mode, size in ROWS
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder with surgeries of a tiny model, their table and their figures."""
    made = tiny_results(tmp_path_factory.mktemp("made"))
    dense, rxx = made / "models/tiny", made / "rxx/tiny/short"
    learn, score = (made / f"texts/{name}" for name in ("learn/docs.jsonl", "score/test.jsonl"))
    metric = rxx / "attention_input.safetensors"
    run("collect", dense, "--text", learn, "--tokens", "512", *BLOCK, "-o", metric)
    for tail in ("dense", *(f"short/{mode}/{size}" for mode, size in ROWS)):
        folder, out = dense, made / "eval/tiny" / tail
        if tail != "dense":
            folder = made / "checkpoints/tiny" / tail
            _, mode, size = tail.split("/")
            run("surgery", dense, "--rxx", rxx, "--mode", mode, "--size", size, "-o", folder)
            ppl = ["--text", score, "--tokens", "256", *BLOCK, "-o", out / "ppl/score.json"]
            run("eval", "ppl", folder, *ppl)
        words = ["--prompt", "A river", "--new-tokens", "3", "-o", out / "generation/prompt.json"]
        run("eval", "generation", folder, *words)
    table, rows = made / "tables/tiny", json.dumps(SURGERIES_JSON)
    inputs = ["--results", made, "--surgeries", rows, "--perplexity", "score"]
    run("surgery-table", *inputs, "-o", table)
    run("surgery-figures", *inputs, "-o", table / "surgery_figures")
    return made


def test_the_table_pairs_blocks_and_counts_factors(results):
    frame = pd.read_csv(results / "tables/tiny/surgery.csv")
    assert len(frame) == 1 + len(ROWS)
    assert frame["mode"][0] == "dense"
    losses = {}
    for row in frame.to_dict("records"):
        tail = "dense" if row["mode"] == "dense" else f"short/{row['mode']}/{row['size']}"
        nll = json.loads((results / f"eval/tiny/{tail}/ppl/score.json").read_text())["block_nll"]
        losses[row["mode"], row["size"]] = np.array(nll)
        if tail == "dense":
            continue
        record = json.loads((results / f"checkpoints/tiny/{tail}/approx.json").read_text())
        stored = record["if_stored"]
        assert row["qkv_if_stored_ratio"] == stored["qkv"] / stored["qkv_dense"]
        assert row["parameters_in_file"] == record["base"]["size"]["parameters"]
        counts = [layer["k"]["principal_components"] for layer in record["layers"]]
        assert row["k.components_mean"] == np.mean(counts)
    for row in frame.to_dict("records")[1:]:
        own, dense = losses[row["mode"], row["size"]], losses["dense", np.nan]
        assert row["score.nll_delta"] == pytest.approx((own - dense).mean())
        error = (own - dense).std(ddof=1) / len(own) ** 0.5
        assert row["score.nll_delta_stderr"] == pytest.approx(error)
        other = {
            "pca-shared-kv": "pca-separate",
            "pca-shared-layers-rxx": "pca-separate-rxx",
        }.get(row["mode"])
        if other is None:
            assert np.isnan(row["score.nll_to_separate"])
        else:
            delta = (own - losses[other, row["size"]]).mean()
            assert row["score.nll_to_separate"] == pytest.approx(delta)


def test_the_layers_are_listed_and_drawn(results):
    table = results / "tables/tiny"
    layers = pd.read_csv(table / "surgery_layers.csv")
    assert len(layers) == len(ROWS) * 2 * 3
    captions = json.loads((table / "surgery_figures/captions.json").read_text())
    names = [each["name"] for each in captions]
    assert names == ["surgery-perplexity-tiny", "surgery-dimensions-tiny"]
    drawn = (table / "surgery_figures/surgery-dimensions-tiny.svg").read_text()
    assert drawn.count("<image") == 3 + 1  # a matrix each, and the colour bar
    drawn = (table / "surgery_figures/surgery-perplexity-tiny.svg").read_text()
    assert "<svg" in drawn


def test_the_report_has_a_section(results, capsys):
    table = results / "tables/tiny"
    experiment = {"model": "tiny", "calibration": "short"}
    experiment |= dict(zip(("qk", "ov", "mlp"), TAIL.split("/")[2].split("+"), strict=True))
    rows = json.dumps([experiment | {"ratio": "0.25"}])
    inputs = ["--results", results, "--experiments", rows, "--perplexity", "score"]
    run("tables", *inputs, "-o", table)
    run("figures", *inputs, "-o", table / "figures")
    page = ["--tables", table, "--config", "{}", "-o", table / "report.html"]
    run("report", *inputs, *page)
    text = (table / "report.html").read_text()
    assert text.count('<h2 id="surgery">') == text.count('href="#surgery"') == 1
    assert "pca-shared-layers-rxx" in text
    numbers = re.findall(r"<figcaption>Figure (\d+)\. ", text)
    assert numbers == [str(number + 1) for number in range(len(numbers))]
    assert f"Figure {len(numbers)}. tiny: number of principal components" in text
    run("show", table)
    shown = capsys.readouterr().out
    assert "| pca-shared-kv-no-mean" in shown
    run("verify", results)


def test_results_of_other_weights_are_refused(results, tmp_path, capsys):
    made = shutil.copytree(results, tmp_path / "results")
    tail = "short/pca-separate/variance@0.9"
    other = made / "eval/tiny/short/pca-separate/variance@0.5/ppl/score.json"
    shutil.copyfile(other, made / f"eval/tiny/{tail}/ppl/score.json")
    words = ["surgery-table", "--results", str(made), "--surgeries", json.dumps(SURGERIES_JSON)]
    assert main([*words, "--perplexity", "score", "-o", str(tmp_path / "table")]) == 1
    assert "the result was taken from other weights" in capsys.readouterr().err
    assert main(["verify", str(made)]) == 1


def test_the_rules(tmp_path):
    """A dry run: a row's own chain, and the statistics of those with a metric."""
    project = Project(tmp_path)
    table = project.folder / "surgery.tsv"
    head = "model\tcalibration\tmode\tsize\n"
    table.write_text(
        f"{head}tiny\tshort\tpca-shared-kv\tvariance@0.9\n"
        "tiny\tshort\tpca-separate-rxx\tparameters@0.5\n"
    )
    key = "surgery: {rows: surgery.tsv, prompt: 'A river', new_tokens: 3}\nevaluate:"
    project.edit("config/config.yaml", "evaluate:", key)
    rules, output = project.snakemake("-n", "-p")
    assert rules.count("surgery") == 2
    assert rules.count("eval_ppl") == rules.count("eval_harness") == 4
    assert rules.count("eval_generation") == 3
    assert rules.count("surgery_table") == rules.count("surgery_figures") == 1
    commands = re.findall(r"^Shell command: (a3 surgery results.*)$", output, re.MULTILINE)
    out = "results/checkpoints/tiny/short"
    assert sorted(commands) == [
        "a3 surgery results/models/tiny  --mode pca-shared-kv --size variance@0.9 --threads 1 "
        f"-o {out}/pca-shared-kv/variance@0.9 &> "
        "results/logs/checkpoints/tiny/short/pca-shared-kv/variance@0.9.log",
        "a3 surgery results/models/tiny --rxx results/rxx/tiny/short --mode pca-separate-rxx "
        f"--size parameters@0.5 --threads 1 -o {out}/pca-separate-rxx/parameters@0.5 &> "
        "results/logs/checkpoints/tiny/short/pca-separate-rxx/parameters@0.5.log",
    ]
    assert "rxx/tiny/short/attention_input.safetensors" in output


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("tiny\tshort\tpca\tvariance@0.9\n", "row 1: surgery mode 'pca' is not known"),
        ("tiny\tshort\tpca-separate\t0.9\n", "row 1: surgery size is '0.9'"),
        ("tiny\tlong\tpca-separate\tvariance@0.9\n", "names the calibration 'long'"),
        ("tiny\tshort\tpca-separate\tvariance@0.9\n" * 2, "row 2: means the same as row 1"),
        ("tiny\tshort\n", "expected 4 cells"),
        ("", "no experiments"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, rows, said):
    config = complete(yaml.safe_load(CONFIG), load_yaml(SCHEMA))
    (tmp_path / "surgery.tsv").write_text("model\tcalibration\tmode\tsize\n" + rows)
    with pytest.raises(A3Error, match=re.escape(said)):
        read_surgeries(tmp_path / "surgery.tsv", config)


def test_the_projects_own_table_of_surgeries():
    """The study of surgeries, as `make study-surgery` reads it."""
    study = load_yaml(ROOT / "config/studies/surgery/config.yaml")
    config = load_yaml(ROOT / "config/config.yaml") | study
    config["calibrations"] = load_yaml(ROOT / "config/config.yaml")["calibrations"]
    whole = complete(config, load_yaml(SCHEMA))
    rows = read_surgeries(ROOT / whole["surgery"]["rows"], whole)
    assert {row["mode"] for row in rows} == set(SURGERIES)
    assert read_experiments(ROOT / whole["experiments"], whole)
