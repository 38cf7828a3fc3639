"""A frontier as a figure, and the page with its slider: what they show, by their own numbers."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
from frontiers import LAYERS, MODES, RATIOS, frontier_record

from a3.artifacts.places import Place
from a3.cli.main import parser
from a3.core.errors import A3Error
from a3.core.files import read_record, write_record
from a3.experiments.needed import frontiers
from a3.report.figures.drawing import styled
from a3.report.figures.frontier import frontier_drawing
from a3.report.frontiers import Frontier, frontier_page, read_frontiers

HOSTILE = "</script><script>alert(1)</script>"


class Weights(dict):
    path = "arch.json"


def dense(model="small", weights="w"):
    return SimpleNamespace(place=Place(model), weights=Weights(weights_sha256=weights))


def written(folder, record, modes="fisher~+joint~+obs~"):
    path = folder / "frontiers" / "small" / "wiki" / f"{modes}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, record)
    return path


def panel_data(page):
    (found,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def test_both_panels_have_both_lines_and_what_was_measured(tmp_path):
    path = written(tmp_path, frontier_record("w"))
    (frontier,) = read_frontiers([path], [dense("other"), dense()], {})
    with styled():
        drawing = frontier_drawing(frontier)
    assert drawing.name == "frontier-small-wiki-a3-plus"
    left, right = drawing.figure.axes
    for axes, names in ((left, "parameters"), (right, "KV cache")):
        assert axes.get_xlabel() == f"{names} kept, of the dense model's"
        predicted, corrected, fitted, checked = (
            line
            for line in axes.lines
            if len(line.get_xdata()) and line.get_marker() in ("o", "None")
        )
        assert [len(line.get_xdata()) for line in (predicted, corrected)] == [len(RATIOS) - 1] * 2
        assert (predicted.get_linestyle(), corrected.get_linestyle()) == ("--", "-")
        assert corrected.get_ydata()[-1] == pytest.approx(1.5 * predicted.get_ydata()[-1])
        assert list(fitted.get_xdata()) == pytest.approx([0.9, 0.7, 0.5], abs=0.001)
        assert list(fitted.get_ydata()) == pytest.approx([0.03, 0.27, 0.75])
        assert list(checked.get_ydata()) == pytest.approx([0.128])
        assert fitted.get_markerfacecolor() == "#000000"
        assert checked.get_markerfacecolor() == "white"
        assert axes.get_yscale() == "log"
        assert axes.xaxis_inverted()


def test_a_cache_that_stays_has_no_panel(tmp_path):
    record = frontier_record("w", {"mlp": "obs~"})
    for point in record["points"]:
        point["amounts"]["cached_numbers"] = 512
    path = written(tmp_path, record, "dense+dense+obs~")
    (frontier,) = read_frontiers([path], [dense()], {})
    with styled():
        drawing = frontier_drawing(frontier)
    assert len(drawing.figure.axes) == 1
    assert drawing.name == "frontier-small-wiki-dense+dense+obs~"


def test_a_frontier_of_other_weights_is_refused(tmp_path):
    path = written(tmp_path, frontier_record("w"))
    with pytest.raises(A3Error, match=r"weights whose hash is w, but arch.json says other"):
        read_frontiers([path], [dense(weights="other")], {})


@pytest.mark.parametrize(
    ("modes", "named"),
    [
        (MODES, "--preset a3-plus"),
        ({"mlp": "obs~"}, "--qk dense --ov dense --mlp 'obs~'"),
    ],
)
def test_the_command_is_one_that_a3_takes(tmp_path, modes, named):
    path = written(tmp_path, frontier_record("w", modes))
    config = {"calibrations": {"wiki": {"text": "articles"}}}
    (frontier,) = read_frontiers([path], [dense()], config)
    assert frontier.command(0.0) == ""
    assert frontier.command(0.225) == (
        f"a3 compress small {named} --ratio 0.225 --text articles --tokens 4096 "
        "--block-length 64 --seed 3 -o small"
    )
    for name in ("my model", "$(reboot)", HOSTILE):
        command = shlex.split(Frontier(frontier.record, name).command(0.2))
        assert command[2] == name
        assert parser().parse_args(command[1:]).ratio == "0.2"


def test_a_page_holds_the_numbers_and_nothing_from_outside(tmp_path):
    path = written(tmp_path, frontier_record("w"))
    frontier_page(path, HOSTILE, "texts/it's.txt", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert page.count("<script") == page.count("</script") == 2
    assert not re.search(r"""(src|href)=|url\(|@import|fetch\(|https?://(?!www\.w3\.org)""", page)
    assert "default-src 'none'" in page
    data, record = panel_data(page), read_record(path)
    assert [point["ratio"] for point in data["points"]] == RATIOS
    for shown, point in zip(data["points"], record["points"], strict=True):
        assert shown["ranks"] == point["ranks"]
        assert sum(map(sum, shown["parts"].values())) == pytest.approx(point["corrected"], rel=1e-3)
        assert all(len(parts) == LAYERS for parts in shown["parts"].values())
    assert data["points"][8]["command"].startswith("a3 compress '</script>")
    assert data["measured"][1] == {
        "ratio": 0.3,
        "amounts": record["points"][12]["amounts"],
        "increase": 0.27,
        "stderr": 0.018,
    }
    assert [one["ratio"] for one in data["checks"]] == [0.2]


def test_only_rows_whose_ranks_are_all_allocated_have_one(tmp_path):
    rows = [
        ("fisher~", "joint~", "obs~", "0.1"),
        ("fisher~", "joint~", "obs~", "0.2"),
        ("dense", "joint~", "dense", "kv-cache@0.5"),
        ("rxx-w-rxx", "xkv", "rxx-w", "0.1"),
        ("fisher~", "joint~", "obs", "0.1"),
        ("fisher~", "joint~", "obs~@0.5", "0.1"),
    ]
    places = [Place("small", "wiki", *row) for row in rows]
    places += [Place("small"), Place("small", "wiki", *rows[0], quantise="w4a8+none")]
    found = frontiers(places, tmp_path, {"frontier": True})
    folder = tmp_path / "frontiers/small/wiki"
    names = ("fisher~+joint~+obs~", "dense+joint~+dense")
    assert found == [str(folder / f"{name}.json") for name in names]
    assert frontiers(places, tmp_path, {"frontier": False}) == []
