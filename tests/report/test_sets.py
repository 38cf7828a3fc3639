"""Tables, figures and report of a set of texts: the mean, the worst, shares of the reference's."""

import math
import shutil

import numpy as np
import pytest
from test_tables import change, experiment, rows, write_results

from a3.core.errors import A3Error
from a3.core.files import SEAL, read_json, read_record, write_record
from a3.report.figures.build import build_figures
from a3.report.page import build_report
from a3.report.tables.columns import comparison_columns, result_columns, share_columns
from a3.report.tables.frames import read_csv
from a3.report.tables.results import build_tables

REFERENCE = "rxx-w-rxx+xkv+rxx-w"
OTHER = "svd+svd+svd"
KINDS = ("encyclopedia", "web", "code")
BLOCKS = 4
# What a row loses on each text, nats a token.
DENSE = "dense"
LOSSES = {
    (DENSE, "0"): (0.0, 0.0, 0.0),
    (REFERENCE, "0.2"): (0.5, 0.6, 0.4),
    (OTHER, "0.2"): (0.2, 0.4, 0.3),
    (REFERENCE, "0.4"): (1.5, 1.6, 1.4),
    (OTHER, "0.4"): (0.6, 0.7, 0.8),
}
EXPERIMENTS = [
    experiment("small", *method.split("+"), ratio=ratio)
    for method, ratio in LOSSES
    if method != DENSE
]


def losses(method: str, ratio: str, seed: int) -> np.ndarray:
    """Loss of each block of each text, (texts, blocks)."""
    blocks = np.random.default_rng(0).normal(3.0, 0.4, (len(KINDS), BLOCKS))
    noise = np.random.default_rng([seed, len(method), int(10 * float(ratio))])
    spread = 0 if method == DENSE else 0.05
    return blocks + np.array(LOSSES[method, ratio])[:, None] + noise.normal(0, spread, blocks.shape)


def write_set(folder, method, ratio, seed=0):
    """Replace the result on one text by that of a set, and its timing with it."""
    single = read_record(folder / "ppl/encyclopedia.json")
    own = ("checkpoint_sha256", "provenance")
    texts = []
    for kind, nll in zip(KINDS, losses(method, ratio, seed).tolist(), strict=True):
        score = {"block_nll": nll, "nll": float(np.mean(nll)), "blocks": BLOCKS, "text": kind}
        score |= {"perplexity": math.exp(np.mean(nll)), "token_ids_sha256": f"of {kind}"}
        texts.append({k: v for k, v in single.items() if k not in (*own, SEAL)} | score)
    mean = float(np.mean([text["nll"] for text in texts]))
    record = {key: single[key] for key in own} | {"config_sha256": "c", "texts": texts}
    record |= {"nll": mean, "perplexity": math.exp(mean), "perplexity_stderr": 0.5}
    write_record(folder / "ppl/kinds.json", record)
    write_record(folder / "ppl/kinds.timing.json", {"seconds": 9.0, "tokens_per_second": 64.0})
    for name in ("encyclopedia.json", "encyclopedia.timing.json"):
        (folder / "ppl" / name).unlink()


def write_sets(results, calibration="wiki", seed=0):
    """All rows of a calibration, and the dense model where it is not there yet."""
    for method, ratio in LOSSES:
        if method == DENSE and not (results / "eval/small/dense/ppl/kinds.json").exists():
            write_set(results / "eval/small/dense", method, ratio)
        if method != DENSE:
            write_set(results / "eval/small" / calibration / method / ratio, method, ratio, seed)


@pytest.fixture
def results(tmp_path):
    made = tmp_path / "results"
    write_results(made, EXPERIMENTS)
    write_sets(made)
    return made


def built(results, experiments=EXPERIMENTS, reference=REFERENCE):
    out = results / "tables/out"
    build_tables(results, experiments, ["kinds"], ["titles"], out, reference)
    return out


def of(table, method, ratio):
    """One row of a table, by method and ratio."""
    (found,) = [
        row
        for row in table
        if "+".join(row[key] for key in ("qk", "ov", "mlp")) == method and row["ratio"] == ratio
    ]
    return found


def test_the_mean_counts_texts_equally_and_its_error_is_of_the_blocks(results):
    row = of(rows(built(results) / "results.csv"), OTHER, "0.4")
    lost = losses(OTHER, "0.4", 0) - losses(DENSE, "0", 0)
    assert float(row["kinds.mean.nll_delta"]) == pytest.approx(lost.mean())
    errors = lost.std(axis=1, ddof=1) / math.sqrt(BLOCKS)
    expected = math.sqrt((errors**2).sum()) / len(KINDS)
    assert float(row["kinds.mean.nll_delta_stderr"]) == pytest.approx(expected)
    for kind, own in zip(KINDS, lost, strict=True):
        assert float(row[f"kinds.{kind}.nll_delta"]) == pytest.approx(own.mean())
        assert row[f"kinds.{kind}.token_ids_sha256"] == f"of {kind}"
    assert row["kinds.worst.text"] == KINDS[int(lost.mean(axis=1).argmax())] == "code"
    assert float(row["kinds.worst.nll_delta"]) == pytest.approx(lost.mean(axis=1).max())


def test_shares_of_the_references_increase(results):
    """By the definition; the standard error by drawing blocks' losses again many times."""
    row = of(rows(built(results) / "comparisons.csv"), OTHER, "0.2")
    three = [losses(*key, 0) for key in ((DENSE, "0"), (REFERENCE, "0.2"), (OTHER, "0.2"))]
    d, r, p = (np.exp(one.mean(axis=1)) for one in three)
    shares = (p - d) / (r - d)
    for kind, share in zip(KINDS, shares, strict=True):
        assert float(row[f"kinds.{kind}.share"]) == pytest.approx(share)
    assert float(row["kinds.mean.share"]) == pytest.approx(shares.mean())
    assert row["kinds.worst.text"] == KINDS[int(shares.argmax())]
    assert float(row["kinds.worst.share"]) == pytest.approx(shares.max())
    # The delta method, by small steps of each block's loss.
    errors = []
    for index in range(len(KINDS)):
        own = np.array([one[index] for one in three])
        effects = []
        for block in range(BLOCKS):
            moved = own.mean(axis=1) + 1e-6 * own[:, block]
            d_, r_, p_ = np.exp(moved)
            effects.append(((p_ - d_) / (r_ - d_) - shares[index]) / 1e-6)
        errors.append(np.std(effects, ddof=1) / math.sqrt(BLOCKS))
    expected = math.sqrt(sum(error**2 for error in errors)) / len(KINDS)
    assert float(row["kinds.mean.share_stderr"]) == pytest.approx(expected, rel=1e-3)


def test_a_comparison_is_paired_over_blocks(results):
    row = of(rows(built(results) / "comparisons.csv"), OTHER, "0.2")
    apart = losses(OTHER, "0.2", 0) - losses(REFERENCE, "0.2", 0)
    errors = apart.std(axis=1, ddof=1) / math.sqrt(BLOCKS)
    assert float(row["kinds.mean.nll_delta"]) == pytest.approx(apart.mean())
    expected = math.sqrt((errors**2).sum()) / len(KINDS)
    assert float(row["kinds.mean.nll_delta_stderr"]) == pytest.approx(expected)
    assert row["kinds.mean.nll_verdict"] == "better"


def test_there_is_no_share_where_the_reference_does_not_increase_a_text(results):
    path = results / "eval/small/wiki" / REFERENCE / "0.2/ppl/kinds.json"
    texts = read_record(path)["texts"]
    dense = read_record(results / "eval/small/dense/ppl/kinds.json")["texts"]
    texts[1] |= {key: dense[1][key] for key in ("block_nll", "nll", "perplexity")}
    change(path, texts=texts)
    row = of(rows(built(results) / "comparisons.csv"), OTHER, "0.2")
    assert row["kinds.mean.share"] == row["kinds.worst.share"] == ""
    share = of(rows(results / "tables/out/comparisons.csv"), OTHER, "0.4")["kinds.mean.share"]
    assert 0 < float(share) < 1


def test_readable_tables_have_the_mean_and_the_worst_not_every_text(results):
    out = built(results)
    frames = [read_csv(out / f"{name}.csv") for name in ("results", "comparisons")]
    shown = [c.title for c in result_columns(frames[0], ["kinds"], []) if "kinds" in c.title]
    expected = ["mean perplexity", "mean Δ perplexity", "mean Δ nll", "worst Δ nll"]
    assert shown == [f"kinds {what}" for what in expected]
    shown = {column.title: column.texts for column in comparison_columns(frames[1])}
    assert not any("web" in title for title in shown)
    assert shown["kinds share of increase, worst"][0].startswith("code 0.")
    titles = [column.title for column in share_columns(frames[1], "kinds")]
    assert titles[-4:] == [*KINDS, "mean"]
    # Every text's protocol is there.
    assert all(f"| kinds.{kind} " in (out / "results.md").read_text() for kind in KINDS)


def test_seeds_have_the_spread_of_the_share(results):
    again = [each | {"calibration": "wiki-1"} for each in EXPERIMENTS]
    write_results(results, again)
    write_sets(results, "wiki-1", seed=1)
    shutil.copytree(results / "rxx/small/wiki", results / "rxx/small/wiki-1")
    for path in (results / "checkpoints/small/wiki-1").glob("*/*/approx.json"):
        made = read_record(path)["provenance"]
        made["statistics"] = {k: v | {"seed": 1} for k, v in made["statistics"].items()}
        change(path, provenance=made)
    table = rows(built(results, [*EXPERIMENTS, *again]) / "seeds.csv")
    row = of(table, OTHER, "0.2")
    means = []
    for seed in (0, 1):
        three = [losses(*key, seed) for key in ((DENSE, "0"), (REFERENCE, "0.2"), (OTHER, "0.2"))]
        d, r, p = (np.exp(one.mean(axis=1)) for one in three)
        means.append(((p - d) / (r - d)).mean())
    assert float(row["kinds.mean.share_mean"]) == pytest.approx(np.mean(means))
    assert float(row["kinds.mean.share_sd"]) == pytest.approx(np.std(means, ddof=1))
    assert "kinds.mean.share_mean" in of(table, REFERENCE, "0.2")


def test_results_of_other_texts_are_not_compared(results):
    path = results / "eval/small/wiki" / OTHER / "0.2/ppl/kinds.json"
    texts = read_record(path)["texts"]
    change(path, texts=texts[:2])
    with pytest.raises(A3Error, match=r"kinds\.json is of kinds\.encyclopedia, kinds\.web, but"):
        built(results)
    texts[2] |= {"token_ids_sha256": "others"}
    change(path, texts=texts)
    with pytest.raises(A3Error, match="token_ids_sha256 is 'others' here and 'of code' there"):
        built(results)


def test_the_report_shows_every_text_and_the_figure_of_them(results):
    out = built(results)
    build_figures(results, EXPERIMENTS, ["kinds"], ["titles"], out / "figures")
    captions = {each["name"]: each["caption"] for each in read_json(out / "figures/captions.json")}
    assert "loss on each text of kinds less the dense model's" in captions["kinds-small"]
    drawn = (out / "figures/kinds-small.svg").read_text()
    assert all(f"<!-- {kind} -->" in drawn for kind in (*KINDS, "mean", "ratio 0.2", "ratio 0.4"))
    page = out / "report.html"
    build_report(results, EXPERIMENTS, ["kinds"], ["titles"], out, {}, page, reference=REFERENCE)
    said = page.read_text()
    assert "Perplexity on kinds, the mean of 3 texts, is of " in said
    assert 'id="set-kinds"' in said
    assert "results/eval/small/dense/ppl/kinds.json" in said
    (timed,) = {row["perplexity kinds.seconds"] for row in rows(out / "timings.csv")}
    assert timed == "9.0"
