import csv
import hashlib
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from a3.core.errors import A3Error
from a3.core.files import SEAL, read_record, write_record
from a3.report.figures.build import build_figures
from a3.report.figures.drawing import name_clips
from a3.report.page import build_report
from a3.report.tables.frames import print_table
from a3.report.tables.results import build_tables

TEXTS, TASKS = ["encyclopedia"], ["titles"]
DENSE_NLL = [3.0, 3.2]
COMPRESSED_NLL = [3.1, 3.5]  # differences 0.1 and 0.3: mean 0.2, its standard error 0.1
MADE = {"code": "0123456789abcdef", "libraries": {"torch": "2.13.0"}}


def digest(*names):
    return hashlib.sha256("/".join(names).encode()).hexdigest()


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, value)


def change(path, **values):
    write(path, {k: v for k, v in (read_record(path) | values).items() if k != SEAL})


def size(share):
    parameters = round(1_000_000 * share)
    return {"parameters": parameters, "kv_bytes_per_token": 512, "flops_per_token": parameters * 2}


def write_evaluation(folder, weights, nll, value):
    perplexity = math.exp(sum(nll) / len(nll))
    write(
        folder / "ppl" / "encyclopedia.json",
        {
            "text": "encyclopedia",
            "split": "test",
            "source": "who/text@0123, test",
            "text_sha256": digest("text"),
            "join": "empty-line",
            "block_length": 1024,
            "stride": 1024,
            "bos": True,
            "dtype": "float32",
            "blocks": len(nll),
            "tokens_scored": 1023 * len(nll),
            "token_ids_sha256": digest("ids"),
            "bytes_scored": 4096 * len(nll),
            "bits_per_byte": 1023 / 4096 * sum(nll) / len(nll) / math.log(2),
            "nll": sum(nll) / len(nll),
            "perplexity": perplexity,
            "perplexity_stderr": 0.5,
            "block_nll": nll,
            "checkpoint_sha256": weights,
            "provenance": {"stage": "evaluate", **MADE},
        },
    )
    write(
        folder / "harness" / "titles.json",
        {
            "metric": "acc",
            "value": value,
            "stderr": 0.05,
            "items": 60,
            "higher_is_better": True,
            "item_measure": None,
            "item_scores": None,
            "shots": 0,
            "apply_chat_template": False,
            "fewshot_as_multiturn": False,
            "system_instruction": None,
            "task_hash": digest("task"),
            "prompts_sha256": digest("prompts"),
            "lm_eval": "0.4.13",
            "checkpoint_sha256": weights,
            "provenance": {"stage": "evaluate", **MADE},
        },
    )
    speed = {"seconds": 4.0, "tokens_per_second": 512.0}
    write(folder / "ppl" / "encyclopedia.timing.json", speed)
    write(folder / "harness" / "titles.timing.json", {"seconds": 7.0})


def write_model(results, model):
    write(
        results / "models" / model / "arch.json",
        {
            "kv_heads": 2,
            "rope_dims": 8,
            "weights_sha256": digest(model),
            "size": size(1.0),
        },
    )
    write_evaluation(results / "eval" / model / "dense", digest(model), DENSE_NLL, 0.75)
    for kind in ("v_blocks", "down_diagonal"):
        speed = {"seconds": 10.0, "tokens_per_second": 100.0}
        write(results / "rxx" / model / "wiki" / f"{kind}.timing.json", speed)


def layer(modes):
    components = {
        "qk": {"rank": 6, "relative_error": 0.001, "rope_pairs": [[0, 1, 3], [0, 2, 3]]},
        "ov": {"rank": 6, "relative_error": 0.2},
        "mlp": {"rank": 12, "relative_error": 0.05},
    }
    return {
        component: components[component] for component, mode in modes.items() if mode != "dense"
    }


def write_checkpoint(results, experiment):
    model, ratio = experiment["model"], experiment["ratio"]
    modes = {component: experiment[component] for component in ("qk", "ov", "mlp")}
    tail = Path(model, experiment["calibration"], "+".join(modes.values()), ratio)
    weights = digest(tail.as_posix())
    kinds = {"v_blocks": modes["qk"] + modes["ov"], "down_diagonal": modes["mlp"]}
    statistics = {
        kind: {"stage": "collect", **MADE, "kind": kind, "tokens": 32768, "seed": 0}
        for kind, used in kinds.items()
        if used not in ("dense", "densedense")
    }
    if "fwsvd" in modes.values():
        record = {"stage": "collect", **MADE, "kind": "down_fisher", "tokens": 32768, "seed": 0}
        statistics = {"down_fisher": record}
    if "fisher" in modes.values():  # gradients are of a share of the blocks
        record = {"stage": "collect", **MADE, "kind": "pair_gradient", "tokens": 8192, "seed": 0}
        statistics["pair_gradient"] = record
    removed = 0.25 if ratio == "-" else float(ratio)
    share = 1 - removed * sum(mode != "dense" for mode in modes.values()) / 3
    layers = [layer(modes)] * 3
    write(
        results / "checkpoints" / tail / "approx.json",
        {
            "base": {"weights_sha256": digest(model)},
            "modes": modes,
            "layers": layers,
            "size": {"dense": size(1.0), "compressed": size(share)},
            "weights_sha256": weights,
            "provenance": {"stage": "approximate", **MADE, "statistics": statistics},
        },
    )
    spent = [dict.fromkeys(components, 0.5) for components in layers]
    write(results / "checkpoints" / tail / "timing.json", {"seconds": 4.5, "layers": spent})
    write_evaluation(results / "eval" / tail, weights, COMPRESSED_NLL, 0.70)


def experiment(model, qk="rxx-w-rxx", ov="xkv", mlp="rxx-w", ratio="0.2"):
    return dict(model=model, calibration="wiki", qk=qk, ov=ov, mlp=mlp, ratio=ratio)


def write_results(results, experiments):
    for model in {each["model"] for each in experiments}:
        write_model(results, model)
    for each in experiments:
        write_checkpoint(results, each)


@pytest.fixture
def results(tmp_path):
    write_results(tmp_path / "results", [experiment("small")])
    return tmp_path / "results"


EVALUATED = Path("eval/small/wiki/rxx-w-rxx+xkv+rxx-w/0.2")
CHECKPOINT = Path("checkpoints/small/wiki/rxx-w-rxx+xkv+rxx-w/0.2")


def table(results, experiments, name="out"):
    out = results / "tables" / name
    build_tables(results, experiments, TEXTS, TASKS, out)
    return out


def rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


# --- tables ---


def test_values(results):
    dense, row = rows(table(results, [experiment("small")]) / "results.csv")
    assert float(dense["encyclopedia.perplexity"]) == math.exp(3.1)
    assert float(row["encyclopedia.perplexity"]) == math.exp(3.3)
    assert float(row["encyclopedia.perplexity_delta"]) == math.exp(3.3) - math.exp(3.1)
    assert float(row["encyclopedia.nll_delta"]) == pytest.approx(0.2, rel=1e-12)
    assert float(row["encyclopedia.nll_delta_stderr"]) == pytest.approx(0.1, rel=1e-12)
    assert float(row["titles.value_delta"]) == pytest.approx(-0.05)
    assert row["parameters"] == "800000"
    assert float(row["parameters_ratio"]) == 0.8
    assert float(row["kv_bytes_per_token_ratio"]) == 1
    assert row["calibration_tokens"] == "32768"
    assert dense["calibration_tokens"] == ""
    assert row["encyclopedia.tokens_scored"] == "2046"
    assert (row["titles.items"], row["titles.shots"]) == ("60", "0")
    assert row["encyclopedia.bos"] == "True"


def test_gradients_are_of_a_share_of_the_tokens(tmp_path):
    experiments = [experiment("small", qk="fisher", mlp="obs~")]
    write_results(tmp_path, experiments)
    shared = tmp_path / "allocations/small/wiki/fisher+xkv+obs~"
    write(shared / "0.2.timing.json", {"seconds": 3.0})
    losses = tmp_path / "losses/small/wiki/fisher+dense+obs"
    for shard in ("0of1", "0of2", "1of2"):
        write(losses / f"{shard}.timing.json", {"seconds": 2.0})
    speed = {"seconds": 5.0, "tokens_per_second": 100.0}
    write(tmp_path / "rxx" / "small" / "wiki" / "pair_gradient.timing.json", speed)
    out = table(tmp_path, experiments)
    assert rows(out / "results.csv")[1]["calibration_tokens"] == "32768"
    assert float(rows(out / "timings.csv")[1]["rxx pair_gradient.seconds"]) == 5.0
    assert float(rows(out / "timings.csv")[1]["allocate.seconds"]) == 3.0
    assert float(rows(out / "timings.csv")[1]["losses.seconds"]) == 4.0


def test_gradients_of_weights_are_of_all_tokens(tmp_path):
    experiments = [experiment("small", qk="dense", ov="dense", mlp="fwsvd")]
    write_results(tmp_path, experiments)
    speed = {"seconds": 5.0, "tokens_per_second": 100.0}
    write(tmp_path / "rxx" / "small" / "wiki" / "down_fisher.timing.json", speed)
    assert rows(table(tmp_path, experiments) / "results.csv")[1]["calibration_tokens"] == "32768"


def test_each_models_dense_row_comes_first(tmp_path):
    experiments = [
        experiment("b", ratio="0.4"),
        experiment("a", ratio="0.2"),
        experiment("b", ratio="0.1"),
    ]
    write_results(tmp_path, experiments)
    found = rows(table(tmp_path, experiments) / "results.csv")
    expected = [("b", "0"), ("b", "0.4"), ("b", "0.1"), ("a", "0"), ("a", "0.2")]
    assert [(row["model"], row["ratio"]) for row in found] == expected


def test_a_row_may_leave_components_dense(tmp_path):
    alone = experiment("small", qk="dense", ov="dense")
    write_results(tmp_path, [alone])
    out = table(tmp_path, [alone])
    dense, row = rows(out / "results.csv")
    assert (dense["mlp"], row["mlp"]) == ("dense", "rxx-w")
    seconds = rows(out / "timings.csv")[1]
    assert "approx qk.seconds" not in seconds
    assert seconds["approx mlp.seconds"] == "1.5"
    assert "rxx v_blocks.seconds" not in seconds


def test_seconds_live_apart(results):
    out = table(results, [experiment("small")])
    before = (out / "results.csv").read_bytes()
    dense, row = rows(out / "timings.csv")
    assert row["approx.seconds"] == "4.5"
    assert row["rxx v_blocks.tokens_per_second"] == "100.0"
    assert dense["rxx v_blocks.seconds"] == ""
    assert dense["harness titles.seconds"] == "7.0"
    change(results / EVALUATED / "ppl" / "encyclopedia.timing.json", seconds=5.0)
    table(results, [experiment("small")])
    assert (out / "results.csv").read_bytes() == before
    assert rows(out / "timings.csv")[1]["perplexity encyclopedia.seconds"] == "5.0"


def test_markdown_is_rounded_and_keeps_its_columns(tmp_path):
    odd = experiment("a|b")
    write_results(tmp_path, [odd])
    lines = print_table(table(tmp_path, [odd])).splitlines()
    cells = [cell.strip() for cell in lines[3].replace("\\|", "¦").strip("|").split("|")]
    assert cells[:3] == ["a¦b", "rxx-w-rxx + xkv + rxx-w", "0.2"]
    assert cells[3:6] == ["27.11 ± 0.50", "+4.91", "+0.2000 ± 0.1000"]
    assert cells[6:9] == ["1.1891", "0.700 ± 0.050", "-0.050"]
    assert len({line.replace("\\|", "").count("|") for line in lines[:4]}) == 1


def test_one_block_has_no_paired_error(tmp_path):
    write_results(tmp_path, [experiment("small")])
    for folder, weights in (
        (EVALUATED, digest(CHECKPOINT.relative_to("checkpoints").as_posix())),
        (Path("eval/small/dense"), digest("small")),
    ):
        write_evaluation(tmp_path / folder, weights, [3.0], 0.7)
        change(tmp_path / folder / "ppl" / "encyclopedia.json", perplexity_stderr=None)
    row = rows(table(tmp_path, [experiment("small")]) / "results.csv")[1]
    assert row["encyclopedia.nll_delta_stderr"] == ""
    assert row["encyclopedia.perplexity_stderr"] == ""


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ("ppl/encyclopedia.json", "block_length", 2048),
        ("ppl/encyclopedia.json", "stride", 512),
        ("ppl/encyclopedia.json", "bos", False),
        ("ppl/encyclopedia.json", "dtype", "bfloat16"),
        ("ppl/encyclopedia.json", "split", "dev"),
        ("ppl/encyclopedia.json", "text_sha256", "0" * 64),
        ("ppl/encyclopedia.json", "blocks", 3),
        ("ppl/encyclopedia.json", "tokens_scored", 2048),
        ("ppl/encyclopedia.json", "join", "space"),
        ("ppl/encyclopedia.json", "source", "who/text@4567, test"),
        ("ppl/encyclopedia.json", "token_ids_sha256", "0" * 64),
        ("harness/titles.json", "items", 61),
        ("harness/titles.json", "task_hash", "0" * 64),
        ("harness/titles.json", "shots", 5),
        ("harness/titles.json", "metric", "acc_norm"),
        ("harness/titles.json", "lm_eval", "0.4.12"),
    ],
)
def test_protocols_are_never_mixed(results, path, key, value):
    change(results / EVALUATED / path, **{key: value})
    with pytest.raises(A3Error) as error:
        table(results, [experiment("small")])
    for said in (
        str(results / EVALUATED / path),
        str(results / "eval/small/dense" / path),
        f"{key} is {value!r}",
    ):
        assert said in str(error.value)
    assert not (results / "tables").exists()


@pytest.mark.parametrize(
    ("result", "weights"),
    [
        (EVALUATED / "ppl/encyclopedia.json", CHECKPOINT / "approx.json"),
        (EVALUATED / "harness/titles.json", CHECKPOINT / "approx.json"),
        (Path("eval/small/dense/ppl/encyclopedia.json"), Path("models/small/arch.json")),
    ],
)
def test_refuses_results_of_other_weights(results, result, weights):
    change(results / result, checkpoint_sha256="f" * 64)
    with pytest.raises(A3Error) as error:
        table(results, [experiment("small")])
    assert str(results / result) in str(error.value)
    assert str(results / weights) in str(error.value)


def test_refuses_a_checkpoint_of_another_model(results):
    change(results / CHECKPOINT / "approx.json", base={"weights_sha256": "f" * 64})
    with pytest.raises(A3Error, match="made from another model"):
        table(results, [experiment("small")])


def test_names_the_missing_file_or_key(results):
    change(results / CHECKPOINT / "approx.json", size={})
    with pytest.raises(A3Error, match=r"approx\.json.*size\.compressed"):
        table(results, [experiment("small")])
    (results / EVALUATED / "harness" / "titles.json").unlink()
    with pytest.raises(A3Error, match=r"harness/titles\.json"):
        table(results, [experiment("small")])


def write_fit(results, tail, predicted, dev):
    """The loss of one row on calibration and dev text."""

    def said(increase):
        return {"increase": increase, "stderr": 0.01, "blocks": 4}

    path = results / "eval" / tail / "fit" / "blocks.json"
    weights = digest(Path(tail).as_posix())
    record = {"predicted": predicted, "calibration": said(0.172), "dev": said(dev)}
    write(path, record | {"checkpoint_sha256": weights, "provenance": {"stage": "fit", **MADE}})
    write(path.with_suffix(".timing.json"), {"seconds": 3.0})


def test_the_loss_on_calibration_and_dev_text(tmp_path):
    experiments = [experiment("small"), experiment("small", qk="modegpt")]
    write_results(tmp_path, experiments)
    for qk, predicted in (("rxx-w-rxx", 0.16), ("modegpt", None)):
        write_fit(tmp_path, f"small/wiki/{qk}+xkv+rxx-w/0.2", predicted, 0.402)
    plain = table(tmp_path, experiments, "plain")
    assert "fit." not in (plain / "results.csv").read_text()
    assert "overfitted" not in (plain / "results.md").read_text()
    out = tmp_path / "tables/out"
    build_tables(tmp_path, experiments, TEXTS, TASKS, out, fit=True)
    dense, first, second = rows(out / "results.csv")
    assert dense["fit.predicted"] == dense["fit.dev"] == ""
    found = [first[f"fit.{key}"] for key in ("predicted", "calibration", "dev", "dev_stderr")]
    assert found == ["0.16", "0.172", "0.402", "0.01"]
    assert (first["fit.overfitted"], second["fit.overfitted"]) == ("True", "False")
    assert rows(out / "timings.csv")[1]["fit.seconds"] == "3.0"
    text = (out / "results.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()[:5]]
    place = cells[0].index("predicted Δ nll")
    assert cells[0][place : place + 3] == ["predicted Δ nll", "calibration Δ nll", "dev Δ nll"]
    assert [line[place : place + 3] for line in cells[2:]] == [
        ["–", "–", "–"],
        ["+0.1600", "+0.1720 ± 0.0100", "+0.4020 ± 0.0100 !"],
        ["–", "+0.1720 ± 0.0100", "+0.4020 ± 0.0100"],
    ]
    assert "! marks a dev loss of more than twice the predicted one" in text
    build_figures(tmp_path, experiments, TEXTS, TASKS, out / "figures")
    build_report(tmp_path, experiments, TEXTS, TASKS, out, {}, out / "report.html", fit=True)
    page = Page((out / "report.html").read_text())
    assert "+0.4020 ± 0.0100 !" in page.text
    assert "! marks a dev loss of more than twice the predicted one" in page.text
    assert "rxx-w-rxx+xkv+rxx-w/0.2/fit/blocks.json" in page.text
    change(tmp_path / EVALUATED / "fit/blocks.json", checkpoint_sha256="f" * 64)
    with pytest.raises(A3Error, match="taken from other weights"):
        build_tables(tmp_path, experiments, TEXTS, TASKS, out, fit=True)


def test_second_build_is_byte_identical(results):
    built = []
    for name in ("one", "two"):
        out = table(results, [experiment("small")], name)
        build_figures(results, [experiment("small")], TEXTS, TASKS, out / "figures")
        files = sorted(path for path in out.rglob("*") if path.is_file())
        built.append({path.relative_to(out): path.read_bytes() for path in files})
    assert len(built[0]) == 5 + 5 * 2 + 1
    assert built[0] == built[1]


# --- figures ---


def figure_names(results, experiments):
    out = results / "figures"
    shutil.rmtree(out, ignore_errors=True)  # as Snakemake does
    build_figures(results, experiments, TEXTS, TASKS, out)
    listed = [each["name"] for each in json.loads((out / "captions.json").read_text())]
    files = {path.stem for path in out.iterdir() if path.suffix in (".svg", ".png")}
    assert files == set(listed)
    return listed


def test_figures_of_each_model(tmp_path):
    experiments = [experiment("a"), experiment("b", qk="dense", ratio="0.4")]
    write_results(tmp_path, experiments)
    assert figure_names(tmp_path, experiments) == [
        *("perplexity-a", "harness-a", "layer-error-a", "rope-pairs-a", "rope-groups-a"),
        *("perplexity-b", "harness-b", "layer-error-b"),  # QK is dense: no pairs to show
    ]


def test_figures_take_wide_ranges_many_methods_and_perfect_layers(tmp_path):
    experiments = [
        experiment("a", qk=f"mode{i}", ratio=ratio) for i in range(8) for ratio in ("0.1", "0.4")
    ]
    write_results(tmp_path, experiments)
    worst = tmp_path / "eval/a/wiki/mode0+xkv+rxx-w/0.4/ppl/encyclopedia.json"
    change(worst, perplexity=2e4)
    approx = tmp_path / "checkpoints/a/wiki/mode0+xkv+rxx-w/0.4/approx.json"
    layers = json.loads(approx.read_text())["layers"]
    layers[0]["qk"]["relative_error"] = 0.0
    change(approx, layers=layers)
    assert len(figure_names(tmp_path, experiments)) == 5


def test_groups_are_drawn_one_by_one_where_they_are_few_and_differ(tmp_path):
    write_results(tmp_path, [experiment("a")])
    assert "rope-groups-a" in figure_names(tmp_path, [experiment("a")])
    approx = tmp_path / CHECKPOINT.parents[3] / "a/wiki/rxx-w-rxx+xkv+rxx-w/0.2/approx.json"
    layers = json.loads(approx.read_text())["layers"]
    for count, alike in ((9, False), (10, False), (2, True)):
        change(tmp_path / "models/a/arch.json", kv_heads=count)
        groups = [[0, 1, 2 if alike or group else 3] for group in range(count)]
        change(
            approx,
            layers=[layer | {"qk": layer["qk"] | {"rope_pairs": groups}} for layer in layers],
        )
        found = figure_names(tmp_path, [experiment("a")])
        assert ("rope-groups-a" in found) == (count == 9)
        assert "rope-pairs-a" in found


def test_svg_has_no_date_and_no_version(results):
    figure_names(results, [experiment("small")])
    text = (results / "figures" / "perplexity-small.svg").read_text()
    assert "<dc:date>" not in text
    assert "Matplotlib v" not in text


def test_rows_with_sizes_of_their_own(tmp_path):
    own = experiment("a", qk="rxx-w-rxx@6", ov="xkv@0.3", ratio="-", mlp="dense")
    experiments = [own, experiment("a"), experiment("a", ov="xkv@4")]
    write_results(tmp_path, experiments)
    out = table(tmp_path, experiments)
    assert [row["ratio"] for row in rows(out / "results.csv")] == ["0", "-", "0.2", "0.2"]
    cells = [cell.strip() for cell in print_table(out).splitlines()[3].split("|")]
    assert cells[2:4] == ["rxx-w-rxx@6 + xkv@0.3 + dense", "–"]
    assert len(figure_names(tmp_path, experiments)) == 5
    captions = json.loads((tmp_path / "figures" / "captions.json").read_text())
    assert "only the right panel has rows with a per-component size" in captions[0]["caption"]
    svg = (tmp_path / "figures" / "layer-error-a.svg").read_text()
    for label in ("rxx-w-rxx  20%", "rxx-w-rxx  rank 6", "xkv  30%", "xkv  rank 4"):
        assert f"<!-- {label} -->" in svg
    page = Page(report(tmp_path, experiments)).text
    assert "at 0.2, 27.11 (+4.91) by a3," in page
    assert "a: rxx-w-rxx@6+xkv@0.3+dense, calibration wiki" in page


def test_figures_without_a_nominal_ratio(tmp_path):
    own = experiment("a", qk="rxx-w-rxx@6", ov="xkv@0.3", ratio="-", mlp="dense")
    write_results(tmp_path, [own])
    assert len(figure_names(tmp_path, [own])) == 5
    assert "nominal" not in (tmp_path / "figures" / "captions.json").read_text()


# --- report ---


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def report(results, experiments, name="out"):
    out = table(results, experiments, name)
    shutil.rmtree(out / "figures", ignore_errors=True)  # as Snakemake does
    build_figures(results, experiments, TEXTS, TASKS, out / "figures")
    config = {"models": {experiments[0]["model"]: {"source": "</pre><script>alert(2)</script>"}}}
    build_report(results, experiments, TEXTS, TASKS, out, config, out / "report.html")
    return (out / "report.html").read_text()


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    results = tmp_path_factory.mktemp("report") / "results"
    write_results(results, [experiment("small")])
    return report(results, [experiment("small")])


def test_report_fetches_nothing(html):
    page = Page(html)
    references = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "data", "action")
    ]
    assert references
    assert all(value.startswith(("data:", "#")) for value in references)
    assert not {"link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    style = page.text
    assert "url(" not in style
    assert "@import" not in style


def test_report_has_tables_figures_and_targets(html):
    page = Page(html)
    assert sum(tag == "table" for tag, _ in page.tags) == 5
    assert sum(tag == "img" for tag, _ in page.tags) == 5
    values = [attributes["data-value"] for tag, attributes in page.tags if tag == "td"]
    assert str(math.exp(3.3)) in values  # sorted by the full number, shown as
    assert "27.11 ± 0.50" in page.text
    for said in (
        "Dense perplexity on encyclopedia is 22.20",
        "at 0.2, 27.11 (+4.91) by a3, which keeps",
        f"results/{EVALUATED}/ppl/encyclopedia.json",
        f"results/{CHECKPOINT}/approx.json",
        "results/models/small/arch.json",
        MADE["code"],
        "seed 0, tokens 32768",
    ):
        assert said in page.text


def test_the_best_row_is_said_with_those_that_it_is_not_told_from(tmp_path):
    """The other method has less perplexity by 0.05 nats, ± 0.05; then ± 0.005."""
    experiments = [experiment("small"), experiment("small", qk="other")]
    write_results(tmp_path, experiments)
    path = tmp_path / "eval/small/wiki/other+xkv+rxx-w/0.2/ppl/encyclopedia.json"
    level = " (within two standard errors of other+xkv+rxx-w: a3)"
    for nll, found in (([3.1, 3.4], level), ([3.045, 3.455], "")):
        change(path, block_nll=nll, nll=3.25, perplexity=math.exp(3.25))
        said = Page(report(tmp_path, experiments)).text
        kept = "80.0% of the parameters and 100.0% of the KV cache"
        assert f"the best keeps: at 0.2, {kept}{found}." in said
        # The perplexities are in the line above, and only there.
        assert "Best of the smallest models" not in said


def test_the_first_lines_say_what_to_take(tmp_path):
    """The other method is better by 0.05 nats, ± 0.05; then ± 0.005: no longer level."""
    experiments = [experiment("small"), experiment("small", qk="other")]
    write_results(tmp_path, experiments)
    path = tmp_path / "eval/small/wiki/other+xkv+rxx-w/0.2/ppl/encyclopedia.json"
    costs = "Perplexity on encyclopedia, dense 22.2; at 0.2, other+xkv+rxx-w 25.8, a3 27.1."
    for nll in ([3.1, 3.4], [3.045, 3.455]):
        change(path, block_nll=nll, nll=3.25, perplexity=math.exp(3.25))
        said = Page(report(tmp_path, experiments)).text
        beaten = "at no ratio does a method here lose significantly less"
        assert f"Take other+xkv+rxx-w: {beaten}. {costs}" in said
    change(path, block_nll=[3.345, 3.755], nll=3.55, perplexity=math.exp(3.55))
    assert "Take a3 (--preset a3): at no ratio" in Page(report(tmp_path, experiments)).text


def test_one_method_alone_is_not_recommended(html):
    assert "Take " not in html


def test_report_tells_nothing_of_this_machine(html, tmp_path_factory):
    assert str(tmp_path_factory.getbasetemp()) not in html


def test_report_of_equal_inputs_is_byte_identical(results, html):
    assert report(results, [experiment("small")]) == html


def test_names_are_escaped(tmp_path):
    hostile = "<img src=x onerror=alert(1)>\"'&"
    write_results(tmp_path, [experiment(hostile)])
    text = report(tmp_path, [experiment(hostile)])
    page = Page(text)
    assert hostile in page.text
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert {a["src"][:5] for tag, a in page.tags if tag == "img"} == {"data:"}


def test_report_names_the_missing_figure(results):
    rows_ = [experiment("small")]
    report(results, rows_)
    out = results / "tables" / "out"
    (out / "figures" / "perplexity-small.svg").unlink()
    with pytest.raises(A3Error, match=r"perplexity-small\.svg"):
        build_report(results, rows_, TEXTS, TASKS, out, {}, out / "report.html")


def test_print_table_asks_for_a_build(tmp_path):
    with pytest.raises(A3Error, match=r"results\.md"):
        print_table(tmp_path)


def test_paired_error_agrees_with_numpy(results):
    before, after = [3.0, 3.3, 2.9, 3.4], [3.2, 3.6, 3.0, 3.9]
    weights = json.loads((results / CHECKPOINT / "approx.json").read_text())["weights_sha256"]
    write_evaluation(results / "eval/small/dense", digest("small"), before, 0.7)
    write_evaluation(results / EVALUATED, weights, after, 0.7)
    row = rows(table(results, [experiment("small")]) / "results.csv")[1]
    expected = np.std(np.subtract(after, before), ddof=1) / 2
    assert float(row["encyclopedia.nll_delta_stderr"]) == pytest.approx(expected, rel=1e-12)


def test_clips_are_named_by_what_is_written_of_them():
    svg = '<g clip-path="url(#p{0})"/><clipPath id="p{0}">\n <rect x="57.6" y="41.5"/>\n</clipPath>'
    one, other = (name_clips(svg.format(name)) for name in ("61e213f986", "0f338bf9bc"))
    assert one == other
    assert one.count(one.split('id="')[1][:11]) == 2
