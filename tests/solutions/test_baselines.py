"""Each baseline against its own published formula, and end to end: exact at full rank, its size."""

import math

import pytest
import torch
from test_compressed import MODELS, SETTINGS, needs, prepare
from test_solutions import D, G, H, N, attention, gram, h, inputs
from transformers import AutoModelForCausalLM

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.models.arch import load_arch
from a3.models.family import MLPWeights
from a3.models.load import load_tokenizer
from a3.models.modeling_a3 import LowRank
from a3.numerics.linalg import ridge_leverage, take_over, two_factors
from a3.rxx.container import Rxx
from a3.rxx.kinds import KINDS
from a3.solutions import mlp, ov, qk
from a3.solutions.factors import Matrix, factorise, shares
from a3.solutions.modes import MODES, check_fit, choose
from a3.solutions.plan import Plan, no_whole_rope
from a3.solutions.recipes import METHODS, kinds_read
from a3.stages.approx.approximate import approximate
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

TIGHT = {"rtol": 1e-7, "atol": 1e-8}


def random(*shape, seed=3):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def truncated(M, rank):
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


# --- two factors: formulas in the papers' own notation, W (out, in) ---

SHAPES = [(24, 10), (10, 24), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_svd_is_the_truncated_svd(shape, rank):
    W = random(*shape)
    A, B, losses = Matrix(W, None).factor(rank)
    assert (A.shape, B.shape) == ((shape[0], rank), (rank, shape[1]))
    torch.testing.assert_close(A @ B, truncated(W, rank), **TIGHT)
    assert losses[rank].item() == pytest.approx((W - A @ B).square().sum().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_fwsvd_weighs_rows_by_their_fisher_information(shape):
    """Equation 7 of arXiv 2207.00112: Î = diag(sqrt(Î_W)), SVD(Î W) = U S Vᵀ, A = Î⁻¹ U S."""
    W, fisher = random(*shape), random(shape[0], seed=4).square() + 0.01
    weight = torch.diag(fisher.sqrt())
    A, B, _ = Matrix(W, fisher).factor(3)
    expected = torch.linalg.inv(weight) @ truncated(weight @ W, 3)
    torch.testing.assert_close(A @ B, expected, **TIGHT)


@pytest.mark.parametrize("shape", SHAPES)
def test_asvd_scales_inputs_by_the_root_of_their_size(shape):
    """Section 3.2 of arXiv 2312.05821: W = (W S) S⁻¹ with S_ii = (mean |X_i|)^½."""
    W, x = random(*shape), random(50, shape[0], seed=5)
    S = torch.diag(x.abs().mean(0).sqrt())
    A, B, _ = Matrix(W, x.abs().mean(0)).factor(3)
    expected = truncated(W.T @ S, 3) @ torch.linalg.inv(S)
    torch.testing.assert_close((A @ B).T, expected, **TIGHT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("of_output", [False, True])
def test_svd_llm_whitens_by_cholesky(shape, of_output):
    """Section 3.1 of arXiv 2403.07378: S Sᵀ = X Xᵀ by Cholesky, SVD(W S), W' = U Σ Vᵀ S⁻¹."""
    W, x = random(*shape), random(50, shape[0], seed=5) + 0.3
    R = x.T @ x / len(x)
    S = torch.linalg.cholesky(R)
    expected = truncated(W.T @ S, 4) @ torch.linalg.inv(S)
    A, B, losses = Matrix(W, gram(R, W) if of_output else R, of_output).factor(4)
    torch.testing.assert_close((A @ B).T, expected, **TIGHT)
    lost = (x @ (W - A @ B)).square().sum() / len(x)
    assert losses[4].item() == pytest.approx(lost.item())


def test_two_svds_of_svd_llm_v2_reach_the_same():
    """Algorithm 1 of arXiv 2503.12340: U_s S_s of X Xᵀ, D = W U_s S_s^½, SVD(D)."""
    W, x = random(16, 24), random(50, 16, seed=5)
    R = x.T @ x
    U, S, _ = torch.linalg.svd(R)
    half = U @ torch.diag(S.sqrt())
    expected = truncated(W.T @ half, 4) @ torch.linalg.inv(half)
    A, B, _ = Matrix(W, R).factor(4)
    torch.testing.assert_close((A @ B).T, expected, **TIGHT)


def test_svd_llm_v2_shares_out_by_one_over_log_of_the_loss():
    found = shares([10.0, 100.0, 1000.0], 0.8)
    L = [1 / math.log(loss) for loss in (10, 100, 1000)]
    expected = [1 - 3 * 0.2 * each / sum(L) for each in L]
    assert found == pytest.approx(expected)
    assert sum(found) == pytest.approx(3 * 0.8)
    assert found == sorted(found)  # what loses most keeps most
    with pytest.raises(A3Error, match="more than 1"):
        shares([0.5, 3.0], 0.8)


@pytest.mark.parametrize("kind", ["random", "ill-conditioned", "singular", "dead-channel"])
@pytest.mark.parametrize("shape", [(D, 10), (D, 40)])
def test_two_factors_are_as_good_as_the_dense_solution_on_any_statistics(kind, shape):
    R, _ = inputs(kind, D)
    W = random(*shape)
    values, vectors = torch.linalg.eigh(R)
    half = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    S = torch.linalg.svdvals(half @ W)
    for rank in (1, 5, min(shape)):
        A, B, losses = two_factors(W, R, rank)
        lost = (half @ (W - A @ B)).square().sum()
        assert lost <= S[rank:].square().sum() + 1e-9 * S.square().sum()
        assert losses[rank].item() == pytest.approx(
            S[rank:].square().sum().item(), abs=1e-9 * S.square().sum().item()
        )
    torch.testing.assert_close(A @ B, W, rtol=0, atol=1e-6)  # full rank is exact


def test_factorise_leaves_what_has_no_rank():
    matrices = {name: Matrix(random(8, 6, seed=i), None) for i, name in enumerate("qk")}
    found = factorise(matrices, {"q": 2, "k": None})
    assert set(found.factors) == {"q"}
    S = [torch.linalg.svdvals(matrix.W).square() for matrix in matrices.values()]
    assert found.relative_error == pytest.approx((S[0][2:].sum() / sum(s.sum() for s in S)).item())


# --- heads and channels ---


def test_palu_whitens_values_and_keys_head_by_head():
    """Section 3 of arXiv 2407.21118: SVD(S W) of each head, its right factor fused into W_o."""
    R, _ = inputs("random", D)
    weights, S = attention(), torch.linalg.cholesky(R).T
    found = ov.palu(weights, gram(R, weights.v), 3)
    keys = qk.palu(weights, gram(R, weights.k), 3)
    for group in range(G):
        value = torch.linalg.solve(S, truncated(S @ weights.v[group], 3))
        for i in range(H // G):
            head = group * (H // G) + i
            expected = value @ weights.o[head]
            torch.testing.assert_close(found.v[group] @ found.o[head], expected, **TIGHT)
            key = torch.linalg.solve(S, truncated(S @ weights.k[group], 3))
            torch.testing.assert_close(
                keys.q[head] @ keys.k[group].T, weights.q[head] @ key.T, **TIGHT
            )


def test_modegpt_ov_is_two_svds_in_a_row():
    """Algorithm 3 of arXiv 2408.09632, for one head a group."""
    R, _ = inputs("random", D)
    weights = attention()
    weights = type(weights)(weights.q[:G], weights.k, weights.v, weights.o[:G], h)
    values, vectors = torch.linalg.eigh(R)
    half = vectors @ torch.diag(values.sqrt()) @ vectors.T
    found = ov.modegpt(weights, gram(R, weights.v), 3)
    for head in range(G):
        U, S, V = torch.linalg.svd(half @ weights.v[head], full_matrices=False)
        U2, S2, V2 = torch.linalg.svd(torch.diag(S) @ V @ weights.o[head], full_matrices=False)
        value = torch.linalg.solve(half, U @ U2[:, :3])
        expected = value @ torch.diag(S2[:3]) @ V2[:3]
        torch.testing.assert_close(found.v[head] @ found.o[head], expected, **TIGHT)


@pytest.mark.parametrize("rotated", [True, False])
def test_modegpt_qk_keeps_the_columns_of_largest_norms(rotated):
    """Algorithm 2 of arXiv 2408.09632: ‖C_q^½ e_j‖ ‖C_k^½ e_j‖, by the square root itself."""
    R, _ = inputs("random", D)
    weights = attention()
    if not rotated:
        weights = type(weights)(weights.q, weights.k, weights.v, weights.o)
    Gq, Gk = gram(R, weights.q), gram(R, weights.k)
    found = qk.modegpt(weights, Gq, Gk, 4)
    for group in range(G):
        norms = torch.zeros(h, dtype=torch.float64)
        for head in range(group * H // G, (group + 1) * H // G):
            roots = [torch.linalg.cholesky(C).T for C in (Gq[head], Gk[group])]
            norms += roots[0].norm(dim=0) * roots[1].norm(dim=0)
        if rotated:
            pairs = norms.view(2, -1).sum(0).argsort(descending=True)[:2].sort().values
            assert found.pairs[group].tolist() == pairs.tolist()
            kept = torch.cat((pairs, pairs + h // 2))
        else:
            kept = norms.argsort(descending=True)[:4].sort().values
        torch.testing.assert_close(found.k[group], weights.k[group][:, kept])
        head = group * H // G
        torch.testing.assert_close(found.q[head], weights.q[head][:, kept])


@pytest.mark.parametrize("mode", ["wanda", "abs-w"])
def test_magnitudes_of_rope_pairs(mode):
    R, _ = inputs("random", D)
    weights, power = attention(), R.diagonal()
    grams = gram(R, weights.q), gram(R, weights.k)
    given = (*grams, power) if mode == "wanda" else grams
    found = (qk.wanda if mode == "wanda" else qk.abs_w)(weights, *given, 4)
    norms = power.sqrt() if mode == "wanda" else torch.ones(D).double()
    for group in range(G):
        score = torch.zeros(h // 2, dtype=torch.float64)
        for head in range(group * H // G, (group + 1) * H // G):
            importance = [W.abs() * norms[:, None] for W in (weights.q[head], weights.k[group])]
            columns = importance[0].norm(dim=0) * importance[1].norm(dim=0)
            score += columns.square().view(2, -1).sum(0)
        assert found.pairs[group].tolist() == sorted(score.argsort(descending=True)[:2].tolist())


def mlp_weights():
    return MLPWeights(random(D, N), random(D, N, seed=4), random(N, D, seed=5))


def test_magnitudes_of_channels():
    weights, R = mlp_weights(), inputs("random", N)[0].diagonal()
    size = weights.down.abs()
    for found, score in (
        (mlp.abs_w(weights, R, 30), size.sum(1)),
        (mlp.wanda(weights, R, 30), (size * R.sqrt()[:, None]).sum(1)),
    ):
        assert found.channels.tolist() == sorted(score.argsort(descending=True)[:30].tolist())


def test_flap_moves_means_into_the_bias():
    """Equations 4 and 6 of arXiv 2312.11983, on the tokens themselves."""
    x = random(200, N) * torch.linspace(0.1, 1, N) + random(N, seed=9)
    weights = mlp_weights()
    found = mlp.flap(weights, x.square().mean(0), x.mean(0), 30)
    score = x.var(0, correction=0) * weights.down.square().sum(1)
    kept = sorted(score.argsort(descending=True)[:30].tolist())
    assert found.channels.tolist() == kept
    dropped = sorted(set(range(N)) - set(kept))
    torch.testing.assert_close(found.bias, x[:, dropped].mean(0) @ weights.down[dropped])
    # Of all constants it is the best: what is left has no mean.
    left = x @ weights.down - x[:, kept] @ found.down - found.bias
    torch.testing.assert_close(left.mean(0), torch.zeros(D).double(), rtol=0, atol=1e-9)


def test_modegpt_mlp_is_the_nystroem_approximation():
    """Algorithm 1 of arXiv 2408.09632: leverage [C (C + λ)⁻¹]_jj, (SᵀC S)⁺ SᵀC W_down."""
    C, _ = inputs("random", N)
    weights = mlp_weights()
    ridge = mlp.MODEGPT_RIDGE * C.diagonal().mean()
    leverage = (C @ torch.linalg.inv(C + ridge * torch.eye(N))).diagonal()
    torch.testing.assert_close(ridge_leverage(C, ridge.item()), leverage, **TIGHT)
    kept = leverage.argsort(descending=True)[:30].sort().values
    S = torch.eye(N, dtype=torch.float64)[:, kept]
    expected = torch.linalg.pinv(S.T @ C @ S) @ S.T @ C @ weights.down
    found = mlp.modegpt(weights, C, 30)
    assert found.channels.tolist() == kept.tolist()
    torch.testing.assert_close(found.down, expected, **TIGHT)
    half = torch.linalg.cholesky(C).T
    lost = (half @ (weights.down - S @ expected)).square().sum()
    assert found.relative_error == pytest.approx(
        (lost / (half @ weights.down).square().sum()).item()
    )


@pytest.mark.parametrize("kind", ["random", "ill-conditioned", "singular", "dead-channel"])
def test_refit_is_never_worse_than_slicing_and_exact_at_full_rank(kind):
    C, _ = inputs(kind, N)
    W, kept = random(N, D), torch.arange(0, N, 2)
    refit, sliced = torch.zeros(N, D).double(), torch.zeros(N, D).double()
    refit[kept], sliced[kept] = take_over(C, kept, W)[0], W[kept]
    errors = [((W - X) * (C @ (W - X))).sum() for X in (refit, sliced)]
    assert errors[0] <= errors[1] * (1 + 1e-9)
    assert torch.equal(take_over(C, torch.arange(N), W)[0], W)


# --- end to end ---

BASELINES = {
    component: [
        mode for mode in MODES[component] if mode not in ("qk", "rxx-w-rxx", "xkv", "axkv", "rxx-w")
    ]
    for component in MODES
}


@pytest.fixture(
    scope="module",
    params=[
        "llama",
        "gpt2",
        "phi3",
        "gpt_neox",
        "qwen3",
        "opt",
        "falcon-gqa",
        "smollm3",
        "mixtral",
    ],
)
def dense(request, tmp_path_factory):
    """One of each: GQA, Conv1D, fused, partial RoPE, normed, biased, NoPE, experts."""
    needs(MODELS[request.param][0])
    folder = tmp_path_factory.mktemp(request.param)
    prepare(folder, *MODELS[request.param])
    return folder


def fitting(folder):
    """Every row that compresses one component by one baseline that fits the model."""
    arch = load_arch(folder / "dense")
    for component, modes in BASELINES.items():
        for mode in modes:
            kind = arch.attention if component != "mlp" else "experts" if arch.experts else arch.mlp
            whole = mode != "uniform-contiguous" or no_whole_rope(arch) is None
            if kind in MODES[component][mode].fits and whole:
                yield component, mode


def compress(folder, component, mode, ratio, out):
    row = {"qk": "dense", "ov": "dense", "mlp": "dense", "ratio": ratio} | {component: mode}
    approximate(folder / "dense", folder / "rxx", Plan(choose(row)), out)
    return AutoModelForCausalLM.from_pretrained(out).eval()


def test_all_of_it_is_the_dense_model(dense, tmp_path):
    ids = torch.randint(2, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(dense / "dense").eval()
    with torch.inference_mode():
        expected = model(ids).logits
        for component, mode in fitting(dense):
            if mode == "svd-llm-v2":
                continue
            found = compress(dense, component, mode, "0", tmp_path / f"{component}-{mode}")(
                ids
            ).logits
            assert (found - expected).abs().max() < 2e-3 * expected.abs().max(), (component, mode)


def test_two_factors_are_the_dense_model_with_their_products(dense, tmp_path):
    """Every product A B in the dense shapes, beside the folder as it is loaded."""
    ids = torch.randint(2, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    for component, mode in fitting(dense):
        if not MODES[component][mode].factors:
            continue
        model = compress(dense, component, mode, "0.25", tmp_path / f"{component}-{mode}")
        with torch.inference_mode():
            found = model(ids).logits
            whole = compress(dense, component, mode, "0", tmp_path / f"{component}-{mode}-0")
            for name, module in list(model.named_modules()):
                if isinstance(module, LowRank):
                    decoder = module.get_submodule(module.decoder)
                    product = decoder.weight @ module.encoder.weight
                    linear = whole.get_submodule(name.removesuffix("_factors"))
                    assert not isinstance(linear, LowRank)
                    conv = type(linear).__name__ == "Conv1D"
                    linear.weight.copy_(product.T if conv else product)
            expected = whole(ids).logits
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), (component, mode)


def test_sizes_match_a3s_at_the_same_ratio(dense, tmp_path):
    """Counted in the checkpoints: within one unit of rank a matrix, which is what rounding is."""
    arch = load_arch(dense / "dense")
    paper = {"qk": "rxx-w-rxx" if "rope" in arch.attention else "qk", "ov": "xkv", "mlp": "rxx-w"}
    for component in BASELINES:
        out = tmp_path / component
        compress(dense, component, paper[component], "0.25", out)
        expected = read_record(out / "approx.json")["size"]["compressed"]["parameters"]
        for fits, mode in fitting(dense):
            if fits != component or mode == "palu-rope":
                continue
            folder = tmp_path / f"{component}-{mode}"
            compress(dense, component, mode, "0.25", folder)
            record = read_record(folder / "approx.json")
            found = record["size"]["compressed"]["parameters"]
            # One unit of rank of a matrix has m + n weights; biases are not made smaller.
            d = arch.hidden_size
            units = {"qk": 2 * (d + arch.heads * arch.head_dim)}
            units |= {"ov": units["qk"], "mlp": 3 * (d + 2 * arch.intermediate_size)}
            # FLAP's biases, and rows of routers, are one for each expert.
            own = d * max(1, arch.experts)
            slack = arch.layers * (units[component] if MODES[component][mode].factors else own)
            biases = arch.layers * 2 * (arch.heads + arch.intermediate_size) * arch.head_dim
            assert abs(found - expected) <= slack + biases * arch.qkv_bias, (component, mode)


def test_palu_for_rope_caches_the_latent(tmp_path):
    prepare(tmp_path, *MODELS["llama"])
    compress(tmp_path, "qk", "palu-rope", "0.25", tmp_path / "small")
    record = read_record(tmp_path / "small/approx.json")
    arch = load_arch(tmp_path / "dense")
    rank = record["layers"][0]["qk"]["factors"]
    assert rank == {"k": arch.kv_heads * 12}
    values = arch.kv_heads * arch.head_dim
    assert record["size"]["compressed"]["kv_bytes_per_token"] == 4 * 2 * (rank["k"] + values)


def test_svd_llm_v2_gives_layers_ranks_of_their_own(tmp_path):
    prepare(tmp_path, "llama", {"num_hidden_layers": 3})
    compress(tmp_path, "mlp", "svd-llm-v2", "0.25", tmp_path / "v2")
    compress(tmp_path, "mlp", "svd-llm", "0.25", tmp_path / "v1")
    ranks = [
        [
            layer["mlp"]["factors"]["down"]
            for layer in read_record(tmp_path / v / "approx.json")["layers"]
        ]
        for v in ("v1", "v2")
    ]
    assert len(set(ranks[0])) == 1 < len(set(ranks[1]))
    assert abs(sum(ranks[0]) - sum(ranks[1])) <= 3


def test_fisher_information_is_that_of_autograd(tmp_path):
    """One block at a time, straight from the definition."""
    prepare(tmp_path, "llama", {})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    cut = {key: SETTINGS[key] for key in ("tokens", "block_length", "seed", "bos")}
    tokenizer = load_tokenizer(tmp_path / "dense")
    blocks = token_blocks(load_documents(tmp_path / "text.txt"), tokenizer, **cut)
    expected = 0
    for block in blocks:
        model.zero_grad()
        model(block[None], labels=block[None]).loss.backward()
        layer = model.model.layers[1]
        squares = [
            p.weight.grad.double().square().sum(0)
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        ]
        expected = expected + torch.stack(squares)
    rxx = Rxx(tmp_path / "rxx/attention_fisher.safetensors", "attention_fisher")
    torch.testing.assert_close(rxx.sums("layers.1"), expected, rtol=1e-5, atol=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(A3Error, match="does not fit experts"):
        check_fit("mlp", "svd-llm", "experts")
    with pytest.raises(A3Error, match=r"does not fit gqa-rope.*palu-rope"):
        check_fit("qk", "palu", "gqa-rope")


def test_every_kind_has_a_reader():
    """No statistic without a mode, or a repair of low precision, that reads it."""
    read = {kind for modes in MODES.values() for mode in modes.values() for kind in mode.kinds}
    read |= {kind for method in METHODS for kind in kinds_read(method)}
    assert read == set(KINDS)
