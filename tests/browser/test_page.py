"""The report in a real browser: light, dark and on a phone; `make test-report` starts these."""

import math

import pytest
from browser import LOOKS
from frontiers import frontier_record
from test_tables import TASKS, TEXTS, change, digest, experiment, write, write_results
from test_where import allocated
from tiny import run

from a3.core.files import read_record
from a3.report.figures.build import build_figures
from a3.report.page import build_report
from a3.report.tables.results import build_tables

METHODS = ("rxx-w-rxx+xkv+rxx-w", "rxx-w-rxx-uniform+axkv+rxx", "svd-llm+svd-llm+svd-llm")
RATIOS = ("0.1", "0.2", "0.4")
SEEDS = (0, 1)
LAYERS = 12
# Least contrast of text that WCAG 2 (AA) allows.
CONTRAST = 4.5
# Every element with text of its own: its contrast to the first background under it.
CONTRASTS = """
(() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => numbers(colour).slice(0, 3)
    .map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const under = element => {
    const colour = getComputedStyle(element).backgroundColor;
    return (numbers(colour)[3] ?? 1) > 0 ? colour : under(element.parentElement);
  };
  return [...document.querySelectorAll("main *")]
    .filter(element => [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .map(element => {
      const pair = [light(getComputedStyle(element).color), light(under(element))];
      return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    });
})()
"""


def made(results):
    """Results of three methods, three ratios and two calibration seeds, spectra and speed."""
    experiments = [
        experiment("small", *method.split("+"), ratio) | {"calibration": f"wiki-{seed}"}
        for seed in SEEDS
        for method in METHODS
        for ratio in RATIOS
    ]
    write_results(results, experiments)
    for index, one in enumerate(experiments):
        modes = "+".join(one[component] for component in ("qk", "ov", "mlp"))
        tail = f"small/{one['calibration']}/{modes}/{one['ratio']}"
        path = results / "checkpoints" / tail / "approx.json"
        approx = read_record(path)
        for record in approx["provenance"]["statistics"].values():
            record["seed"] = int(one["calibration"][-1])
        change(path, layers=approx["layers"][:1] * LAYERS, provenance=approx["provenance"])
        nll = [3.1 + float(one["ratio"]) * (1 + index % 5), 3.4 + float(one["ratio"])]
        mean = sum(nll) / 2
        scores = [(item * 7 + index) % 5 > 0 for item in range(60)]
        scored = {"block_nll": nll, "nll": mean, "perplexity": math.exp(mean)}
        change(results / "eval" / tail / "ppl/encyclopedia.json", **scored)
        change(results / "eval" / tail / "harness/titles.json", item_scores=scores)
        for kind in ("v_blocks", "down_diagonal"):
            timing = results / f"rxx/small/{one['calibration']}/{kind}.timing.json"
            write(timing, {"seconds": 1.0, "tokens_per_second": 1.0})
    curve = [0.5, 0.1, 0.0]
    for seed in SEEDS:
        record = {
            "full": dict.fromkeys(("qk", "ov", "mlp"), 12),
            "ranks": {key: [4, 8, 12] for key in ("qk", "ov", "mlp")},
            "lost": dict.fromkeys(("qk", "ov", "mlp"), [[curve, curve]] * LAYERS),
            "provenance": {"weights_sha256": digest("small")},
        }
        write(results / f"spectra/small/wiki-{seed}.json", record)
        frontier = results / f"frontiers/small/wiki-{seed}/fisher~+joint~+obs~.json"
        write(frontier, frontier_record(digest("small"), layers=LAYERS))
    return experiments


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    results = tmp_path_factory.mktemp("page") / "results"
    experiments = made(results)
    out = results / "tables" / "all"
    build_tables(results, experiments, TEXTS, TASKS, out, METHODS[0])
    (out / "speed.csv").write_text("model,phase,tokens/s\nsmall,prefill,1234.5\nsmall,decode,17\n")
    spectra = sorted(results.glob("spectra/small/*.json"))
    frontiers = sorted(results.glob("frontiers/small/*/*.json"))
    build_figures(results, experiments, TEXTS, TASKS, out / "figures", spectra, frontiers)
    inputs = (results, experiments, TEXTS, TASKS, out, {"experiments": "a.tsv"})
    build_report(*inputs, out / "report.html", METHODS[0], frontiers=frontiers)
    return out / "report.html"


@pytest.fixture(params=LOOKS)
def page(request, browser, report):
    """The report as one reader sees it; a picture of it lies beside it."""
    return browser.shown(report, request.param)


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """What happened to a model, as `a3 card --html` writes it."""
    work = allocated(tmp_path_factory.mktemp("card"))
    run("card", work / "small", "--html", work / "small.html")
    return work / "small.html"


@pytest.fixture(params=LOOKS)
def card_page(request, browser, card):
    """The page of a model as one reader sees it; a picture of it lies beside it."""
    return browser.shown(card, request.param)


def require_quiet(page, path):
    """Nothing went wrong, and nothing but the file was asked for."""
    assert page.said("Runtime.exceptionThrown") == []
    assert [entry["entry"]["text"] for entry in page.said("Log.entryAdded")] == []
    assert page.said("Runtime.consoleAPICalled") == []
    addresses = [event["request"]["url"] for event in page.said("Network.requestWillBeSent")]
    assert path.as_uri() in addresses
    assert [a for a in addresses if not a.startswith("data:")] == [path.as_uri()]


def test_nothing_is_wrong_and_nothing_is_fetched(page, report):
    require_quiet(page, report)


def test_what_happened_to_a_model_is_seen_everywhere(card_page, card):
    require_quiet(card_page, card)
    assert card_page.evaluate("document.documentElement.scrollWidth") <= card_page.width
    contrasts = card_page.evaluate(CONTRASTS)
    assert len(contrasts) > 50
    assert min(contrasts) >= CONTRAST
    # Every chart has room, and marks that are seen against the page.
    drawn = card_page.evaluate("""[...document.querySelectorAll('svg')].map(svg => {
        const all = [...svg.querySelectorAll('rect')].map(r => r.getBoundingClientRect().height);
        return [svg.getBoundingClientRect().width, Math.max(...all)];
    })""")
    assert len(drawn) == 9
    assert min(width for width, _ in drawn) > 200
    assert min(height for _, height in drawn) > 1
    fills = card_page.evaluate("""[...new Set([...document.querySelectorAll('rect')]
        .map(rect => getComputedStyle(rect).fill))]""")
    assert "rgb(0, 0, 0)" not in fills


def test_tables_and_figures_are_there(page):
    headings = page.evaluate("[...document.querySelectorAll('h2')].map(h => h.id)")
    assert headings == [
        *("results", "comparisons", "seeds", "frontiers", "figures", "speed"),
        *("timings", "protocol", "rebuild", "provenance"),
    ]
    rows = page.evaluate(
        "[...document.querySelectorAll('table')].map(t => t.tBodies[0].rows.length)"
    )
    runs = len(METHODS) * len(RATIOS) * len(SEEDS)
    compared = runs - len(RATIOS) * len(SEEDS)
    # One text and one task; two calibrations.
    assert rows[:-1] == [runs + 1, compared, len(METHODS) * len(RATIOS), 2, runs + 1, 2, 2]
    assert rows[-1] > 0
    widths = page.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    assert len(widths) == 7 + len(SEEDS)
    assert min(widths) > 0


def test_each_frontier_has_a_slider_of_its_own(page):
    assert page.evaluate("document.querySelectorAll('.frontier input[type=range]').length") == 2
    page.evaluate("""(() => {
        const slider = document.querySelectorAll(".frontier input[type=range]")[1];
        slider.value = 20;
        slider.dispatchEvent(new Event("input"));
    })()""")
    read = "[...document.querySelectorAll('.frontier output')].map(one => one.textContent)"
    assert page.evaluate(read) == ["0.2", "0.5"]
    command = "document.querySelectorAll('.frontier .command')[1].textContent"
    assert "a3 compress small --preset a3-plus --ratio 0.5 --text TEXT" in page.evaluate(command)


def test_a_click_sorts(page):
    heading = """[...document.querySelectorAll('table')[0].querySelectorAll('th button')]
        .find(button => button.textContent === 'encyclopedia Δ perplexity')"""
    column = f"""(() => {{
        const index = {heading}.parentElement.cellIndex;
        const body = document.querySelectorAll('table')[0].tBodies[0];
        return [...body.rows].map(row => row.cells[index].dataset.value);
    }})()"""
    before = page.evaluate(column)
    assert before[0] == ""  # the dense row has no distance to itself
    numbers = sorted(float(value) for value in before[1:])
    assert [float(value) for value in before[1:]] != numbers
    for order in (numbers, numbers[::-1]):
        page.evaluate(f"{heading}.click()")
        *found, last = page.evaluate(column)
        assert last == ""
        assert [float(value) for value in found] == order


def test_the_page_is_no_wider_than_the_screen(page):
    """Held to the screen and not to innerWidth: a phone zooms out until all of a page fits."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.width
    outside = page.evaluate(f"""[...document.querySelectorAll('main > *')]
        .filter(element => element.getBoundingClientRect().right > {page.width})
        .map(element => element.outerHTML.slice(0, 80))""")
    assert outside == []


def test_text_is_told_from_its_background(page):
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert min(contrasts) >= CONTRAST


def test_dark_is_dark_and_figures_keep_their_paper(page, browser):
    dark = browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
    paper = browser.evaluate("getComputedStyle(document.querySelector('.paper')).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
