"""Paired comparisons, calibration seeds, and how tables and the report show them."""

import json
import math
import subprocess

import numpy as np
import pytest
from test_tables import (
    TASKS,
    TEXTS,
    Page,
    change,
    experiment,
    rows,
    table,
    write_results,
)

import a3.report.page
from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.experiments.rows import check_reference
from a3.report.figures.build import build_figures
from a3.report.page import build_report, checkout
from a3.report.tables.frames import print_table
from a3.report.tables.paired import BETTER, SAME, WORSE, differences, verdict
from a3.report.tables.results import build_tables

OURS = "rxx-w-rxx+xkv+rxx-w"
OTHER = "svd+svd+svd"


def folder(results, method, calibration="wiki", ratio="0.2"):
    return results / "eval" / "small" / calibration / method / ratio


def set_blocks(results, nll, *place):
    mean = sum(nll) / len(nll)
    path = folder(results, *place) / "ppl" / "encyclopedia.json"
    change(path, block_nll=nll, nll=mean, perplexity=math.exp(mean))


def set_items(results, scores, *place):
    path = folder(results, *place) / "harness" / "titles.json"
    value = sum(scores) / len(scores)
    change(path, item_scores=scores, item_measure="acc", items=len(scores), value=value)


def other(**names):
    return experiment("small", "svd", "svd", "svd", **names)


@pytest.fixture
def results(tmp_path):
    """Two methods at one ratio; the dense model's results have the same protocol."""
    write_results(tmp_path / "results", [experiment("small"), other()])
    return tmp_path / "results"


def compared(results, experiments=None, reference=OURS):
    out = results / "tables" / "out"
    experiments = experiments or [experiment("small"), other()]
    build_tables(results, experiments, TEXTS, TASKS, out, reference)
    return out


@pytest.mark.parametrize(
    ("nll", "said"),
    [
        ([3.4, 3.7], WORSE),  # +0.3, +0.2
        ([2.8, 3.3], BETTER),
        ([3.4, 3.4], SAME),  # +0.3, -0.1: the mean is less than its error
        ([3.1, 3.5], SAME),  # nothing differs at all
    ],
)
def test_the_verdict_is_of_the_paired_error_over_blocks(results, nll, said):
    set_blocks(results, nll, OTHER)
    (row,) = rows(compared(results) / "comparisons.csv")
    expected = np.subtract(nll, [3.1, 3.5])
    assert (row["qk"], row["reference"]) == ("svd", OURS)
    assert float(row["encyclopedia.nll_delta"]) == pytest.approx(expected.mean())
    error = np.std(expected, ddof=1) / math.sqrt(2)
    assert float(row["encyclopedia.nll_delta_stderr"]) == pytest.approx(error)
    assert row["encyclopedia.blocks"] == "2"
    assert row["encyclopedia.nll_verdict"] == said
    # These results have no item_scores: the difference of the scores, of which nobody knows more.
    told = [row[f"titles.acc_{key}"] for key in ("delta", "delta_stderr", "verdict")]
    assert told == ["0.0", "", ""]


def test_a_difference_of_two_errors_is_none():
    assert verdict(0.2, 0.1, True) == verdict(-0.2, 0.1, True) == SAME
    assert verdict(0.2001, 0.1, True) == verdict(-0.2001, 0.1, False) == WORSE
    assert verdict(0.2001, 0.1, False) == verdict(-0.2001, 0.1, True) == BETTER


def test_one_block_says_nothing():
    assert verdict(*differences([3.0], [4.0]).values(), True) == ""


def test_items_are_paired_and_higher_is_better(results):
    before = [1, 0, 1, 0, 1, 0, 0, 0, 1, 0]
    after = [1, 1, 1, 1, 1, 1, 1, 0, 1, 1]
    set_items(results, before, OURS)
    set_items(results, after, OTHER)
    change(results / "eval/small/dense/harness/titles.json", items=10)
    out = compared(results)
    (row,) = rows(out / "comparisons.csv")
    difference = np.subtract(after, before)
    assert float(row["titles.acc_delta"]) == pytest.approx(0.5)
    error = np.std(difference, ddof=1) / math.sqrt(10)
    assert float(row["titles.acc_delta_stderr"]) == pytest.approx(error)
    assert (row["titles.items"], row["titles.acc_verdict"]) == ("10", BETTER)
    text = print_table(out)
    assert "## Comparisons" in text
    assert "| +0.5000 ± 0.1667 | better" in text
    assert f"Each row against {OURS} of the same model" in text


def test_scores_that_are_not_one_an_item_are_refused(results):
    set_items(results, [1, 0, 1], OURS)
    set_items(results, [1, 0], OTHER)
    change(folder(results, OTHER) / "harness/titles.json", items=3)
    change(results / "eval/small/dense/harness/titles.json", items=3)
    with pytest.raises(A3Error, match=r"titles\.json: item_scores has 2 scores.*expected 3"):
        compared(results)


def test_only_rows_of_the_same_calibration_and_ratio_are_compared(tmp_path):
    rest = [other(), other(ratio="0.4"), experiment("b", "svd", "svd", "svd")]
    write_results(tmp_path, [experiment("small"), *rest])
    found = rows(compared(tmp_path, [experiment("small"), *rest]) / "comparisons.csv")
    assert [(row["model"], row["ratio"]) for row in found] == [("small", "0.2")]


def test_without_a_reference_nothing_is_compared(results):
    out = compared(results, reference=None)
    assert rows(out / "comparisons.csv") == rows(out / "seeds.csv") == []
    assert "##" not in print_table(out)


def test_a_reference_has_to_be_a_row():
    with pytest.raises(A3Error, match=r"reference is 'palu', expected .*: rxx-w-rxx\+xkv\+rxx-w"):
        check_reference([experiment("small")], "palu")


# --- seeds ---


def seeded(tmp_path, seeds, **changed):
    """Two methods with one calibration a seed; `changed` is said of the last one's statistics."""
    results, experiments = tmp_path / "results", []
    for seed in seeds:
        for one in (experiment("small"), other()):
            experiments.append(one | {"calibration": f"wiki-{seed}"})
    write_results(results, experiments)
    for name in ("v_blocks", "down_diagonal"):
        for seed in seeds:
            timing = results / "rxx" / "small" / f"wiki-{seed}" / f"{name}.timing.json"
            change_or_write(timing, seconds=1.0, tokens_per_second=1.0)
    for seed in seeds:
        for method in (OURS, OTHER):
            path = results / "checkpoints/small" / f"wiki-{seed}" / method / "0.2/approx.json"
            made = read_record(path)["provenance"]
            for record in made["statistics"].values():
                record["seed"] = seed
                record.update(changed if seed == seeds[-1] else {})
            change(path, provenance=made)
            worse = 0.1 + 0.01 * seed if method == OTHER else 0.0
            nll = [3.1 + 0.1 * seed + worse, 3.5 + 0.1 * seed + worse]
            set_blocks(results, nll, method, f"wiki-{seed}")
    return results, experiments


def change_or_write(path, **values):
    from test_tables import write

    write(path, values)


def test_seeds_have_their_mean_spread_and_range(tmp_path):
    results, experiments = seeded(tmp_path, (0, 1, 2))
    out = compared(results, experiments)
    ours, theirs = rows(out / "seeds.csv")
    assert (ours["qk"], theirs["qk"]) == ("rxx-w-rxx", "svd")
    assert (ours["seeds"], ours["calibration"]) == ("3", "wiki-0 wiki-1 wiki-2")
    nll = np.array([3.3, 3.4, 3.5])
    for key, values in (("nll", nll), ("perplexity", np.exp(nll))):
        measured = [float(ours[f"encyclopedia.{key}_{what}"]) for what in ("mean", "sd")]
        assert measured == pytest.approx([values.mean(), values.std(ddof=1)])
        ends = [float(ours[f"encyclopedia.{key}_{what}"]) for what in ("min", "max")]
        assert ends == pytest.approx([values[0], values[2]])
    assert ours["encyclopedia.nll_delta_mean"] == ""
    by_seed = [float(theirs[f"encyclopedia.nll_delta_seed_{seed}"]) for seed in (0, 1, 2)]
    assert by_seed == pytest.approx([0.10, 0.11, 0.12])
    assert float(theirs["encyclopedia.nll_delta_mean"]) == pytest.approx(0.11)
    error = 0.01 / math.sqrt(3)
    assert float(theirs["encyclopedia.nll_delta_stderr"]) == pytest.approx(error)
    assert "## Seeds" in print_table(out)
    assert "+0.1100 ± 0.0058" in print_table(out)


def test_calibrations_that_differ_in_more_are_no_seeds(tmp_path):
    results, experiments = seeded(tmp_path, (0, 1, 2), tokens=1024)
    assert [row["seeds"] for row in rows(compared(results, experiments) / "seeds.csv")] == ["2"] * 2
    results, experiments = seeded(tmp_path / "two", (0, 1), text_sha256="f" * 64)
    assert rows(compared(results, experiments) / "seeds.csv") == []


# --- shown ---


def test_bits_per_byte_are_a_column(results):
    experiments = [experiment("small"), other()]
    for path in results.glob("eval/**/encyclopedia.json"):
        change(path, bits_per_byte=0.98768)
    out = table(results, experiments)
    assert rows(out / "results.csv")[1]["encyclopedia.bits_per_byte"] == "0.98768"
    assert "0.9877 |" in print_table(out)
    assert "encyclopedia bits/byte" in print_table(out)


def report(results, experiments):
    out = compared(results, experiments)
    build_figures(results, experiments, TEXTS, TASKS, out / "figures")
    build_report(results, experiments, TEXTS, TASKS, out, {}, out / "report.html", OURS)
    return Page((out / "report.html").read_text())


def test_the_report_has_comparisons_seeds_and_speed(tmp_path):
    results, experiments = seeded(tmp_path, (0, 1))
    out = results / "tables" / "out"
    out.mkdir(parents=True)
    (out / "speed.csv").write_text("model,what,tokens/s,kv_bytes\nsmall,decode,12.34567,\n")
    page = report(results, experiments)
    headings = [attributes.get("id") for tag, attributes in page.tags if tag == "h2"]
    assert headings[:5] == ["results", "comparisons", "seeds", "figures", "speed"]
    assert sum(tag == "table" for tag, _ in page.tags) == 8
    for said in ("12.35", "kv_bytes", "of twenty rows", "results/tables/out/comparisons.csv"):
        assert said in page.text


def test_the_report_says_its_commit_and_whether_it_was_changed(tmp_path, monkeypatch):
    """Of the repository that tracks the code, not of one that it merely lies in."""

    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        command = ["git", "-C", tmp_path, *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "a3"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "other").write_text("")
    monkeypatch.setattr(a3.report.page, "PACKAGE", package)
    assert checkout() is None
    git("init", "-q")
    git("add", "other")
    git("commit", "-qm", "one")
    assert checkout() is None
    git("add", "a3")
    git("commit", "-qm", "two")
    commit = git("rev-parse", "HEAD")
    assert checkout() == {"commit": commit, "changed": False}
    (package / "__init__.py").write_text("# changed")
    assert checkout() == {"commit": commit, "changed": True}


def test_captions_are_unique(results):
    report(results, [experiment("small"), other()])
    captions = json.loads((results / "tables/out/figures/captions.json").read_text())
    assert len({each["name"] for each in captions}) == len(captions)
