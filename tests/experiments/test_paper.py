"""The paper's tables: definitions, the comparison, and what the workflow would run."""

import csv
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_tables import EVALUATED, digest, experiment, write, write_results
from test_workflow import CONFIG, Project
from tiny import tiny_llama

from a3.artifacts.protocols import SPEED_PROTOCOL
from a3.artifacts.verify import verify
from a3.core.errors import A3Error
from a3.core.files import load_yaml, read_record
from a3.experiments.config import complete
from a3.experiments.paper import KEYS, Cell, Paper, Row
from a3.experiments.rows import check_row
from a3.report.paper import compare
from a3.report.tables.paper_comparison import compared
from a3.report.tables.paper_rows import build_rows
from a3.solutions.modes import COMPONENTS, MODES

ROOT = Path(__file__).parents[2]
PAPER = Paper(ROOT / "config/paper.yaml")
SCHEMA = load_yaml(ROOT / "workflow/schemas/config.schema.yaml")
TABLES = sorted(PAPER.tables)
HUB = {
    "table1": "llama-2-7b",
    "downstream": "llama-3.1-70b",
    "kv_cache": "mpt-30b",
    "ablation": "llama-2-7b",
    "components": "mpt-7b",
    "calibration": "llama-3.1-8b",
    "mixed_rank": "llama-7b",
    "runtime": "llama-2-13b",
    "decode": "llama-2-13b",
    "offline_cost": "llama-3-8b",
}
# --- definitions ----------------------------------------------------------------------------------


def figures(path):
    """How many figures a published table has: cells that are a number, and no key of a row."""
    table = next(t for t in PAPER.tables.values() if t.source == path)
    columns = table.spec["values"]
    columns = list(columns.values()) if isinstance(columns, dict) else columns
    with path.open(newline="") as stream:
        return sum(bool(line[column]) for line in csv.DictReader(stream) for column in columns)


@pytest.mark.parametrize("path", sorted((ROOT / "config/paper/published").iterdir()), ids=str)
def test_every_published_figure_is_in_one_comparison_once(path, tmp_path):
    tables = [table for table in PAPER.tables.values() if table.source == path]
    assert len(tables) == 1
    found = [one for one in compared(PAPER, tables[0], tmp_path) if one.published is not None]
    assert len({one.cell for one in found}) == len(found) == figures(path) > 0
    assert all(one.why_not or one.target for one in found)


@pytest.mark.parametrize("name", sorted(HUB))
def test_a_paper_model_wants_every_figure_that_can_be_built(name):
    table, model = PAPER.tables[name], HUB[name]
    wanted = {one.cell for one in PAPER.wanted(table, model)}
    published = {c for c in table.published if c.model == PAPER.models[model]["paper"]}
    assert published
    assert published - wanted == {c for c in published if PAPER.why_not(table, model, c.row)}


@pytest.mark.parametrize("name", ["table1", "ablation", "mixed_rank", "downstream"])
def test_the_dense_model_is_one_row(name):
    wanted = PAPER.wanted(PAPER.tables[name], "smollm2-135m")
    assert len({one.cell.row for one in wanted if one.place.is_dense}) == 1


def test_modes_follow_the_attention():
    row = Row(component="both", ratio="0.2")
    assert PAPER.place("mpt-7b", row).method == "qk+axkv+dense"
    assert PAPER.place("llama-2-7b", row).method == "rxx-w-rxx+axkv+dense"
    assert PAPER.place("llama-3.1-8b", row).method == "rxx-w-rxx+xkv+dense"
    assert PAPER.place("llama-3.1-8b", replace(row, ratio="0")).is_dense


def configuration():
    config = load_yaml(ROOT / "config/config.yaml")
    return complete(PAPER.join(config), SCHEMA)


def test_the_packaged_model_is_not_scored_on_what_it_was_calibrated_on():
    config = configuration()
    entries = {
        key: list(PAPER.protocol("smollm2-135m")[key].values()) for key in ("perplexity", "harness")
    }
    row = {"model": "smollm2-135m", "qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w", "ratio": "0.1"}
    for calibration in PAPER.protocol("smollm2-135m")["calibrations"].values():
        check_row(row | {"calibration": calibration}, config | {"evaluate": entries}, "row")
    config["texts"]["sotu"]["exclude"].remove("c4")
    with pytest.raises(A3Error, match="uses the text 'c4'"):
        check_row(row | {"calibration": "paper-wiki-c4"}, config | {"evaluate": entries}, "row")


def test_own_entries_come_before_the_papers():
    own = {"source": {"path": "/data/llama"}}
    joined = PAPER.join({"experiments": "x", "models": {"llama-2-7b": own}})
    assert joined["models"]["llama-2-7b"] == own
    assert "hub" in joined["models"]["llama-7b"]["source"]


def test_every_mode_and_entry_that_a_table_names_is_there():
    config = configuration()
    for row in PAPER.rows(list(PAPER.models)):
        assert all(
            row[component] == "dense" or row[component] in MODES[component]
            for component in COMPONENTS
        )
    for protocol in PAPER.spec["protocols"].values():
        for section, names in protocol.items():
            assert set(names.values()) <= set(config[section])


def test_an_unknown_model_is_named():
    with pytest.raises(A3Error, match=r"'llama-9' is not among the models.*llama-7b"):
        PAPER.models_of(PAPER.tables["table1"], ["llama-9"])


# --- the comparison -------------------------------------------------------------------------------


def write_group(folder, name, values):
    """A group of rows with made-up figures, by cell."""
    lines = [
        {"model": c.model, **vars(c.row), "measure": c.measure, "ours": v, "stderr": 0.01}
        for c, v in values.items()
    ]
    folder.mkdir(exist_ok=True)
    pd.DataFrame(lines).to_csv(folder / f"{name}.csv", index=False)


def read_comparison(folder):
    names = ("model", "measure", *KEYS)
    return pd.read_csv(folder / "comparison.csv", dtype=dict.fromkeys(names, str))


def shown(frame, **where):
    for key, value in where.items():
        frame = frame[frame[key] == value]
    assert len(frame) == 1
    return frame.iloc[0]


A3_10 = {"method": "a3", "ratio": "0.1", "measure": "perplexity slimpajama"}


def test_ours_stands_beside_the_published_figure(tmp_path):
    table = ROOT / "config/paper/table1.yaml"
    cell = Cell("LLaMA-2-13B", Row(ratio="0.1"), "perplexity slimpajama")
    own = Cell("smollm2-135m", Row(ratio="0.1", calibration="paper-wiki"), "perplexity sotu")
    write_group(tmp_path, "llama-2-13b", {cell: 6.25})
    write_group(tmp_path, "smollm2-135m", {own: 31.5})
    compare(table, tmp_path)
    frame = read_comparison(tmp_path)
    one = shown(frame, model="LLaMA-2-13B", **A3_10)
    assert (one["published"], one["ours"]) == (7.65, 6.25)
    assert one["difference"] == pytest.approx(-1.4)
    assert one["notes"] == "repeats the C4 value of its row"
    assert shown(frame, model="smollm2-135m")["ours"] == 31.5
    other = shown(frame, model="LLaMA-2-7B", **A3_10)
    assert pd.isna(other["ours"])
    assert other["target"] == str(tmp_path / "llama-2-7b.csv")
    text = (tmp_path / "comparison.md").read_text()
    assert "6.25 ± 0.01 (7.65³, -1.40)" in text
    assert "³ repeats the C4 value of its row." in text
    assert "not built (6.68)" in text
    assert "31.50 ± 0.01 |" in text
    assert f"not built: `snakemake {tmp_path}/llama-2-7b.csv` builds it" in text
    assert "not built: a3 does not read Ministral 3" in text
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "comparison.svg").read_text()


@pytest.mark.parametrize(
    ("name", "cells", "says"),
    [
        ("table1", 4, "baseline"),
        ("table1", 1, "repeats the C4 value"),
        ("table1", 1, "58.6 %"),
        ("finetune", 1, "24.31"),
    ],
)
def test_slips_of_the_paper_are_marked(name, cells, says, tmp_path):
    compare(ROOT / f"config/paper/{name}.yaml", tmp_path)
    assert sum(says in str(notes) for notes in read_comparison(tmp_path)["notes"]) == cells
    assert says in (tmp_path / "comparison.md").read_text()


def test_a_slip_of_a_whole_table_is_said_below_it(tmp_path):
    compare(ROOT / "config/paper/runtime.yaml", tmp_path)
    assert "128/128/13824" in (tmp_path / "comparison.md").read_text()


def test_no_difference_is_taken_of_what_is_not_the_same(tmp_path):
    table = PAPER.tables["downstream"]
    cell = next(
        c for c in table.published if c.measure == "average accuracy" and c.row.ratio != "0"
    )
    write_group(tmp_path, "llama-2-7b", {cell: 0.5})
    compare(ROOT / "config/paper/downstream.yaml", tmp_path)
    one = shown(read_comparison(tmp_path).dropna(subset="ours"))
    assert (one["ours"], one["published"]) == (0.5, 0.4166)
    assert pd.isna(one["difference"])


def test_a_group_that_is_none_is_refused(tmp_path):
    (tmp_path / "llama-2-7b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(A3Error, match=r"llama-2-7b.csv: no column"):
        compare(ROOT / "config/paper/table1.yaml", tmp_path)


# --- one model's rows ----------------------------------------------------------------------------

MADE_UP = """
models: {small: {attention: gqa-rope, protocol: own}}
texts: {}
calibrations: {}
perplexity: {}
harness: {}
speed: {}
protocols:
  own:
    calibrations: {slimpajama: wiki}
    perplexity: {wikitext2: encyclopedia}
    harness: {boolq: titles, mmlu: titles}
    speed: {eager: fast}
methods: {a3: {gqa-rope: [rxx-w-rxx, xkv, rxx-w]}}
components: {all: [qk, ov, mlp], original: []}
"""
EVERYTHING = """
title: Everything
published: all.csv
columns: {ratio: ratio, setting: setting}
values: [a, b, c, d, e, f, g, h, i]
same: {model: Other}
measures:
  a: perplexity wikitext2
  b: delta wikitext2
  c: accuracy boolq
  d: accuracy mmlu
  e: average accuracy
  f: seconds ov
  g: prefill tokens/s
  h: decode gain
  i: flops ratio
"""


def write_speed(path, weights):
    """A record of a dense model of 100 and 10 tokens/s, and one of 150 and 16."""
    models = [
        {
            "checkpoint_sha256": sha,
            "flops_per_token_paper": flops,
            "attention": {
                "eager": {"prefill": {"median": prefill}, "decode": {"median": decode}},
            },
        }
        for sha, flops, prefill, decode in zip(weights, (8, 6), (100, 150), (10, 16), strict=True)
    ]
    said = dict.fromkeys((*SPEED_PROTOCOL, "device_name"), 1)
    write(path, said | {"attention": ["eager"], "models": models})


@pytest.fixture
def everything(tmp_path):
    """A table with every kind of measure, and made-up results; returns (table, results)."""
    write_results(tmp_path / "results", [experiment("small")])
    weights = [digest("small"), digest("small/wiki/rxx-w-rxx+xkv+rxx-w/0.2")]
    write_speed(tmp_path / "results" / EVALUATED / "speed/fast.json", weights)
    (tmp_path / "paper/published").mkdir(parents=True)
    (tmp_path / "paper.yaml").write_text(MADE_UP)
    (tmp_path / "paper/all.yaml").write_text(EVERYTHING)
    rows = "ratio,setting,a,b,c,d,e,f,g,h,i\n" + "".join(
        f"{ratio},eager,1,1,1,1,1,1,1,1,1\n" for ratio in ("0", "0.2")
    )
    (tmp_path / "paper/published/all.csv").write_text(rows)
    return tmp_path / "paper/all.yaml", tmp_path / "results"


def test_every_kind_of_measure_is_read(everything, tmp_path):
    path, results = everything
    build_rows(path, "small", results, tmp_path / "small.csv")
    lines = pd.read_csv(tmp_path / "small.csv", dtype={"ratio": str})
    own = lines.set_index(["ratio", "measure"])["ours"]
    dense, small = math.exp(3.1), math.exp(3.3)
    assert own["0.2", "perplexity wikitext2"] == pytest.approx(small)
    assert own["0.2", "delta wikitext2"] == pytest.approx(small - dense)
    assert own["0.2", "accuracy boolq"] == own["0.2", "average accuracy"] == 0.70
    assert own["0", "average accuracy"] == 0.75
    assert own["0.2", "seconds ov"] == 1.5
    assert own["0", "prefill tokens/s"] == 100
    assert own["0.2", "prefill tokens/s"] == 150
    assert own["0.2", "decode gain"] == 6
    assert own["0.2", "flops ratio"] == 0.75
    errors = lines.set_index(["ratio", "measure"])["stderr"]
    # Two blocks: half the distance of (small × nll − dense × nll).
    apart = small * (3.5 - 3.1) - dense * (3.2 - 3.0)
    assert errors["0.2", "delta wikitext2"] == pytest.approx(abs(apart) / 2)
    assert "block_length 1024" in lines["protocol"][0]


def test_results_of_other_weights_are_refused(everything, tmp_path):
    path, results = everything
    write_speed(results / EVALUATED / "speed/fast.json", ["other", "weights"])
    with pytest.raises(A3Error, match=r"fast.json: checkpoint_sha256"):
        build_rows(path, "small", results, tmp_path / "small.csv")


# --- the workflow ---------------------------------------------------------------------------------


def dry_run(*words, config=()):
    """What `snakemake -n` of this project would run; returns (status, rules, output)."""
    command = [sys.executable, "-m", "snakemake", "-n", "--no-hooks", "--cores", "1", *words]
    command += ["--config", *config] if config else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    output = done.stdout + done.stderr
    return done.returncode, re.findall(r"^(?:local)?rule (\w+):", output, re.MULTILINE), output


def test_dry_run_of_every_table_for_the_packaged_model(tmp_path):
    targets = [f"paper_{name}" for name in TABLES]
    status, rules, output = dry_run(*targets, config=[f"results={tmp_path}/results"])
    assert status == 0, output
    assert set(targets) <= set(rules)
    assert rules.count("paper_comparison") == len(TABLES)
    assert rules.count("paper_rows") == len(HUB)
    assert set(re.findall(r"wildcards: model=([^,\s]+)", output)) == {"smollm2-135m"}
    # What the paper's own modes read is collected in one pass, and what is large by itself.
    assert len(set(rules) & {"collect_together", "collect_together_2"}) == 1
    assert len([rule for rule in rules if rule.startswith("collect_together")]) == 2


def test_dry_run_of_every_table_for_hub_models(tmp_path):
    chosen = json.dumps({"models": sorted(set(HUB.values()))})
    config = [f"results={tmp_path}/results", f"paper={chosen}"]
    status, rules, output = dry_run(*[f"paper_{name}" for name in TABLES], config=config)
    assert status == 0, output
    assert rules.count("model") == len(set(HUB.values()))
    for name, model in HUB.items():
        assert f"paper/{name}/{model}.csv" in output
    assert {"eval_ppl", "eval_harness", "eval_speed", "collect_together_2"} <= set(rules)


def test_one_group_of_rows_by_its_path(tmp_path):
    results = f"{tmp_path}/results"
    status, rules, output = dry_run(
        f"{results}/paper/table1/llama-3.1-8b.csv", config=[f"results={results}"]
    )
    assert status == 0, output
    assert rules.count("paper_rows") == 1
    assert "smollm2" not in output


def test_the_default_run_collects_what_it_did(tmp_path):
    status, rules, output = dry_run(config=[f"results={tmp_path}/results"])
    assert status == 0, output
    assert "paper" not in "".join(rules)
    kinds = re.findall(r"rxx/smollm2-135m/(\S+)/(\w+)\.safetensors", output)
    wanted = {"q_blocks", "k_blocks", "v_blocks", "down_diagonal"}  # A3
    wanted |= {"down_input"}  # MoDeGPT
    wanted |= {"o_proj_input", "attention_gradient", "mlp_gradient", "pair_gradient"}  # a3-plus
    assert set(kinds) == {("mixture-32k", kind) for kind in wanted}


TINY = """
models:
  tiny: {attention: gqa-rope, protocol: tiny}
  twin: {paper: Twin, attention: gqa-rope, protocol: tiny, source: {path: twin}}
texts: {}
speed: {}
calibrations:
  paper-short: {text: learn, tokens: 512, block_length: 64}
perplexity: {}
harness: {}
protocols:
  tiny:
    calibrations: {slimpajama: paper-short}
    perplexity: {wikitext2: score}
    harness: {titles: titles}
    speed: {}
methods:
  original: [dense, dense, dense]
  a3: {gqa-rope: [rxx-w-rxx, xkv, rxx-w]}
components:
  original: []
  all: [qk, ov, mlp]
  both: [qk, ov]
"""
TABLE = """
title: Two models
published: two.csv
columns: {model: model, component: component, ratio: ratio}
values: [ppl, delta, qk]
measures: {ppl: perplexity wikitext2, delta: delta wikitext2, qk: seconds qk}
more: {measures: [error ov]}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny project with a table of the paper that has one model, and another model."""
    made = Project(tmp_path_factory.mktemp("paper"))
    tiny_llama(made.folder / "twin", seed=1)
    (made.folder / "config/config.yaml").write_text(CONFIG + "paper: {models: [tiny]}\n")
    (made.folder / "config/paper.yaml").write_text(TINY)
    (made.folder / "config/paper/published").mkdir(parents=True)
    (made.folder / "config/paper/two.yaml").write_text(TABLE)
    published = "model,component,ratio,ppl,delta,qk\nTwin,both,0.25,300,1.5,1:30\n"
    (made.folder / "config/paper/published/two.csv").write_text(published)
    return made


def test_models_are_built_one_after_the_other(project):
    folder = project.folder / "results/paper/two"
    rules, output = project.snakemake("paper_two")
    assert {"collect_together", "paper_rows", "paper_comparison", "paper_two"} <= set(rules)
    assert "## tiny" in output
    assert "not built (300.00)" in output
    assert not {"tables", "report"} & set(rules)
    own = pd.read_csv(folder / "tiny.csv").set_index(["component", "measure"])["ours"]
    results = project.folder / "results"
    place = "eval/tiny/paper-short/rxx-w-rxx+xkv+dense/0.25"
    scored = read_record(results / place / "ppl/score.json")["perplexity"]
    dense = read_record(results / "eval/tiny/dense/ppl/score.json")["perplexity"]
    assert own["both", "perplexity wikitext2"] == scored
    assert own["both", "delta wikitext2"] == pytest.approx(scored - dense)
    assert own["original", "perplexity wikitext2"] == dense
    assert 0 < own["both", "error ov"] < 1

    # Asked for alone, without paper.models; then it is part of the comparison, and built no more.
    rules, _ = project.snakemake("results/paper/two/twin.csv")
    assert {"collect_together", "approx", "paper_rows"} <= set(rules)
    assert "paper_comparison" not in rules
    rules, output = project.snakemake("paper_two")
    assert set(rules) == {"paper_comparison", "paper_two"}
    frame = pd.read_csv(folder / "comparison.csv").dropna(subset="difference")
    assert set(frame["model"]) == {"Twin"}
    one = frame[frame["measure"] == "perplexity wikitext2"].iloc[0]
    assert one["difference"] == one["ours"] - 300
    assert frame[frame["measure"] == "seconds qk"]["published"].item() == 90
    assert "not built" not in output
    rules, _ = project.snakemake("paper_two")
    assert rules == ["paper_two"]
    verify(project.folder / "results")


def test_the_default_run_is_the_same_without_the_papers_tables(project):
    whole = project.snakemake("-n", "--forceall")[0]
    project.edit("config/config.yaml", "paper: {models: [tiny]}\n", "")
    assert project.snakemake("-n", "--forceall")[0] == whole
    assert "collect_together" in whole
