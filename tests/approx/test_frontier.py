"""A frontier's numbers are the allocator's, and what was measured corrects the others."""

import math

import pytest
from test_plus import collected, gradient_model
from test_promise import PLUS, plan_of
from tiny import run

from a3.cli.main import main
from a3.core.files import read_record
from a3.frontier import MEASURED, RATIOS, checks, correct, full_ranks, point_of, table
from a3.solutions.modes import choose
from a3.solutions.plan import Plan
from a3.stages.approx.allocator import Allocator
from a3.stages.approx.limits import BYTES, CACHED, FLOPS, PARAMETERS

CHECKED = 0.22


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A tiny model, its statistics and its frontier, with the page."""
    folder = tmp_path_factory.mktemp("frontier")
    gradient_model(folder, "llama-biased")
    collected(folder, "rxx", plan_of("0.3").kinds())
    page = ("--html", folder / "frontier.html")
    run(*words(folder), *page, "--check", CHECKED, "-o", folder / "frontier.json")
    return folder


@pytest.fixture(scope="module")
def record(calibrated):
    return read_record(calibrated / "frontier.json")


def words(folder):
    """The command, without what it is to write."""
    return ("frontier", folder / "dense", "--rxx", folder / "rxx", "--text", folder / "text.txt")


def allocator_of(folder):
    return Allocator(folder / "dense", folder / "rxx", Plan(choose(PLUS | {"ratio": "0"})))


def test_amounts_and_losses_are_those_of_the_allocator(calibrated, record):
    points = record["points"]
    assert [point["ratio"] for point in points] == sorted({*RATIOS, CHECKED})
    losses = [point["predicted"] for point in points]
    assert losses[0] == 0
    assert losses == sorted(losses)
    for key in (PARAMETERS, CACHED, FLOPS, BYTES):
        amounts = [point["amounts"][key] for point in points]
        assert amounts[0] <= record["dense"]["amounts"][key]
        assert amounts[-1] < 0.75 * amounts[0]
    allocator = allocator_of(calibrated)
    assert record["dense"] == {"amounts": allocator.dense, "ranks": full_ranks(allocator)}
    for point in points[::6]:
        chosen = allocator.least_loss(allocator.at_ratio(point["ratio"]))
        assert point["amounts"] == allocator.amounts(chosen)
        assert point["predicted"] == allocator.predicted(chosen)
        assert point["ranks"] == allocator.ranks(chosen)
        assert sum(map(sum, point["parts"].values())) == pytest.approx(point["predicted"])
        # It keeps to the ratio, of what is compressed.
        for key, limit in allocator.at_ratio(point["ratio"]).items():
            removed = record["dense"]["amounts"][key] - point["amounts"][key]
            assert removed >= 0.999 * (allocator.full[key] - limit)


def test_ranks_of_experts_are_means(tmp_path):
    gradient_model(tmp_path, "mixtral")
    collected(tmp_path, "rxx", plan_of("0.3").kinds())
    allocator = allocator_of(tmp_path)
    point = point_of(allocator, 0.4)
    ranks = allocator.ranks(allocator.least_loss(allocator.at_ratio(0.4)))
    assert point["ranks"]["mlp"] == [sum(own) / len(own) for own in ranks["mlp"]]
    assert sum(map(sum, point["parts"].values())) == pytest.approx(point["predicted"])
    assert all(len(parts) == allocator.arch.layers for parts in point["parts"].values())


def test_what_is_measured_corrects_and_what_is_checked_does_not(record):
    corrected = {point["ratio"]: point["corrected"] for point in record["points"]}
    assert [one["ratio"] for one in record["measured"]] == list(MEASURED)
    for one in record["measured"]:
        assert one["blocks"] == record["blocks"]
        if one["increase"] > 0:
            assert corrected[one["ratio"]] == pytest.approx(one["increase"])
    (check,) = record["checks"]
    assert check["ratio"] == CHECKED
    assert check["corrected"] == corrected[CHECKED]
    again = [dict(point) for point in record["points"]]
    correct(again, record["measured"])
    assert again == record["points"]


def points_of(*predicted):
    return [{"ratio": ratio / 10, "predicted": loss} for ratio, loss in enumerate(predicted)]


def test_a_correction_lies_between_those_that_were_measured():
    points = points_of(0.0, 0.01, 0.1, math.sqrt(0.1), 1.0, 5.0)
    measured = [{"predicted": 0.1, "increase": 0.2}, {"predicted": 1.0, "increase": 8.0}]
    correct(points, measured)
    found = [point["corrected"] for point in points]
    # The nearest factor outside; in the middle of two, their geometric mean.
    assert found == pytest.approx([0.0, 0.02, 0.2, 4 * math.sqrt(0.1), 8.0, 40.0])
    points = points_of(0.0, 0.1)
    for useless in ([], [{"predicted": 0.1, "increase": -0.2}], [{"predicted": 0, "increase": 1}]):
        correct(points, useless)
        assert [point["corrected"] for point in points] == [0.0, 0.1]
    assert checks(points, [{"ratio": 0.1, "increase": 0.3}]) == [
        {"ratio": 0.1, "increase": 0.3, "corrected": 0.1}
    ]


def test_the_table_has_sizes_losses_and_what_was_measured(record):
    heading, *lines = table(record).splitlines()
    assert heading.split()[:4] == ["ratio", "parameters", "KV", "cache"]
    ratios = [line.split()[0] for line in lines]
    assert ratios == ["0", "0.1", "0.2", "0.22", "0.3", "0.4", "0.5", "0.6"]
    assert len({len(line) for line in (heading, *lines)}) == 1
    tried = [ratio for ratio, line in zip(ratios, lines, strict=True) if "±" in line]
    assert tried == ["0.1", "0.22", "0.3", "0.5"]
    assert "100.0%" in lines[0]


def test_the_page_has_the_command_of_this_model(calibrated):
    page = (calibrated / "frontier.html").read_text()
    folder, text = calibrated / "dense", calibrated / "text.txt"
    assert f"a3 compress {folder} --preset a3-plus --ratio 0.2 --text {text} --tokens 160" in page


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--check", "0.9"], "cannot check ratio 0.9: expected one above 0 and up to 0.8"),
        (["--preset", "a3"], "Take modes marked ~, or dense"),
        (["--html", "frontier.html"], "frontier.html: exists already"),
        (["--html", "new.json"], "new.json"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_measured(
    calibrated, record, more, says, capsys, monkeypatch
):
    monkeypatch.chdir(calibrated)
    monkeypatch.setattr("a3.promise.Trials.loss", None)
    before = sorted(path.name for path in calibrated.iterdir())
    assert main([str(word) for word in (*words(calibrated), *more, "-o", "new.json")]) == 1
    assert says in capsys.readouterr().err
    assert sorted(path.name for path in calibrated.iterdir()) == before


def test_a_text_of_other_statistics_is_refused(calibrated, capsys, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("River.")
    command = [
        str(short if word == calibrated / "text.txt" else word) for word in words(calibrated)
    ]
    assert main([*command, "-o", str(tmp_path / "new.json")]) == 1
    assert "Name the file that a3 collect read" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
