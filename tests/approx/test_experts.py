"""Mixtures of experts: statistics of each expert, every mode of MLPs, allocation, dropping."""

import json

import pytest
import reference
import torch
from test_compressed import MODELS, TEXT, redraw
from tiny import run, tiny_model
from transformers import AutoModelForCausalLM

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.models.arch import load_arch
from a3.models.checkpoint import Checkpoint
from a3.models.load import load_tokenizer
from a3.rxx.container import Rxx
from a3.rxx.kinds import KINDS
from a3.solutions import mlp
from a3.solutions.modes import MLP_PRIOR, PRIOR_CHANNELS, choose
from a3.solutions.plan import Plan
from a3.stages.approx.allocate import allocate
from a3.stages.approx.approximate import approximate, solver_for
from a3.stages.approx.losses import losses
from a3.stages.collect.collect import collect
from a3.stages.collect.gradients import draw
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

CUT = {"tokens": 2048, "block_length": 64, "seed": 0, "bos": True}
STATISTICS = (
    *("down_diagonal", "down_mean", "down_input", "mlp_gradient"),
    *("expert_norm", "expert_output", "router_logits"),
)
MORE = ("q_blocks", "k_blocks", "v_blocks", "pair_gradient", "o_proj_input", "attention_gradient")
DENSE = {"qk": "dense", "ov": "dense", "mlp": "dense"}
PLUS = {"qk": "fisher~", "ov": "joint~", "mlp": "obs~"}
EXPERTS, N, LAYERS = 16, 96, 2
IDS = torch.arange(2, 62)[None]


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def mixture(request, tmp_path_factory):
    """A mixture of 16 experts of 96 channels in `dense`, and its statistics in `rxx`."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(folder / "dense", *MODELS[request.param][:1], **MODELS[request.param][1])
    redraw(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    outputs = {kind: folder / f"rxx/{kind}.safetensors" for kind in (*STATISTICS, *MORE)}
    running = {"dtype": "float32", "device": "cpu"}
    collect(folder / "dense", folder / "text.txt", outputs, **CUT, **running)
    return folder


def load(folder):
    """A model in float64; transformers' faster experts do not know it."""
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def near(found, expected):
    """Within what float32 activations allow."""
    atol = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def plan(ratio, **modes):
    return Plan(choose(DENSE | modes | {"ratio": ratio}))


def blocks_of(folder):
    tokenizer = load_tokenizer(folder / "dense")
    return token_blocks(load_documents(folder / "text.txt"), tokenizer, **CUT)


def watch_experts(folder, hook_of):
    """Run the dense model over all blocks, with a layer's hook before its experts."""
    model, arch = load(folder / "dense"), load_arch(folder / "dense")
    for layer in range(LAYERS):
        where = model.get_submodule(arch.adapter.experts_module(layer))
        where.register_forward_pre_hook(hook_of(layer))
    with torch.inference_mode():
        for block in blocks_of(folder):
            model(block[None])


def routed(folder):
    """What goes into the last product of each expert, by layer and expert.

    Rows of h (N_e, 96), of its output (N_e, 64), and routing weights (N_e,), token by token.
    """
    found = [[([], [], []) for _ in range(EXPERTS)] for _ in range(LAYERS)]

    def hook_of(layer):
        def hook(experts, inputs):
            for x, chosen, weights in zip(*inputs, strict=True):
                for expert, weight in zip(chosen.tolist(), weights, strict=True):
                    gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
                    h = experts.act_fn(gate) * up
                    whole = (h, experts.down_proj[expert] @ h, weight)
                    for rows, row in zip(found[layer][expert], whole, strict=True):
                        rows.append(row)

        return hook

    watch_experts(folder, hook_of)
    empty = (torch.zeros(0, N), torch.zeros(0, 64), torch.zeros(0))
    return [
        [
            tuple(
                torch.stack(rows).double() if rows else none.double()
                for rows, none in zip(one, empty, strict=True)
            )
            for one in layer
        ]
        for layer in found
    ]


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_are_of_the_tokens_that_reach_an_expert_times_their_weights(mixture):
    arch = load_arch(mixture / "dense")
    rxx = {kind: Rxx(mixture / f"rxx/{kind}.safetensors", kind) for kind in STATISTICS}
    reached = 0
    for layer, experts in enumerate(routed(mixture)):
        for expert, (h, y, w) in enumerate(experts):
            z = h * w[:, None]
            expected = {
                "down_diagonal": z.square().sum(0),
                "down_mean": (z * w[:, None]).sum(0),
                "down_input": z.T @ z,
                "expert_norm": (y * w[:, None]).norm(dim=1).sum(),
            }
            for kind, value in expected.items():
                shape = arch.statistic_shape(KINDS[kind])
                found = rxx[kind].R(layer, shape, expert) * CUT["tokens"]
                near(found, value)
                assert rxx[kind].counts(layer, EXPERTS)[expert] == len(w)
                routing = rxx[kind].routed(layer, EXPERTS)[expert]
                torch.testing.assert_close(routing, w.square().sum(), rtol=1e-5, atol=1e-8)
            reached += len(w)
    assert reached == CUT["tokens"] * LAYERS * 2


def test_the_gradient_is_that_of_the_output_of_all_experts(mixture):
    model, arch = load(mixture / "dense").float(), load_arch(mixture / "dense")
    expected = torch.zeros(LAYERS, 64, 64, dtype=torch.float64)

    def hook_of(layer):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            output.register_hook(lambda g: add(layer, g.reshape(-1, 64).double()))

        return hook

    def add(layer, g):
        expected[layer] += g.T @ g

    for layer in range(LAYERS):
        # The whole mixture: routed tokens, weighted and added up.
        where = arch.adapter.experts_module(layer).rpartition(".")[0]
        model.get_submodule(where).register_forward_hook(hook_of(layer))
    blocks = blocks_of(mixture)[::4]
    for block in blocks:
        scores = model(block[None]).logits[0]
        labels = draw(scores.detach(), seed=int(block.sum()))
        torch.nn.functional.cross_entropy(scores, labels, reduction="sum").backward()
    rxx = Rxx(mixture / "rxx/mlp_gradient.safetensors", "mlp_gradient")
    for layer in range(LAYERS):
        found = rxx.R(layer, (64, 64)) * rxx.tokens
        scale = expected[layer].diagonal().max()
        torch.testing.assert_close(found, expected[layer], rtol=0, atol=1e-4 * scale.item())


def test_kinds_that_a_mixture_lacks_are_refused(mixture, tmp_path):
    settings = CUT | {"dtype": "float32", "device": "cpu"}
    llama = tiny_model(tmp_path / "llama", "llama")
    for folder, kind, says in (
        (mixture / "dense", "mlp_input", "each of which has its own MLP. Use one of down_diagonal"),
        (mixture / "dense", "down_output", "not available for a mixture"),
        (llama, "expert_norm", "of a mixture of experts, which llama is not"),
        (llama, "router_logits", "of a mixture of experts, which llama is not"),
    ):
        with pytest.raises(A3Error, match=says):
            collect(folder, mixture / "text.txt", {kind: tmp_path / "x"}, **settings)


# --- solutions ------------------------------------------------------------------------------------


def weights_of(folder, layer, expert):
    arch = load_arch(folder / "dense")
    return arch.adapter.mlp(Checkpoint(folder / "dense"), layer, arch.to_json(), expert)


def test_few_tokens_are_shrunk_as_by_more_tokens_of_the_mean(mixture):
    """Every mode gets the statistics of the expert's tokens and one more, by their definition."""
    rows = {mode: plan("0.5", mlp=mode) for mode in ("rxx-w", "modegpt", "ls", "obs", "flap")}
    solvers = {
        mode: solver_for(mixture / "dense", mixture / "rxx", one, None)
        for mode, one in rows.items()
    }
    for layer, experts in enumerate(routed(mixture)):
        zs = [h * w[:, None] for h, _, w in experts]
        counts, squares = [len(w) for *_, w in experts], [w.square().sum() for *_, w in experts]
        for expert, (h, _, w) in enumerate(experts):
            more = reference.more_tokens(zs[expert], zs)
            C = more.T @ more / CUT["tokens"]
            read = {
                mode: solver.read("mlp", mode, layer, expert) for mode, solver in solvers.items()
            }
            near(read["rxx-w"][0], C.diagonal())
            for mode in ("modegpt", "ls", "obs"):
                near(read[mode][0], C)
            # A prior of fewer tokens for fewer channels, over the tokens and that one.
            damping = MLP_PRIOR * N / PRIOR_CHANNELS / (counts[expert] + 1)
            assert read["ls"][1] == pytest.approx(damping)
            assert read["obs"][2] == pytest.approx(damping)
            # Means over the expert's tokens by squared weights; that of the one more is 0.
            own = squares[expert] + sum(squares) / sum(counts)
            mean = (h * w[:, None].square()).sum(0) / own
            near(read["flap"][0], more.square().sum(0) / own)
            near(read["flap"][1], mean)


def test_an_expert_that_no_token_reaches_is_ranked_by_its_weights():
    draw_ = torch.Generator().manual_seed(0)
    power = torch.rand(3, 8, dtype=torch.float64, generator=draw_)
    power[2] = 0
    more = mlp.expert_ridge(power, torch.tensor([500.0, 20.0, 0.0]))
    assert more > 0
    down = torch.randn(8, 5, dtype=torch.float64, generator=draw_)
    weights = mlp.MLPWeights(up=torch.ones(5, 8), gate=None, down=down)
    best = down.square().sum(1).argsort(descending=True)[:3].sort().values
    assert torch.equal(mlp.rxx_w(weights, power[2] + more, 3).channels, best)
    C = torch.diag(power[2] + more)
    assert torch.equal(mlp.obs(weights, C, torch.eye(5).double(), 0.1, 3).channels, best)


@pytest.mark.parametrize("mode", ["rxx-w", "ls", "obs", "modegpt", "flap"])
def test_the_compressed_mixture_is_its_emulation_in_the_dense_shapes(mixture, tmp_path, mode):
    """Zeros in place of what is dropped, refits and biases put where experts have them."""
    chosen = plan("0.5", mlp=mode)
    approximate(mixture / "dense", mixture / "rxx", chosen, tmp_path / "small")
    emulated, arch = load(mixture / "dense"), load_arch(mixture / "dense")
    solver = solver_for(mixture / "dense", mixture / "rxx", chosen, None)
    for layer in range(LAYERS):
        experts = emulated.get_submodule(arch.adapter.experts_module(layer))
        biases = torch.zeros(EXPERTS, 64, dtype=torch.float64)
        for expert in range(EXPERTS):
            read = solver.read("mlp", mode, layer, expert)
            found = getattr(mlp, mode.replace("-", "_"))(
                weights_of(mixture, layer, expert), *read, N // 2
            )
            down = torch.zeros(N, 64, dtype=torch.float64)
            down[found.channels] = found.down.double()
            experts.down_proj.data[expert] = down.T
            if mode == "flap":
                dropped = [j for j in range(N) if j not in found.channels.tolist()]
                dense_down = weights_of(mixture, layer, expert).down.double()
                biases[expert] = read[1][dropped] @ dense_down[dropped]
                torch.testing.assert_close(found.bias, biases[expert])
        experts.register_forward_hook(
            lambda _, inputs, out, biases=biases: (
                out + (biases[inputs[1]] * inputs[2][..., None]).sum(1)
            )
        )
    small = logits(load(tmp_path / "small"))
    torch.testing.assert_close(small, logits(emulated), rtol=0, atol=1e-5)
    assert (small - logits(load(mixture / "dense"))).abs().max() > 1e-3
    load(tmp_path / "small").float().save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), small, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "mode", ["ls", "obs", "modegpt", "flap", "frequency", "reap", "hc-smoe", "m-smoe"]
)
def test_all_of_it_is_the_dense_mixture(mixture, tmp_path, mode):
    approximate(mixture / "dense", mixture / "rxx", plan("0", mlp=mode), tmp_path / "small")
    expected = logits(load(mixture / "dense"))
    torch.testing.assert_close(logits(load(tmp_path / "small")), expected, rtol=0, atol=2e-5)


# --- whole experts --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["frequency", "reap"])
def test_dropped_experts_get_no_tokens(mixture, tmp_path, mode):
    """As in the dense model, if a router's logits of these experts are -inf."""
    approximate(mixture / "dense", mixture / "rxx", plan("0.25", mlp=mode), tmp_path / "small")
    report = json.loads((tmp_path / "small/approx.json").read_text())
    emulated, arch = load(mixture / "dense"), load_arch(mixture / "dense")
    for layer, experts in enumerate(routed(mixture)):
        score = {
            "frequency": [len(w) for _, _, w in experts],
            "reap": [
                ((y * w[:, None]).norm(dim=1).mean() if len(w) else torch.zeros(())).item()
                for _, y, w in experts
            ],
        }[mode]
        kept = sorted(sorted(range(EXPERTS), key=lambda e: -score[e])[:12])
        assert report["layers"][layer]["mlp"]["experts"] == kept
        assert report["layers"][layer]["mlp"]["expert_ranks"] == [N] * 12
        gone = [expert for expert in range(EXPERTS) if expert not in kept]
        gate = emulated.get_submodule(arch.adapter.modules["router"].format(layer))
        gate.weight.data[gone] = torch.nan
        gate.register_forward_hook(reroute(gate, kept))
    small = load(tmp_path / "small")
    torch.testing.assert_close(logits(small), logits(emulated), rtol=0, atol=1e-5)
    assert report["size"]["compressed"]["parameters"] == sum(
        weight.numel() for weight in small.parameters()
    )
    small.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(small), rtol=0, atol=1e-5)
    found = small.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=1)
    again = small.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=1, use_cache=False)
    assert torch.equal(found, again)


def reroute(gate, kept):
    """Replace a router's choice: among `kept`, whose probabilities add up to 1 in float32."""

    def hook(_, inputs, __):
        rows = gate.weight.data[kept]
        scores = (inputs[0].reshape(-1, 64) @ rows.T).float().softmax(-1)
        values, places = scores.topk(2)
        # Mixtral always makes the weights of a token sum to 1, Qwen 3 where its config says so.
        if getattr(gate, "norm_topk_prob", True):
            values = values / values.sum(-1, keepdim=True)
        return None, values.to(inputs[0].dtype), torch.tensor(kept)[places]

    return hook


def test_as_many_experts_are_kept_as_a_token_takes(mixture):
    arch = load_arch(mixture / "dense")
    assert plan("0.8", mlp="reap").ranks(arch) == {"mlp": 3}
    assert Plan(choose(DENSE | {"mlp": "reap@2", "ratio": "-"})).ranks(arch) == {"mlp": 2}
    few = "leaves too few of 16 experts, of which a token takes 2"
    many = "keeps 17 experts, and a layer has 16"
    for cell, ratio, said in (
        ("reap", "0.95", few),
        ("reap@1", "-", few),
        ("frequency@17", "-", many),
    ):
        with pytest.raises(A3Error, match=said):
            Plan(choose(DENSE | {"mlp": cell, "ratio": ratio})).ranks(arch)


# --- allocation -----------------------------------------------------------------------------------


def allocated(folder, out, uniform=(), row=PLUS, **options):
    allocate(folder / "dense", folder / "rxx", plan("0.3", **row), out, uniform=uniform, **options)
    return read_record(out)


def test_ranks_are_allocated_across_experts_layers_and_components(mixture, tmp_path):
    record = allocated(mixture, tmp_path / "ranks.json")
    ranks = record["ranks"]["mlp"]
    assert [len(own) for own in ranks] == [EXPERTS] * LAYERS
    assert len({rank for own in ranks for rank in own}) > 2
    assert all(record["spent"][key] <= record["budget"][key] for key in record["budget"])
    assert record["predicted_nll"] < record["predicted_nll_uniform"]
    dense, rxx = mixture / "dense", mixture / "rxx"
    approximate(dense, rxx, plan("0.3", **PLUS), tmp_path / "ours", tmp_path / "ranks.json")
    even = {component: mode[:-1] for component, mode in PLUS.items()}
    approximate(dense, rxx, plan("0.3", **even), tmp_path / "even")
    ours, evenly = (read_record(tmp_path / f"{name}/approx.json") for name in ("ours", "even"))
    assert [layer["mlp"]["expert_ranks"] for layer in ours["layers"]] == ranks
    sizes = [one["size"]["compressed"]["parameters"] for one in (ours, evenly)]
    # What is counted is what the model has.
    saved = record["budget"]["parameters"] - record["spent"]["parameters"]
    assert sizes[1] - sizes[0] == saved >= 0
    assert logits(load(tmp_path / "ours")).isfinite().all()


def test_experts_can_be_uniform_within_layers_or_everywhere(mixture, tmp_path):
    only = {"mlp": "obs~"}
    free = allocated(mixture, tmp_path / "free.json", row=only)
    within = allocated(mixture, tmp_path / "within.json", ("experts",), only)
    everywhere = allocated(mixture, tmp_path / "everywhere.json", ("mlp",), only)
    assert all(len(set(own)) == 1 for own in within["ranks"]["mlp"])
    assert len({rank for own in everywhere["ranks"]["mlp"] for rank in own}) == 1
    predicted = [one["predicted_nll"] for one in (free, within, everywhere)]
    assert predicted == sorted(predicted)
    with pytest.raises(A3Error, match="uniform mlp: has no mode marked ~"):
        allocated(mixture, tmp_path / "no.json", ("experts",), {"ov": "joint~"})
    llama = tiny_model(tmp_path / "llama", "llama")
    with pytest.raises(A3Error, match="uniform experts: llama has no experts"):
        allocate(llama, tmp_path, plan("0.3", **PLUS), tmp_path / "no", uniform=("experts",))


def test_an_expert_s_loss_is_that_of_its_output_by_the_gradient(mixture, tmp_path):
    """What `losses` predicts where all is dropped to the least, straight from the definition."""
    losses(mixture / "dense", mixture / "rxx", DENSE | {"mlp": "obs"}, tmp_path / "l.safetensors")
    arch = load_arch(mixture / "dense")
    solver = solver_for(mixture / "dense", mixture / "rxx", plan("0.5", mlp="obs"), None)
    record = allocated(mixture, tmp_path / "a.json", row={"mlp": "obs~"})
    given = allocated(
        mixture, tmp_path / "b.json", row={"mlp": "obs~"}, losses=[tmp_path / "l.safetensors"]
    )
    assert record["ranks"] == given["ranks"]
    total = 0.0
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            C, F, _ = solver.read("mlp", "obs", layer, expert)
            rank = record["ranks"]["mlp"][layer][expert]
            order, *_ = mlp.obs_losses(weights_of(mixture, layer, expert), C, F, rank)
            W = weights_of(mixture, layer, expert).down.double()
            # Fitted by rows of tokens, with the elimination's ridge as more of them.
            ridge = mlp.ELIMINATION * C.diagonal().mean()
            half = torch.linalg.cholesky(C + ridge * torch.eye(N, dtype=C.dtype)).T
            kept = [j for j in range(N) if j not in order[: N - rank].tolist()]
            Z = torch.zeros_like(W)
            Z[kept] = torch.linalg.lstsq(half[:, kept], half @ W).solution
            E = half @ (W - Z)
            total += 0.5 * ((E @ F) * E).sum().item()
    # Losses within a step of several channels are interpolated.
    assert record["predicted_nll"] == pytest.approx(total, rel=0.05)
    assert arch.experts == EXPERTS


@pytest.mark.parametrize("preset", ["a3", "a3-plus"])
def test_compress_with_a_preset(mixture, tmp_path, capsys, preset):
    """One command from a mixture and a text, and what it made generates as without a cache."""
    words = ["compress", mixture / "dense", "--ratio", "0.3", "--text", mixture / "text.txt"]
    words += [] if preset == "a3" else ["--preset", preset]  # the first is the default
    run(*words, "--tokens", "1024", "--block-length", "64", "-o", tmp_path / "small")
    record = read_record(tmp_path / "small/approx.json")
    assert record["modes"]["mlp"] == {"a3": "rxx-w@0.3", "a3-plus": "obs~@0.3"}[preset]
    ranks = [rank for layer in record["layers"] for rank in layer["mlp"]["expert_ranks"]]
    assert len(set(ranks)) > (2 if preset == "a3-plus" else 0)
    small = load(tmp_path / "small")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    cached, plain = (small.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    run("inspect", tmp_path / "small")
    assert "fewer than 256 calibration tokens reached" in capsys.readouterr().out
