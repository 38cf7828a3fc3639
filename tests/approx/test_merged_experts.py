"""Experts that are merged: which, how, and the model that a router with all its rows uses."""

import json

import pytest
import reference
import torch
from test_experts import (
    CUT,
    EXPERTS,
    IDS,
    LAYERS,
    N,
    blocks_of,
    load,
    logits,
    mixture,  # noqa: F401
    near,
    plan,
    watch_experts,
    weights_of,
)
from test_probe import SETTINGS, solve, tiny
from test_probe import load as load_float32
from tiny import run

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.models.arch import load_arch
from a3.models.compressed import compressed_record
from a3.models.load import load_model, load_tokenizer
from a3.models.weights import MLPWeights
from a3.numerics.assignment import assign
from a3.numerics.clusters import average_linkage
from a3.rxx.container import Rxx
from a3.rxx.kinds import KINDS
from a3.solutions.mlp import aligned_to, hc_smoe, m_smoe, mean_of_experts, shares_of_merged
from a3.stages.approx.approximate import approximate
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

MATRICES = ("up", "gate", "down")


def outputs_of(folder):
    """Σ over all tokens of what each expert makes of them, by layer: (E, 64), float64."""
    found = [torch.zeros(EXPERTS, 64, dtype=torch.float64) for _ in range(LAYERS)]

    def hook_of(layer):
        def hook(experts, inputs):
            for expert in range(EXPERTS):
                gate, up = (inputs[0] @ experts.gate_up_proj[expert].T).chunk(2, -1)
                y = (experts.act_fn(gate) * up) @ experts.down_proj[expert].T
                found[layer][expert] += y.sum(0)

        return hook

    watch_experts(folder, hook_of)
    return found


def counts_of(folder, layer):
    return Rxx(folder / "rxx/expert_output.safetensors", "expert_output").counts(layer, EXPERTS)


# --- statistics -----------------------------------------------------------------------------------


def test_outputs_are_of_all_tokens_and_counts_of_those_routed(mixture):  # noqa: F811
    rxx = Rxx(mixture / "rxx/expert_output.safetensors", "expert_output")
    norms = Rxx(mixture / "rxx/expert_norm.safetensors", "expert_norm")
    shape = load_arch(mixture / "dense").statistic_shape(KINDS["expert_output"])
    assert shape == (EXPERTS, 64)
    for layer, expected in enumerate(outputs_of(mixture)):
        near(rxx.R(layer, shape) * CUT["tokens"], expected)
        assert torch.equal(rxx.counts(layer, EXPERTS), norms.counts(layer, EXPERTS))


def logits_of(folder):
    """The router's logits on all tokens, by layer: (tokens, E), float64."""
    model, arch = load(folder / "dense"), load_arch(folder / "dense")
    found = [[] for _ in range(LAYERS)]
    for layer in range(LAYERS):
        router = model.get_submodule(arch.adapter.modules["router"].format(layer))
        router.register_forward_hook(lambda _, __, out, rows=found[layer]: rows.append(out[0]))
    with torch.inference_mode():
        for block in blocks_of(folder):
            model(block[None])
    return [torch.cat(rows) for rows in found]


def test_logits_of_the_router_are_those_of_all_tokens(mixture):  # noqa: F811
    rxx = Rxx(mixture / "rxx/router_logits.safetensors", "router_logits")
    for layer, H in enumerate(logits_of(mixture)):
        assert len(H) == CUT["tokens"]
        near(rxx.R(layer, (EXPERTS, EXPERTS)) * CUT["tokens"], H.T @ H)


# --- solutions ------------------------------------------------------------------------------------


def points(case):
    """Mean outputs of experts, (E, d), with what makes them hard."""
    x = torch.randn(24, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if case == "far":  # one dominates all others, which differ in their last digits only
        x = 1e-6 * x
        x[5] = 1e6
    if case == "duplicates":
        x[[3, 11, 20]] = x[7].clone()
        x[[1, 2]] = 0.0  # experts that make nothing
    if case == "all the same":
        x[:] = x[0].clone()
    return x


@pytest.mark.parametrize("case", ["random", "far", "duplicates", "all the same"])
def test_clusters_are_those_of_the_definition(case):
    x = points(case)
    for count in range(1, len(x) + 1):
        found = average_linkage(x, count).tolist()
        assert found == reference.average_linkage(x, count)
        # By the order of their first members.
        firsts = [found.index(cluster) for cluster in range(count)]
        assert firsts == sorted(firsts)


def test_points_that_are_the_same_are_joined_first():
    found = hc_smoe(points("duplicates"), torch.ones(24), 20).tolist()
    assert len({found[e] for e in (3, 7, 11, 20)}) == len({found[e] for e in (1, 2)}) == 1
    assert found[3] != found[1]


@pytest.mark.parametrize("case", ["random", "far", "duplicates", "all the same"])
def test_experts_go_into_the_dominant_ones_of_the_nearest_logits(case):
    H = points(case).T  # (tokens, E)
    counts = torch.randint(0, 50, (24,), generator=torch.Generator().manual_seed(2)).double()
    counts[[4, 9]] = 0  # no token reaches these
    for keep in (1, 2, 11, 24):
        found = m_smoe(H.T @ H / len(H), counts, keep)
        assert found.tolist() == reference.nearest_dominant(H, counts.tolist(), keep)


def test_channels_are_put_in_the_order_of_the_first_expert():
    draw = torch.Generator().manual_seed(0)
    first = MLPWeights(*(torch.randn(s, generator=draw) for s in ((7, 9), (7, 9), (9, 6))))
    order = torch.randperm(9, generator=draw)
    other = MLPWeights(first.up[:, order], first.gate[:, order], first.down[order])
    found = aligned_to(first, other)
    assert all(torch.equal(getattr(found, p), getattr(first, p)) for p in MATRICES)


@pytest.mark.parametrize("counts", [[5, 0, 3, 0, 0, 9], [1e9, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
def test_weights_are_means_by_frequency(counts):
    """Also of experts that no token reaches: alone with others as they are, they count the same."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"up": (7, 4), "gate": (7, 4), "down": (4, 6)}
    experts = [
        MLPWeights(**{p: torch.randn(shape, generator=draw) for p, shape in shapes.items()})
        for _ in counts
    ]
    merged = torch.tensor([0, 1, 0, 1, 2, 2])
    shares = shares_of_merged(merged, torch.tensor(counts, dtype=torch.float64))
    for number in range(3):
        members = [e for e in range(6) if merged[e] == number]
        found = mean_of_experts((experts[e] for e in members), shares[members].tolist())
        own = [counts[e] for e in members]
        own = own if sum(own) else [1.0] * len(own)
        spread = power = 0.0
        for name in MATRICES:
            stack = torch.stack([getattr(experts[e], name).double() for e in members])
            expected = reference.weighted_mean(stack, own)
            torch.testing.assert_close(getattr(found.weights, name), expected)
            for f, W in zip(own, stack, strict=True):
                spread += f / sum(own) * (W - expected).square().sum().item()
                power += f / sum(own) * W.square().sum().item()
        assert found.power == pytest.approx(power)
        assert found.spread == pytest.approx(spread, abs=1e-12 * power)


def test_what_is_merged_with_nothing_stays_as_it_is():
    weights = MLPWeights(up=torch.randn(7, 4), gate=None, down=torch.randn(4, 6))
    found = mean_of_experts([weights], [1.0])
    assert torch.equal(found.weights.up.float(), weights.up)
    assert (found.weights.gate, found.spread) == (None, 0.0)


# --- the compressed model -------------------------------------------------------------------------


def emulate(model, arch, layers):
    """Put merged weights into the dense model: every expert has those of the one it went into."""
    for layer, (merged, weights) in enumerate(layers):
        experts = model.get_submodule(arch.adapter.experts_module(layer))
        for expert, into in enumerate(merged):
            both = torch.cat((weights[into]["gate"].T, weights[into]["up"].T))
            experts.gate_up_proj.data[expert] = both
            experts.down_proj.data[expert] = weights[into]["down"].T
    return model


def aligned(first, weights):
    """Channels in the order of the first expert's, all of their weights in one matrix."""
    columns = [torch.cat((W.up, W.gate, W.down.T)).double() for W in (first, weights)]
    order = assign(columns[0].T @ columns[1])
    return MLPWeights(weights.up[:, order], weights.gate[:, order], weights.down[order])


def expected_layers(folder, mode, keep):
    """By layer, where each expert goes and the merged weights, by the slow definitions."""
    found = []
    for layer in range(LAYERS):
        counts = counts_of(folder, layer).tolist()
        if mode == "hc-smoe":
            sums = outputs_of(folder)[layer]
            merged = reference.average_linkage(sums / CUT["tokens"], keep)
        else:
            merged = reference.nearest_dominant(logits_of(folder)[layer], counts, keep)
        weights = []
        for number in range(keep):
            members = [e for e in range(EXPERTS) if merged[e] == number]
            own = [counts[e] for e in members]
            own = own if sum(own) else [1.0] * len(own)
            dense = [weights_of(folder, layer, e) for e in members]
            if mode == "m-smoe" and len(members) > 1:
                dense = [aligned(weights_of(folder, layer, 0), W) for W in dense]
            stacks = {p: torch.stack([getattr(W, p).double() for W in dense]) for p in MATRICES}
            weights.append({p: reference.weighted_mean(x, own) for p, x in stacks.items()})
        found.append((merged, weights))
    return found


@pytest.mark.parametrize(("mode", "keep"), [("hc-smoe", 12), ("hc-smoe", 1), ("m-smoe", 5)])
def test_the_model_is_the_dense_one_with_merged_weights(mixture, tmp_path, mode, keep):  # noqa: F811
    chosen = plan("-", mlp=f"{mode}@{keep}")
    approximate(mixture / "dense", mixture / "rxx", chosen, tmp_path / "small")
    report = read_record(tmp_path / "small/approx.json")
    layers = expected_layers(mixture, mode, keep)
    for said, (merged, _) in zip(report["layers"], layers, strict=True):
        assert said["mlp"]["merged"] == merged
        assert said["mlp"]["rank"] == keep
        assert said["mlp"]["expert_ranks"] == [N] * keep
        assert 0 < said["mlp"]["relative_error"] < 1
    emulated = emulate(load(mixture / "dense"), load_arch(mixture / "dense"), layers)
    small = load(tmp_path / "small")
    found = logits(small)
    torch.testing.assert_close(found, logits(emulated), rtol=0, atol=1e-5)
    assert (found - logits(load(mixture / "dense"))).abs().max() > 1e-3
    small.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), found, rtol=0, atol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    cached, plain = (small.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_a_graph_reads_all_experts(mixture, tmp_path, monkeypatch):  # noqa: F811
    """What ONNX graphs compute: each token's routing weights to the merged ones add up."""
    chosen = plan("-", mlp="hc-smoe@5")
    approximate(mixture / "dense", mixture / "rxx", chosen, tmp_path / "small")
    small = load(tmp_path / "small")
    expected = logits(small)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(logits(small), expected, rtol=0, atol=1e-9)


def test_sizes_are_those_of_the_model(mixture, tmp_path):  # noqa: F811
    """The router keeps its rows, and a token reaches no more experts than there are."""
    arch = load_arch(mixture / "dense")
    parameters = {}
    for keep in (12, 1):
        folder = tmp_path / f"{keep}"
        chosen = plan("-", mlp=f"hc-smoe@{keep}")
        approximate(mixture / "dense", mixture / "rxx", chosen, folder)
        sizes = read_record(folder / "approx.json")["size"]
        small = load_model(folder, "float32")
        assert sizes["compressed"]["parameters"] == sum(w.numel() for w in small.parameters())
        parameters[keep] = sizes["compressed"]["parameters"]
        router = small.get_submodule(arch.adapter.modules["router"].format(0)).weight
        assert router.shape == (EXPERTS, 64)
        fewer = arch.experts_per_token - min(keep, arch.experts_per_token)
        flops = [sizes[of]["flops_per_token"] for of in ("dense", "compressed")]
        assert flops[0] - flops[1] == 2 * LAYERS * fewer * 3 * 64 * N
        # The same without the record.
        (folder / "approx.json").unlink()
        assert compressed_record(folder)["size"] == sizes
    assert parameters[12] - parameters[1] == LAYERS * 11 * 3 * 64 * N


def test_a_map_that_is_not_one_is_refused(mixture, tmp_path):  # noqa: F811
    chosen = plan("-", mlp="hc-smoe@5")
    approximate(mixture / "dense", mixture / "rxx", chosen, tmp_path / "small")
    (tmp_path / "small/approx.json").unlink()
    path = tmp_path / "small/config.json"
    content = json.loads(path.read_text())
    good = content["a3"]["merged"]
    for wrong, said in (
        ([*good[1][:-1], 5], "a3.merged of layer 1 is .* one of 0 to 4"),
        (good[1][1:], "for each of 16 experts"),
        ([0] * 16, "and each of these"),
    ):
        content["a3"]["merged"] = [good[0], wrong]
        path.write_text(json.dumps(content))
        with pytest.raises(A3Error, match=said):
            load_model(tmp_path / "small", "float32")


def test_any_number_of_experts_may_be_left(mixture):  # noqa: F811
    arch = load_arch(mixture / "dense")
    assert plan("0.95", mlp="hc-smoe").ranks(arch) == {"mlp": 1}
    with pytest.raises(A3Error, match=r"0\.98 leaves too few of 16 experts\. Take"):
        plan("0.98", mlp="hc-smoe").ranks(arch)
    with pytest.raises(A3Error, match="keeps 17 experts, and a layer has 16"):
        plan("-", mlp="hc-smoe@17").ranks(arch)


# --- probed mixtures ------------------------------------------------------------------------------


def hidden_of(model, arch, folder):
    """What the experts of each layer get of all calibration tokens, (tokens, d)."""
    found = {n: [] for n in range(arch.layers) if arch.solves("mlp", n)}
    handles = [
        model.get_submodule(arch.adapter.experts_module(n)).register_forward_pre_hook(
            lambda _, inputs, rows=rows: rows.append(inputs[0])
        )
        for n, rows in found.items()
    ]
    cut = {key: SETTINGS[key] for key in ("tokens", "block_length", "seed", "bos")}
    documents = load_documents(folder / "text.txt")
    with torch.inference_mode():
        for block in token_blocks(documents, load_tokenizer(folder / "dense"), **cut):
            model(block[None])
    for handle in handles:
        handle.remove()
    return {n: torch.cat(rows) for n, rows in found.items()}


@pytest.mark.parametrize("model_type", ["dots1", "gpt_oss", "granitemoe"])
def test_a_probed_mixture_is_merged(tmp_path, model_type):
    """Its router is not known, and need not be; with biases, transposed, stacked, a dense layer."""
    dense = tiny(tmp_path / "dense", model_type)
    arch = load_arch(tmp_path / "dense")
    modes = {"qk": "dense", "ov": "dense", "mlp": "hc-smoe"}
    small = solve(tmp_path, tmp_path / "small", "0.5", modes)
    report = read_record(tmp_path / "small/approx.json")["layers"]
    dense = load_float32(tmp_path / "dense")
    hidden = hidden_of(dense, arch, tmp_path)
    for layer, said in enumerate(report):
        if not arch.solves("mlp", layer):
            assert "mlp" not in said
            continue
        merged, counts = said["mlp"]["merged"], said["mlp"]["expert_tokens"]
        experts = dense.get_submodule(arch.adapter.experts_module(layer))
        # The family's own code, by which one expert gets all tokens.
        x = hidden[layer]
        ones = torch.ones(len(x), 1)
        outputs = [
            experts(x, torch.full((len(x), 1), e), ones).mean(0) for e in range(arch.experts)
        ]
        points = torch.stack(outputs).detach().double()
        assert merged == reference.average_linkage(points, arch.experts // 2)
        for value in experts.parameters():
            means = [value[e].detach().clone() for e in range(arch.experts)]
            for e in range(arch.experts):
                members = [i for i in range(arch.experts) if merged[i] == merged[e]]
                own = [counts[i] for i in members]
                own = own if sum(own) else [1.0] * len(own)
                stack = torch.stack([means[i].double() for i in members])
                value.data[e] = reference.weighted_mean(stack, own)
    torch.testing.assert_close(logits(small), logits(dense), rtol=0, atol=1e-5)


# --- commands -------------------------------------------------------------------------------------


def test_compress_inspect_and_card(mixture, tmp_path, capsys):  # noqa: F811
    words = ["compress", mixture / "dense", "--text", mixture / "text.txt", "--tokens", "1024"]
    words += ["--qk", "dense", "--ov", "dense", "--mlp", "hc-smoe", "--ratio", "0.25"]
    run(*words, "--block-length", "64", "-o", tmp_path / "small")
    capsys.readouterr()
    run("inspect", tmp_path / "small")
    out = capsys.readouterr().out
    assert "12 of 16 after merging; the router chooses among all" in out
    run("card", tmp_path / "small", "--html", tmp_path / "small.html")
    assert "12 of 16 experts" in (tmp_path / "small/README.md").read_text()
