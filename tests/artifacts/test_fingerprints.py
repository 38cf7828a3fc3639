"""A stage's fingerprint covers all of a3 that it runs: what it has loaded when it is done."""

import ast
import json
import os
import re
import subprocess
from pathlib import Path

import fork_server
import pytest
from tiny import BLOCK, document, tiny_llama

from a3.core.provenance import PACKAGE, sources

ROOT = Path(__file__).parents[2]
RULE = re.compile(r"^ *rule ?(\w*):.*?(?=^ *(?:use )?rule ?\w*:|\Z)", re.MULTILINE | re.DOTALL)
# The modules that each rule names, by the rule; one whose name is computed by its file's.
RULES = {
    found[1] or path.stem: tuple(re.findall(r'"(a3[\w.]+)"', code[1]))
    for path in sorted((ROOT / "workflow/rules").glob("*.smk"))
    for found in RULE.finditer(path.read_text())
    if (code := re.search(r"code=fingerprint\((.*?)\)", found[0]))
}
# What the command line loads beside a stage, which only ever refuses.
BESIDE = {rule: ["a3.solutions.plan"] for rule in ("collect", "collect_compressed")}
# The command line holds an entry of the catalogue to the schema, which refuses or changes nothing.
BESIDE |= {
    rule: ["a3.experiments.config", "a3.experiments.entries"]
    for rule in ("train", "model", "quantise", "text", "split")
}
TRAIN = {
    "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "text": "learn", "vocab_size": 280, "block_length": 32, "steps": 2, "batch_size": 2,
    "learning_rate": 1e-3, "seed": 0,
}  # fmt: skip
RECIPE = {"layers": [{"match": ".*", "W": "bfp4/16", "x": "bfp8/16"}], "products": {"q": "bfp8/16"}}
# One that a stock runtime can run, too.
ROW = {"model": "tiny", "calibration": "short", "qk": "dense", "ov": "dense", "mlp": "rxx"}
ROW |= {"ratio": "0.25"}
LOW = ROW | {"quantise": "mine+none"}
RUN = "tiny/short/dense+dense+rxx/0.25"
SURGERY = {"model": "tiny", "calibration": "short", "mode": "pca-shared-kv", "size": "variance@0.9"}
FRONTIER = "frontiers/tiny/short/dense+joint~+dense.json"
OPERATED = "tiny/short/pca-shared-kv/variance@0.9"
STATISTICS = (
    "q_blocks",
    "k_blocks",
    "v_blocks",
    "down_diagonal",
    "attention_gradient",
    "o_proj_input",
)
EVALUATIONS = ("eval_ppl", "eval_fit", "eval_harness", "eval_generation", "eval_speed")
INPUTS = ("attention_input", "o_proj_input", "mlp_input", "down_input")


def commands():
    """(rule, arguments) of a whole run, in order."""
    yield from texts_and_models()
    yield from statistics_and_checkpoints()
    yield from results()
    experiments = ["--experiments", json.dumps([ROW, LOW])]
    shown = ["--results", ".", "--perplexity", "score"]
    yield "tables", ["tables", *shown, *experiments, "--fitted", "-o", "tables"]
    spectra = ["--spectra", "spectra/tiny/short.json"]
    frontiers = ["--frontiers", FRONTIER]
    drawn = ["figures", *shown, *experiments, *spectra, *frontiers, "-o", "tables/figures"]
    yield "figures", drawn
    timed = ["--results", ".", "--experiments", json.dumps([LOW]), "--speed", "quick"]
    yield "speed_table", ["speed-table", *timed, "-o", "tables"]
    surgeries = ["--surgeries", json.dumps([SURGERY])]
    yield "surgery_table", ["surgery-table", *shown, *surgeries, "-o", "tables"]
    figures = ["surgery-figures", *shown, *surgeries, "-o", "tables/surgery_figures"]
    yield "surgery_figures", figures
    config = ["--config", json.dumps({"texts": {}})]
    page = [*frontiers, "--tables", "tables", *config, "-o", "r.html"]
    yield "report", ["report", *shown, *experiments, "--fitted", *page]
    yield (
        "paper_comparison",
        ["paper", "compare", ROOT / "config/paper/hqq.yaml", "-o", "paper/hqq"],
    )


def texts_and_models():
    learn, score = "texts/learn/docs.jsonl", "texts/score"
    text = {"source": {"path": "learn.txt"}, "format": "text"}
    yield "text", ["text", json.dumps(text), "-o", learn]
    text = {"source": {"path": "score.jsonl"}}
    yield "text", ["text", json.dumps(text), "-o", f"{score}/docs.jsonl"]
    excluding = ["--exclude", learn, "--shares", json.dumps({"test": 0.5, "harness": 0.5})]
    yield "split", ["split", f"{score}/docs.jsonl", *excluding, "-o", score]
    yield "items", ["items", f"{score}/harness.jsonl", "--items", 4, "-o", "items/titles"]
    train = json.dumps({"source": {"train": TRAIN}})
    yield "train", ["train", train, "--text", learn, "-o", "trained/gpt"]
    yield "model", ["model", json.dumps({"source": {"path": "tiny"}}), "-o", "models/tiny"]


def rxx(where, kinds):
    """Files of statistics."""
    return [f"rxx/{where}/{kind}.safetensors" for kind in kinds]


def statistics_and_checkpoints():
    dense, small, low = "models/tiny", f"checkpoints/{RUN}", f"quantised/{RUN}/mine+none"
    reading = ["--text", "texts/learn/docs.jsonl", "--tokens", 256, *BLOCK]
    rows = ["--experiments", json.dumps([ROW])]
    collect = ["collect", dense, *reading, *rows, "-o", *rxx("tiny/short", STATISTICS)]
    yield "collect", collect
    shards = [*rxx("0of2", ["v_blocks"]), *rxx("1of2", ["v_blocks"])]
    for number, shard in enumerate(shards):
        yield "collect", ["collect", dense, *reading, "--shard", f"{number}of2", "-o", shard]
    yield "merge", ["merge", *shards, "-o", *rxx("merged", ["v_blocks"])]
    here, ratio = ["--rxx", "rxx/tiny/short"], ["--ratio", "0.25"]
    sharing = [*here, "--qk", "dense", "--ov", "joint~", "--mlp", "dense", *ratio]
    one, known = ["--qk", "dense", "--ov", "joint", "--mlp", "dense"], "losses.safetensors"
    yield "losses", ["losses", dense, *here, *one, "-o", known]
    sharing += ["--losses", known]
    yield "allocate", ["allocate", dense, *sharing, "-o", "ranks.json"]
    yield "approx", ["approx", dense, *sharing, "--allocation", "ranks.json", "-o", "joint"]
    # It takes all ratios.
    text, every = ["--text", "texts/learn/docs.jsonl"], sharing[: sharing.index("--ratio")]
    yield "frontier", ["frontier", dense, *every, *text, "--losses", known, "-o", FRONTIER]
    modes = [
        word for component in ("qk", "ov", "mlp") for word in (f"--{component}", ROW[component])
    ]
    yield "approx", ["approx", dense, *here, *modes, *ratio, "-o", small]
    made = "shards/0of1.safetensors"
    yield "approx", ["approx", dense, *here, *modes, *ratio, "--shard", "0of1", "-o", made]
    yield "gather", ["gather", dense, made, "-o", "gathered"]
    yield "collect_compressed", ["collect", small, *reading, "-o", *rxx(RUN, INPUTS)]
    recipe = ["--recipe", json.dumps(RECIPE), "--method", "none"]
    yield "quantise", ["quantise", small, "--rxx", f"rxx/{RUN}", *recipe, "-o", low]
    teaching = ["--teacher", dense, "--text", "texts/learn/docs.jsonl", "--tokens", 32]
    yield "heal", ["heal", small, *teaching, "--block-length", 16, "-o", "healed"]
    yield "spectra", ["spectra", dense, *here, "-o", "spectra/tiny/short.json"]
    surgery = ["--mode", SURGERY["mode"], "--size", SURGERY["size"]]
    yield "surgery", ["surgery", dense, *surgery, "-o", f"checkpoints/{OPERATED}"]
    yield "export_hf", ["export", "hf", small, "-o", "exported"]
    yield "export_gguf", ["export", "gguf", small, "-o", "exported.gguf"]


def results():
    low, quantised = f"quantised/{RUN}/mine+none", f"{RUN}/mine+none"
    models = {"tiny/dense": "models/tiny", RUN: f"checkpoints/{RUN}", quantised: low}
    for run, model in (models | {OPERATED: f"checkpoints/{OPERATED}"}).items():
        ppl = ["eval", "ppl", model, "--text", "texts/score/test.jsonl", "--tokens", 256, *BLOCK]
        yield "eval_ppl", [*ppl, "-o", f"eval/{run}/ppl/score.json"]
        if run in (RUN, quantised):
            text = ["--text", "texts/learn/docs.jsonl", "--tokens", 256, *BLOCK]
            fit = ["eval", "fit", "models/tiny", model, *text]
            yield "eval_fit", [*fit, "-o", f"eval/{run}/fit/blocks.json"]
    # A quantised one runs all code that the others do, and more.
    out = f"eval/{quantised}"
    items = ["--task", "titles", "--items", "items/titles/items.jsonl"]
    yield "eval_harness", ["eval", "harness", low, *items, "-o", f"{out}/harness/titles.json"]
    prompt = ["--prompt", "A river", "--new-tokens", 2, "-o", f"{out}/generation/prompt.json"]
    yield "eval_generation", ["eval", "generation", low, *prompt]
    prompt = ["--prompt", "A river", "--new-tokens", 2]
    operated = ["eval", "generation", f"checkpoints/{OPERATED}", *prompt]
    yield "eval_generation", [*operated, "-o", f"eval/{OPERATED}/generation/prompt.json"]
    dense = ["eval", "generation", "models/tiny", *prompt]
    yield "eval_generation", [*dense, "-o", "eval/tiny/dense/generation/prompt.json"]
    speed = ["--prompt", 8, "--new-tokens", 2, "--repeats", 1, "--attention", "eager"]
    timed = ["eval", "speed", "models/tiny", low, *speed, "-o", f"{out}/speed/quick.json"]
    yield "eval_speed", timed


def a3(folder, *words):
    """Run a command in a process of its own; a3's modules that it has loaded, and opened files."""
    client, used = Path(fork_server.python()).with_name("a3"), folder / "used.json"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "A3_USED": str(used)}
    used.unlink(missing_ok=True)
    done = subprocess.run(
        [client, *map(str, words)], cwd=folder, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, (words, done.stderr)
    return json.loads(used.read_text())


def path_of(module):
    """The file of a module that is loaded."""
    base = PACKAGE.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def is_empty(path):
    """Whether a module is the name of a folder only: there is nothing in it but a docstring."""
    body = ast.parse(path.read_text()).body
    return len(body) == 1 and isinstance(body[0], ast.Expr)


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """Of each rule: the files of a3 that its commands have loaded or opened."""
    folder = tmp_path_factory.mktemp("used")
    tiny_llama(folder / "tiny")
    (folder / "learn.txt").write_text("A river moves towards an ocean or a lake. " * 60)
    (folder / "score.jsonl").write_text("".join(map(document, range(60))))
    found = {}
    for rule, words in commands():
        said = a3(folder, *words)
        opened = {Path(name) for name in said["files"] if name.startswith(str(PACKAGE))}
        of_a3 = {path_of(module) for module in said["modules"]}
        of_a3 |= {path for path in opened if path.suffix != ".pyc" and path.is_file()}
        found.setdefault(rule, set()).update(of_a3)
    # The command line, what it loads for every command, and what registers with transformers.
    always = {path_of(module) for module in a3(folder, "-h")["modules"]} | {PACKAGE / "__init__.py"}
    return {
        rule: {path for path in paths - always if path.suffix != ".py" or not is_empty(path)}
        for rule, paths in found.items()
    }


def test_every_rule_is_tried(used):
    """But paper_rows, which joins results of whole runs; wheels are fetched, not made."""
    assert set(RULES) - set(used) == {"paper_rows"}
    assert len(RULES) > 25


@pytest.mark.parametrize("rule", RULES)
def test_a_fingerprint_covers_what_was_loaded(used, rule):
    if rule not in used:
        pytest.skip("joins results of whole runs")
    covered = {path for module in (*RULES[rule], *BESIDE.get(rule, ())) for path in sources(module)}
    templates = {t for path in covered for t in path.parent.glob(f"{path.stem}.*.jinja")}
    schemas = (
        set(PACKAGE.rglob("*.schema.yaml"))
        if "a3.experiments.config" in BESIDE.get(rule, ())
        else set()
    )
    known = covered | templates | schemas
    missing = {path.relative_to(PACKAGE).as_posix() for path in used[rule] - known}
    assert missing == set()
    # Not for want of trying.
    assert path_of(RULES[rule][0]) in used[rule]


def test_relative_imports_are_followed():
    """The code that travels has one, by which transformers finds its other files."""
    found = {path.name for path in sources("a3.models.modeling_a3")}
    code = {"modeling_a3.py", "attention_a3.py", "experts_a3.py", "own_attention_a3.py"}
    assert found == code


@pytest.mark.parametrize(
    ("module", "rules"),
    [
        ("models/cost", {"eval_speed"}),
        ("models/quantised", {*EVALUATIONS, "frontier", "quantise"}),
        ("numerics/formats", {*EVALUATIONS, "frontier", "quantise"}),
    ],
)
def test_a_change_makes_stale_what_it_can_change(module, rules):
    """An estimate for clusters no statistics; simulated low precision what runs it, and no more."""
    path = PACKAGE / f"{module}.py"
    assert rules == {
        rule for rule, of in RULES.items() if any(path in sources(module) for module in of)
    }


@pytest.mark.parametrize(
    "rule", ["collect", "approx", "losses", "allocate", "gather", "quantise", "heal", "eval_ppl"]
)
def test_reading_results_back_is_no_part_of_making_them(rule):
    covered = {path for module in RULES[rule] for path in sources(module)}
    assert not covered & {
        PACKAGE / "artifacts/runs.py",
        PACKAGE / "models/cost.py",
        PACKAGE / "experiments/config.py",
    }
