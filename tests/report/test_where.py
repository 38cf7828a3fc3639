"""Where a model's loss sits and why: the allocation's record, the page of a folder, the figure."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny import run, tiny_llama

from a3.cli.main import main
from a3.core.files import read_record
from a3.report.figures.drawing import save_figure, styled
from a3.report.figures.losses import losses_drawing
from a3.report.happened import loss_charts, marginal_charts
from a3.report.labels import legend_label, legend_title, named
from a3.report.where import Part, ceiling, parts_of
from a3.solutions.modes import COMPONENTS, PRESETS
from a3.stages.approx.budget import Curve
from a3.stages.approx.explain import explained


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return allocated(tmp_path_factory.mktemp("where"))


def allocated(work):
    """An allocation, the folder made from it, and one made without."""
    dense = tiny_llama(work / "dense", intermediate_size=32)
    (work / "text.txt").write_text("A river moves towards an ocean, or a lake. " * 60)
    cut = ["--tokens", "256", "--block-length", "64"]
    run("text", work / "text.txt", "-o", work / "docs.jsonl")
    kinds = ("q_blocks", "k_blocks", "pair_gradient", "o_proj_input", "attention_gradient")
    kinds += ("down_input", "mlp_gradient")
    files = [work / "rxx" / f"{kind}.safetensors" for kind in kinds]
    run("collect", dense, "--text", work / "docs.jsonl", *cut, "-o", *files)
    row = ["--rxx", work / "rxx", "--preset", "a3-plus", "--ratio", "0.3"]
    run("allocate", dense, *row, "-o", work / "ranks.json")
    run("approx", dense, *row, "--allocation", work / "ranks.json", "-o", work / "small")
    flat = ["--qk", "fisher", "--ov", "joint", "--mlp", "obs", "--ratio", "0.3"]
    run("approx", dense, "--rxx", work / "rxx", *flat, "-o", work / "flat")
    return work


def test_an_allocation_says_why_and_approx_keeps_it(work):
    allocation = read_record(work / "ranks.json")
    record = read_record(work / "small" / "approx.json")
    found = [why for own in allocation["explained"].values() for why in own]
    for key, known in (("loss", "predicted_nll"), ("loss_even", "predicted_nll_uniform")):
        assert sum(why[key] for why in found) == pytest.approx(allocation[known])
    for layer, report in enumerate(record["layers"]):
        for component in COMPONENTS:
            why = report[component]["predicted"]
            assert why == allocation["explained"][component][layer]
            full = record["base"]["intermediate_size" if component == "mlp" else "head_dim"]
            assert (why["more_saves"] is None) == (report[component]["rank"] == full)
            if why["more_saves"] is not None and why["less_costs"] is not None:
                assert 0 <= why["more_saves"] <= 1.5 * why["less_costs"]
    assert "predicted" not in read_record(work / "flat" / "approx.json")["layers"][0]["qk"]


def test_the_page_shows_sizes_losses_and_reasons(work, tmp_path):
    run("card", work / "small", "--html", tmp_path / "small.html")
    page = (tmp_path / "small.html").read_text()
    allocation = read_record(work / "ranks.json")
    size = read_record(work / "small" / "approx.json")["size"]
    removed = 1 - size["compressed"]["parameters"] / size["dense"]["parameters"]
    for said in (
        "What happened to dense",
        f"{100 * removed:.1f} % of its parameters are gone",
        "modes: a3-plus",
        f"{size['compressed']['kv_bytes_per_token']:,}",
        f"{allocation['predicted_nll_uniform']:.3f} in all",
        f"{allocation['predicted_nll']:.3f} as it was allocated",
        "Why these sizes",
    ):
        assert said in page
    assert page.count("<svg") == 9
    # Nothing is fetched.
    assert "http:" not in page
    assert "https:" not in page
    assert "src=" not in page
    assert str(work) not in page


def test_without_an_allocation_the_page_shows_errors(work, tmp_path):
    run("card", work / "flat", "--html", tmp_path / "flat.html")
    page = (tmp_path / "flat.html").read_text()
    assert page.count("<svg") == 6
    assert "Where the error sits" in page
    assert "Why these sizes" not in page
    assert "the same ratio everywhere" not in page


def test_a_page_is_refused_in_one_line(work, tmp_path, capsys):
    folder = shutil.copytree(work / "flat", tmp_path / "flat")
    page = tmp_path / "flat.html"
    page.write_text("mine")
    for words, said in (
        ([folder, "--html", page], "exists already"),
        ([folder, "--html", tmp_path / "page.htm"], "ends in .html"),
        ([folder, "--html", folder / "page.html"], "lies in"),
        ([work / "dense", "--html", tmp_path / "a.html"], "a dense model"),
    ):
        assert main(["card", *map(str, words)]) == 1
        assert said in capsys.readouterr().err
    for name in ("approx.json", ".a3.json"):
        (folder / name).unlink()
    assert main(["card", str(folder), "--html", str(tmp_path / "a.html")]) == 1
    assert "no approx.json" in capsys.readouterr().err


def part(**values) -> Part:
    empty = dict.fromkeys(("loss", "loss_even", "more_saves", "less_costs", "errors"), [None] * 3)
    return Part("QK", "qk", [1.0, 0.5, 0.25], 0.75, **empty | values)


def test_charts_cut_far_values_off_and_leave_ends_open():
    assert ceiling([[0.1] * 19 + [9.0]]) == pytest.approx(0.4)
    assert ceiling([[0.1, 0.2, None]]) == 0.2
    assert ceiling([[None]]) == 0
    far = part(loss=[0.1] * 3, loss_even=[0.1, 0.1, 0.1])
    (chart,) = loss_charts([far])
    assert {mark.height for mark in chart.marks} == {100}
    ends = part(loss=[0.1] * 3, more_saves=[None, 1.0, 4.0], less_costs=[8.0, 2.0, None])
    (chart,) = marginal_charts([ends])
    whole, some, least = chart.marks
    assert (whole.look, some.look, least.look) == ("open", "after", "open")
    assert whole.y == 0
    assert least.y + least.height == 100
    assert some.y < chart.line < some.y + some.height
    assert ends.price == pytest.approx(2**0.5)


def test_a_step_is_priced_by_its_parameters():
    costs = {"parameters": torch.tensor([20.0, 10.0])}
    curve = Curve(("mlp",), ((0, None),), torch.tensor([2, 1]), torch.tensor([0.0, 1.0]), costs)
    (why,) = explained([curve], {"mlp": [1]}, [2])["mlp"]
    assert why == {"loss": 1.0, "loss_even": 0.0, "more_saves": 1e5, "less_costs": None}


def test_the_figure_has_a_line_for_each_allocated_run(work, tmp_path):
    dense = SimpleNamespace(place=SimpleNamespace(model="tiny"))
    runs = [
        SimpleNamespace(
            weights=SimpleNamespace(data=(record := read_record(work / name / "approx.json"))),
            layers=record["layers"],
            place=SimpleNamespace(model="tiny", method=method, ratio="0.3", calibration="c"),
            size={"parameters": 1},
        )
        for name, method in (("small", "fisher~+joint~+obs~"), ("flat", "fisher+joint+obs"))
    ]
    with styled():
        assert losses_drawing(dense, runs[1:]) is None
        drawing = losses_drawing(dense, runs)
        save_figure(drawing.figure, tmp_path / "losses.svg", "svg")
    drawn = (tmp_path / "losses.svg").read_text()
    assert "<!-- a3-plus  0.3 -->" in drawn
    assert "fisher + joint" not in drawn
    assert "<!-- MLP: what the next rank costs -->" in drawn


def test_methods_are_named_by_their_presets():
    for name, modes in PRESETS.items():
        method = "+".join(modes[one] for one in COMPONENTS)
        assert named(method) == name
        assert legend_label(f"{method}+heal-quick") == f"{name} + heal-quick"
    other = "rxx-w-rxx+xkv+obs"
    assert legend_label(other) == "rxx-w-rxx + xkv + obs"
    assert legend_title(["modegpt+modegpt+modegpt"]) == "preset"
    assert legend_title([other]) == "QK + OV + MLP"
    assert legend_title([other, "svd+svd+svd"]) == "preset, or QK + OV + MLP"


def test_experts_of_a_layer_are_joined():
    layer = {"mlp": {"rank": 3, "expert_ranks": [2, 4], "relative_error": 0.1}}
    base = {"intermediate_size": 4, "head_dim": 8, "experts": 2}
    record = {"layers": [layer], "base": base, "modes": {"mlp": "obs~@0.25"}}
    (found,) = parts_of(json.loads(json.dumps(record)))
    assert found.kept == [0.75]
    assert found.even == 0.75
