"""Spectra against the slow dense reference, and as the workflow makes them."""

import json
from dataclasses import replace

import pytest
import reference
import torch
from test_solutions import G, H, attention, gram, h, inputs
from test_tables import TASKS, TEXTS, digest, experiment, write, write_results
from tiny import BLOCK, KINDS, run, tiny_llama, tiny_model

from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.models.family import MLPWeights
from a3.report.figures.build import build_figures
from a3.solutions import mlp, ov, qk
from a3.solutions.modes import COMPONENTS
from a3.stages.approx.spectra import lost_beyond, ov_energy, qk_energy, ranks_of, spectra

N = 40


def svd_energy(*factors):
    """Squared singular values of a product, by the SVD of the dense matrix."""
    product = factors[0]
    for factor in factors[1:]:
        product = product @ factor
    return torch.linalg.svdvals(product)[:h].square()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.max().item())


@pytest.mark.parametrize("kind", ["random", "ill-conditioned", "singular"])
def test_ov_energy_is_the_squared_spectrum_of_the_joint_matrix(kind):
    weights = attention()
    R, _ = inputs(kind, weights.v.shape[1])
    found = ov_energy(weights, gram(R, weights.v))
    assert found.shape == (G, h)
    for group in range(G):
        joint = torch.cat(list(weights.grouped(weights.o)[group]), dim=1)
        close(found[group], svd_energy(reference.root(R)[0], weights.v[group], joint))


def test_qk_energy_without_rope_is_the_squared_spectrum_of_the_stacked_scores():
    weights = replace(attention(), rope_dims=0)
    width = weights.q.shape[1]
    Rq, Rk = inputs("random", width)[0], inputs("ill-conditioned", width, seed=3)[0]
    found = qk_energy(weights, gram(Rq, weights.q), gram(Rk, weights.k))
    for group in range(G):
        queries = torch.cat([reference.root(Rq)[0] @ W for W in weights.grouped(weights.q)[group]])
        scores = svd_energy(queries, weights.k[group].T, reference.root(Rk)[0])
        close(found[group], scores)


def pair_scores(weights, Rq, Rk, rotated):
    """Scores as the paper has them, a pair (f, f + rotated / 2) at a time."""
    half_q, half_k = reference.root(Rq)[0], reference.root(Rk)[0]
    scores = torch.zeros(G, rotated // 2, dtype=torch.float64)
    for head in range(H):
        group = head // (H // G)
        for j in range(rotated):
            left = (half_q @ weights.q[head, :, j]).square().sum()
            right = (half_k @ weights.k[group, :, j]).square().sum()
            scores[group, j % (rotated // 2)] += left * right
    return scores


@pytest.mark.parametrize("rotated", [h, h // 2])
def test_qk_energy_with_rope_has_the_scores_of_the_pairs(rotated):
    weights = replace(attention(), rope_dims=rotated)
    R, _ = inputs("random", weights.q.shape[1])
    found = qk_energy(weights, gram(R, weights.q), gram(R, weights.k))
    scores = pair_scores(weights, R, R, rotated)
    for group in range(G):
        rest = torch.empty(0, dtype=torch.float64)
        if rotated < h:
            half = reference.root(R)[0]
            queries = [half @ W[:, rotated:] for W in weights.grouped(weights.q)[group]]
            keys = weights.k[group][:, rotated:]
            rest = svd_energy(torch.cat(queries), keys.T, half)[: h - rotated]
        both = torch.cat((scores[group] / 2, scores[group] / 2, rest))
        close(found[group], both.sort(descending=True).values)


def test_gains_of_norms_count():
    draw = torch.Generator().manual_seed(5)
    gains = {
        f"{name}_gain": torch.rand(heads, h, dtype=torch.float64, generator=draw) + 0.5
        for name, heads in (("q", H), ("k", G))
    }
    weights = replace(attention(), norm="head", **gains)
    R, _ = inputs("random", weights.q.shape[1])
    found = qk_energy(weights, gram(R, weights.q), gram(R, weights.k))
    scaled = replace(
        attention(),
        q=weights.q * weights.q_gain[:, None],
        k=weights.k * weights.k_gain[:, None],
    )
    close(found, qk_energy(scaled, gram(R, scaled.q), gram(R, scaled.k)))


@pytest.mark.parametrize("rank", [1, 5, h])
def test_what_is_lost_is_what_the_solutions_lose(rank):
    """Of one group: over several, the solutions weigh each group's share by its energy."""
    weights = attention()
    one = replace(
        weights, q=weights.q[:2], k=weights.k[:1], v=weights.v[:1], o=weights.o[:2], rope_dims=0
    )
    R, _ = inputs("random", one.q.shape[1])
    (lost,) = lost_beyond(ov_energy(one, gram(R, one.v)), [rank])
    assert lost.item() == pytest.approx(ov.xkv(one, gram(R, one.v), rank).relative_error, abs=1e-12)
    Gq, Gk = gram(R, one.q), gram(R, one.k)
    (lost,) = lost_beyond(qk_energy(one, Gq, Gk), [rank])
    assert lost.item() == pytest.approx(qk.qk(one, Gq, Gk, rank).relative_error, abs=1e-12)


def test_lost_beyond_is_exact_where_little_is_left():
    energy = torch.tensor([1.0, 1e-12, 1e-20], dtype=torch.float64)
    assert lost_beyond(energy, [1, 2, 3]).tolist() == pytest.approx(
        [1e-12, 1e-20, 0], rel=1e-7, abs=0
    )
    assert lost_beyond(torch.zeros(3, dtype=torch.float64), [1, 3]).tolist() == [0, 0]


def test_ranks_are_twentieths_without_0_and_twice():
    assert ranks_of(8) == list(range(1, 9))
    assert ranks_of(100) == list(range(5, 101, 5))


# --- the stage ---


def collected(folder, model):
    folder.joinpath("learn.txt").write_text("A river moves towards an ocean or a lake. " * 60)
    run("model", model, "-o", folder / "dense")
    outputs = [folder / "rxx" / f"{kind}.safetensors" for kind in KINDS]
    text = ["--text", folder / "learn.txt", "--tokens", "512", *BLOCK]
    run("collect", folder / "dense", *text, "-o", *outputs)
    return folder / "dense", folder / "rxx"


def test_the_stage_on_a_model(tmp_path):
    dense, rxx = collected(tmp_path, tiny_llama(tmp_path / "tiny", num_key_value_heads=1))
    run("spectra", dense, "--rxx", rxx, "-o", tmp_path / "spectra.json")
    record = read_record(tmp_path / "spectra.json")
    assert record["full"] == {"qk": 16, "ov": 16, "mlp": 96}
    assert {
        component: len(layers) for component, layers in record["lost"].items()
    } == dict.fromkeys(("qk", "ov", "mlp"), 2)
    solving = ["--rxx", rxx, "--qk", "dense", "--ov", "xkv@12", "--mlp", "rxx-w@72"]
    run("approx", dense, *solving, "-o", tmp_path / "small")
    for layer, said in enumerate(read_record(tmp_path / "small" / "approx.json")["layers"]):
        for component, rank in (("ov", 12), ("mlp", 72)):
            (curve,) = record["lost"][component][layer]
            at = record["ranks"][component].index(rank)
            assert curve[at] == pytest.approx(said[component]["relative_error"], rel=1e-6)
            assert curve == sorted(curve, reverse=True)
            assert curve[-1] == 0


def test_experts_have_a_curve_each_where_enough_tokens_reached_them(tmp_path):
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    dense, rxx = collected(tmp_path, tiny_model(tmp_path / "tiny", "mixtral", **sizes))
    spectra(dense, rxx, tmp_path / "spectra.json")
    found = read_record(tmp_path / "spectra.json")["lost"]
    assert all(1 <= len(curves) <= 4 for curves in found["mlp"])
    assert [len(curves) for curves in found["ov"]] == [2, 2]


def test_statistics_of_another_model_are_refused(tmp_path):
    dense, rxx = collected(tmp_path, tiny_llama(tmp_path / "tiny"))
    run("model", tiny_llama(tmp_path / "other", seed=1), "-o", dense)
    with pytest.raises(A3Error, match="were made from another model"):
        spectra(dense, rxx, tmp_path / "spectra.json")
    (rxx / "q_blocks.safetensors").unlink()
    with pytest.raises(A3Error, match="no such file"):
        spectra(tmp_path / "dense", rxx, tmp_path / "spectra.json")


def test_mlp_scores_are_those_of_the_solution():
    draw = torch.Generator().manual_seed(2)
    R = inputs("random", N)[0]
    down = torch.randn(N, 24, dtype=torch.float64, generator=draw)
    weights = MLPWeights(up=torch.zeros(24, N), gate=None, down=down)
    score = reference.root(R)[0].square().sum(0) * down.square().sum(1)
    (lost,) = lost_beyond(score.sort(descending=True).values, [30])
    assert lost.item() == pytest.approx(mlp.rxx_w(weights, R.diagonal(), 30).relative_error)


# --- the figure ---


def drawn(results, experiments, spectra_):
    build_figures(results, experiments, TEXTS, TASKS, results / "figures", spectra_)
    captions = json.loads((results / "figures/captions.json").read_text())
    return {each["name"]: each["caption"] for each in captions}


def said(results, model, weights):
    """A spectra record with experts that no token reached in its second layer."""
    ranks, curve = [2, 4], [0.25, 0.0]
    path = results / "spectra" / model / "wiki.json"
    curves = {"qk": [[curve], [curve]], "ov": [[curve], [curve]], "mlp": [[curve], []]}
    write(path, {
        "full": dict.fromkeys(COMPONENTS, 4),
        "ranks": {component: ranks for component in COMPONENTS},
        "lost": curves,
        "provenance": {"weights_sha256": weights},
    })  # fmt: skip
    return path


def test_a_figure_of_each_models_spectra(tmp_path):
    experiments = [experiment("a"), experiment("b")]
    write_results(tmp_path, experiments)
    found = drawn(tmp_path, experiments, [said(tmp_path, "b", digest("b"))])
    assert [name for name in found if name.startswith("spectra")] == ["spectra-b-wiki"]
    assert "Data: spectra/b/wiki.json" in found["spectra-b-wiki"]


def test_spectra_of_other_weights_are_refused(tmp_path):
    write_results(tmp_path, [experiment("a")])
    with pytest.raises(A3Error, match=r"spectra/a/wiki\.json: made of weights whose hash is fff"):
        drawn(tmp_path, [experiment("a")], [said(tmp_path, "a", "f" * 64)])
