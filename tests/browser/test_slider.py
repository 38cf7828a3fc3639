"""The panel of a frontier in a real browser: the slider moves what is read and the bars."""

import pytest
from browser import LOOKS
from frontiers import FULL, LAYERS, RATIOS, frontier_record
from test_page import CONTRAST, CONTRASTS

from a3.core.files import write_record
from a3.report.frontiers import frontier_page

HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
# What a panel shows: the readout by its names, the command, and the heights of all bars in percent.
SHOWN = """({
  slider: Number(document.querySelector("input[type=range]").value),
  spoken: document.querySelector("input[type=range]").getAttribute("aria-valuetext"),
  ratio: document.querySelector("output").textContent,
  read: Object.fromEntries([...document.querySelectorAll("dl > div")].map(cell =>
    [cell.querySelector("dt").textContent, cell.querySelector("dd").innerText.split("\\n")])),
  command: document.querySelector(".command").textContent,
  ranks: [...document.querySelectorAll(".bars.ranks")].map(row =>
    [...row.querySelectorAll("b")].map(bar => parseFloat(bar.style.height))),
  losses: [...document.querySelectorAll(".bars.losses")].map(row =>
    [...row.querySelectorAll("b")].map(bar => parseFloat(bar.style.height))),
  said: [...document.querySelectorAll(".said")].map(line => line.textContent),
  titles: [...document.querySelectorAll(".bars i")].map(bar => bar.title),
  marker: document.querySelector("circle.here")?.getAttribute("cx") ?? null,
})"""
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slider")
    write_record(folder / "frontier.json", frontier_record("w"))
    frontier_page(folder / "frontier.json", HOSTILE, "my text.txt", folder / "page.html")
    return folder / "page.html"


@pytest.fixture(params=LOOKS)
def page(request, browser, written):
    """The page as one reader sees it; a picture of it lies beside it."""
    return browser.shown(written, request.param)


@pytest.fixture
def light(browser, written):
    browser.look(*LOOKS["light"])
    browser.open(written)
    return browser


def press(browser, key):
    """A key of the keyboard, wherever the focus is."""
    for kind in ("rawKeyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key]
        )


def clean(browser):
    return (
        browser.said("Runtime.exceptionThrown")
        + browser.said("Log.entryAdded")
        + browser.said("Runtime.consoleAPICalled")
    )


def test_it_is_readable_and_fetches_nothing(page, written):
    assert clean(page) == []
    asked = [event["request"]["url"] for event in page.said("Network.requestWillBeSent")]
    assert asked == [written.as_uri()]
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('script, img').length") == 2
    assert HOSTILE in page.evaluate("document.querySelector('h1').textContent")
    assert page.evaluate("document.documentElement.scrollWidth") <= page.width
    drawn = page.evaluate("document.querySelector('.chart svg').getBoundingClientRect().width")
    assert 300 < drawn <= page.width
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 60
    assert min(contrasts) >= CONTRAST


def test_it_starts_at_a_fifth(light):
    shown = light.evaluate(SHOWN)
    assert (shown["slider"], shown["ratio"]) == (8, "0.2")
    assert shown["read"] == {
        "parameters": ["800.0 k", "80.0 %"],
        "KV cache": ["80.0 %", "400 numbers"],
        "FLOPs a token": ["1.6 M", "80.0 %"],
        "file": ["3.2 MB", "80.0 %"],
        "loss": ["0.120 nats", "predicted 0.080"],
        "perplexity": ["× 1.13", "of the dense model's"],
        "measured": ["0.128 nats", "± 0.0080"],
    }
    assert shown["command"].endswith(
        "--preset a3-plus --ratio 0.2 --text 'my text.txt' --tokens 4096 --block-length 64 --seed 3"
        " -o small"
    )
    assert shown["spoken"] == "ratio 0.2: 800.0 k parameters, 0.120 nats"


def test_the_keyboard_moves_it(light):
    labels = "[...document.querySelector('input[type=range]').labels].map(l => l.innerText)"
    (label,) = light.evaluate(labels)
    assert label.startswith("Ratio: the share to remove")
    light.evaluate("document.querySelector('input[type=range]').focus()")
    before = light.evaluate(SHOWN)
    press(light, "ArrowRight")
    after = light.evaluate(SHOWN)
    assert (after["slider"], after["ratio"]) == (9, "0.225")
    assert "--ratio 0.225 " in after["command"]
    assert after["read"]["measured"] == ["–", "not at this ratio"]
    assert float(after["marker"]) > float(before["marker"])
    press(light, "End")
    end = light.evaluate(SHOWN)
    assert end["ratio"] == "0.5"
    record = frontier_record("w")["points"][-1]
    for row, (component, full) in zip(end["ranks"], FULL.items(), strict=True):
        expected = [100 * rank / full for rank in record["ranks"][component]]
        assert row == pytest.approx(expected, abs=1e-3)
    # The last layer of each loses most, so its bar is full; the first a sixth of that.
    assert end["losses"] == [pytest.approx([100 * i / 6 for i in range(1, 7)], abs=0.1)] * 3
    assert end["said"][:2] == [
        "Rank kept: 8 to 15, mean 11.3, of 16",
        "Loss: 0.250 nats, most in layer 5 (0.071)",
    ]
    assert end["titles"][0] == "layer 0: 15 of 16"
    assert len(end["titles"]) == 2 * 3 * LAYERS
    press(light, "Home")
    start = light.evaluate(SHOWN)
    assert start["ratio"] == "0"
    assert start["command"] == "the dense model: nothing to do"
    assert {height for row in start["ranks"] for height in row} == {100}
    assert {height for row in start["losses"] for height in row} == {0}
    assert start["marker"] is None  # a logarithm has no place for it
    press(light, "ArrowLeft")
    assert light.evaluate(SHOWN)["ratio"] == "0"
    assert clean(light) == []


def test_a_click_on_the_curve_moves_it(light):
    box = light.evaluate(
        "(({ left, right, top, height }) => [left, right, top + height / 2])"
        "(document.querySelector('.chart').getBoundingClientRect())"
    )
    left, right, middle = box
    for x, ratio in ((right - 60, RATIOS[-1]), (left + 50, RATIOS[0])):
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": x, "y": middle, "button": "left", "clickCount": 1}
            light.call("Input.dispatchMouseEvent", type=kind, **where)
        assert float(light.evaluate(SHOWN)["ratio"]) == ratio


def test_the_curve_is_over_what_is_chosen(light):
    title = "[...document.querySelectorAll('.chart text')].map(text => text.textContent)"
    assert "parameters kept, of the dense model's" in light.evaluate(title)
    names = "[...document.querySelectorAll('fieldset label')].map(label => label.innerText)"
    assert light.evaluate(names) == ["parameters", "KV cache", "FLOPs a token", "file"]
    light.evaluate("document.querySelectorAll('fieldset input')[1].click()")
    assert "KV cache kept, of the dense model's" in light.evaluate(title)
    circles = "[...document.querySelectorAll('.chart circle')].map(one => one.classList[0])"
    assert light.evaluate(circles) == [*3 * ["measured"], "checks", "here"]
    assert clean(light) == []
