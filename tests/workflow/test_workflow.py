"""Only stale stages are recomputed: tests that run Snakemake for real, on a tiny model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

import a3  # noqa: F401
from a3.cli.main import main

ROOT = Path(__file__).parents[2]
PLUGIN = "snakemake_logger_plugin_a3"
COPIED = ("a3", PLUGIN, "workflow", "Snakefile", "environment.yaml")
CONFIG = """
experiments: experiments.tsv
models:
  tiny: {source: {path: tiny}}
texts:
  learn: {source: {path: learn.txt}, format: text}
  score: {source: {path: score.jsonl}, exclude: [learn], split: {test: 0.5, harness: 0.5}}
calibrations:
  short: {text: learn, tokens: 512, block_length: 64}
perplexity:
  score: {text: score, tokens: 256, block_length: 64}
harness:
  titles: {text: score, items: 4}
evaluate:
  perplexity: [score]
  harness: [titles]
"""
HEADER = "model\tcalibration\tqk\tov\tmlp\tratio\n"
ROW = "tiny\tshort\trxx-w-rxx\txkv\trxx-w\t{}\n"
DOWNSTREAM = {"tables", "figures", "report"}
WORDS = [
    "river",
    "dog",
    "moon",
    "lake",
    "fox",
    "ocean",
    "people",
    "water",
    "quick",
    "brown",
    "lazy",
    "jump",
    "move",
    "watch",
    "first",
]


class Project:
    """A folder with the project's code, copied, and a tiny configuration."""

    def __init__(self, folder):
        self.folder = folder
        self.settled = None
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            copy(ROOT / name, folder / name)
        # Tests read Snakemake's own text; test_progress.py asks for ours.
        self.edit("workflow/profiles/default/profile.yaml", "logger: a3\n", "")
        (folder / "config").mkdir()
        (folder / "config" / "config.yaml").write_text(CONFIG)
        (folder / "experiments.tsv").write_text(HEADER + ROW.format("0.25"))
        tiny_llama(folder / "tiny")
        (folder / "learn.txt").write_text("A river moves towards an ocean or a lake. " * 60)
        (folder / "score.jsonl").write_text("".join(self.documents()))

    @staticmethod
    def documents():
        for i in range(60):
            words = [WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(40)]
            yield f'{{"title": "Title {WORDS[i % 11]} {i}", "text": "{" ".join(words)}"}}\n'

    def run(self, profile, *arguments, status=0, plan=False):
        """Run Snakemake on a profile, to this exit status; returns its output.

        `plan` lets it say first what jobs will cost, which takes seconds.
        """
        words = ["--profile", f"workflow/profiles/{profile}", *arguments]
        words += [] if plan else ["--no-hooks"]
        program = [sys.executable, "-m", "snakemake"]
        if profile == "default":
            program = [Path(fork_server.python()).with_name("snakemake")]
        done = subprocess.run(
            [*program, *words],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
        )
        output = done.stdout + done.stderr
        assert done.returncode == status, output
        return output

    def copy(self, folder):
        """The same project in another folder."""
        copy = object.__new__(Project)
        copy.folder, copy.settled = folder, None
        shutil.copytree(self.folder, folder)
        return copy

    def snakemake(self, *arguments, status=0, plan=False):
        """Run Snakemake; returns (rules that ran or would run, its output)."""
        output = self.run("default", *arguments, status=status, plan=plan)
        return rules_of(output), output

    def log(self):
        """Snakemake's own text of the last run that was none on trial."""
        return max((self.folder / ".snakemake/log").iterdir()).read_text()

    def settle(self):
        """Bring everything up to date; Snakemake starts only if a file has changed since."""
        if self.settled != self.state():
            self.snakemake()
            self.settled = self.state()

    def state(self):
        """What Snakemake decides by: texts of code and settings, and times of all other files."""
        state = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            if {".snakemake", "logs", "__pycache__"} & set(name.parts) or not path.is_file():
                continue
            at = path.lstat()
            text = name.parts[0] in (*COPIED, "config", "experiments.tsv")
            state[name] = path.read_bytes() if text else (at.st_ino, at.st_size, at.st_mtime_ns)
        return state

    def edit(self, name, old, new):
        path = self.folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    def files(self):
        """Content of every artifact, by its path."""
        return {
            path: path.read_bytes()
            for path in sorted((self.folder / "results").rglob("*"))
            if path.is_file() and "logs" not in path.parts
        }


def rules_of(text):
    """The rules of Snakemake's own text, sorted."""
    return sorted(re.findall(r"^(?:local)?rule (\w+):", text, re.MULTILINE))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project after one whole run; later tests build on what earlier ones left."""
    made = Project(tmp_path_factory.mktemp("project"))
    made.said = made.run("default", "--logger", "a3")
    rules = rules_of(made.log())
    assert rules.count("collect_together") == 1
    assert rules.count("eval_ppl") == 2  # dense and compressed
    return made


@pytest.fixture
def settled(project):
    """The project with everything up to date."""
    project.settle()
    return project


def test_nothing_touched_nothing_runs(settled):
    output = settled.run("default", "--logger", "a3")
    assert output.splitlines()[1:] == ["nothing to do: results are up to date"]
    assert "Nothing to be done" in settled.log()
    assert rules_of(settled.log()) == []


def test_a_run_prints_a_line_a_job(project):
    """Snakemake says itself which profile it uses; all else is in the log that the end names."""
    profile, *lines, end = project.said.splitlines()
    assert profile.startswith("Using profile ")
    took = r"(?:\d+ min )?[\d.]+ s"
    count = re.match(rf"(\d+) jobs done in {took}\. Full log: (\.snakemake/log/\S+)$", end)
    assert int(count[1]) == len(lines) > 10
    assert len(rules_of((project.folder / count[2]).read_text())) == len(lines) + 1  # and all
    for number, line in enumerate(lines, 1):
        assert re.match(rf"\[ ?{number}/{len(lines)}\] \w.*  [\d.]+ s\b", line), line
    scored = re.compile(r"eval ppl +tiny short rxx-w-rxx\+xkv\+rxx-w 0.25 score .* perplexity \d+")
    assert len(list(filter(scored.search, lines))) == 1
    assert sum("eval harness" in line and " acc 0." in line for line in lines) == 2


def test_a_failed_job_leaves_what_depends_on_it_to_be_made(settled, tmp_path):
    """Snakemake deletes the model, and would find tables of the old one up to date."""
    project = settled.copy(tmp_path / "copy")
    config = project.folder / "tiny/config.json"
    before = config.read_text()
    project.edit("tiny/config.json", '"num_attention_heads": 4', '"num_attention_heads": 0')
    output = project.run("default", "--logger", "a3", plan=True, status=1)
    assert "FAILED model tiny after " in output
    assert "  the end of results/logs/models/tiny.log:\n    a3: error: " in output
    assert "1 job failed, 0 of 11 done. Correct what the log says and start again" in output
    assert "Traceback" not in output
    assert "Error" not in output.replace("ZeroDivisionError", "")
    config.write_text(before)
    output = project.run("default", "--logger", "a3", "--dry-run")
    assert "model          tiny  (missing output files" in output
    assert "report  (input files updated by another job)" in output
    assert "11 jobs would run; nothing was run\n" in output


def test_ctrl_c_while_jobs_are_planned_is_no_traceback(settled, tmp_path):
    project = settled.copy(tmp_path / "copy")
    interrupted = 'command = ["sh", "-c", "kill -INT $PPID; sleep 1"]\n    try:'
    project.edit("workflow/rules/plan.smk", "try:", interrupted)
    before = project.files()
    output = project.run("default", "--forcerun", "eval_ppl", plan=True, status=1)
    assert "interrupted; nothing was run." in output
    assert "Traceback" not in output
    assert project.files() == before


def test_outputs_are_there(settled):
    table = settled.folder / "results" / "tables" / "default"
    assert (table / "report.html").stat().st_size > 10_000
    lines = (table / "results.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("tiny,dense")


def test_a_whole_run_holds_to_its_own_hashes(settled, capsys, monkeypatch):
    monkeypatch.chdir(settled.folder)  # the sources' paths are relative to it
    assert main(["verify", "results"]) == 0
    assert "not checked" not in capsys.readouterr().out


def test_two_runs_give_the_same_bytes(settled):
    before = settled.files()
    shutil.rmtree(settled.folder / "results")
    settled.snakemake()
    after = settled.files()
    timed = [path for path in before if "timing" in path.name or path.name == "timings.csv"]
    timed.append(settled.folder / "results" / "tables" / "default" / "report.html")
    assert before.keys() == after.keys()
    different = [path for path in before if before[path] != after[path] and path not in timed]
    assert different == []


def test_a_new_ratio_runs_its_own_chain_only(settled):
    with (settled.folder / "experiments.tsv").open("a") as table:
        table.write(ROW.format("0.5"))
    rules, _ = settled.snakemake()
    assert set(rules) - {"all"} == {"approx", "eval_ppl", "eval_harness"} | DOWNSTREAM
    assert rules.count("approx") == 1


def test_a_row_that_does_not_fit_is_refused_before_collecting(settled):
    table = settled.folder / "experiments.tsv"
    before = table.read_text()
    table.write_text(before + "tiny\tshort\tk-only@4\taxkv\trxx\t0.25\n")
    rules, output = settled.snakemake(status=1)
    table.write_text(before)
    assert rules == ["collect"]
    assert "statistics take" not in output
    assert not list(settled.folder.glob("results/rxx/tiny/short/o_proj_blocks*"))
    assert (
        "Modes that do: rxx-w-rxx, rxx-w-rxx-uniform, uniform-global, uniform-contiguous, "
        in output
    )
    assert "Traceback" not in output


def test_sizes_of_their_own_are_part_of_the_path(settled):
    with (settled.folder / "experiments.tsv").open("a") as table:
        table.write("tiny\tshort\trxx-w-rxx@12\txkv@0.5\tdense\t-\n")
    rules, _ = settled.snakemake()
    assert set(rules) - {"all"} == {"approx", "eval_ppl", "eval_harness"} | DOWNSTREAM
    made = settled.folder / "results/checkpoints/tiny/short/rxx-w-rxx@12+xkv@0.5+dense/-"
    assert json.loads((made / "approx.json").read_text())["ranks"] == {"qk": 12, "ov": 8}
    assert settled.snakemake()[0] == []
    again = f"{made.parent.parent.relative_to(settled.folder)}/rxx-w-rxx@12+xkv@0.50+dense/-"
    _, output = settled.snakemake("-n", f"{again}/approx.json", status=1)
    assert "spell it 0.5." in output


def test_a_change_of_the_perplexity_code(settled):
    settled.edit("a3/stages/evaluate/perplexity.py", "    losses = []", "    losses: list = []")
    rules, output = settled.snakemake("-n")
    assert set(rules) - {"all"} == {"eval_ppl"} | DOWNSTREAM
    assert "Params have changed" in output
    settled.snakemake()


def test_a_change_of_the_qk_solver(settled):
    settled.edit("a3/solutions/qk.py", "rank // 2)", "int(rank / 2))")
    rules, _ = settled.snakemake("-n")
    assert set(rules) - {"all"} == {"approx", "eval_ppl", "eval_harness", "spectra"} | DOWNSTREAM
    settled.edit("a3/solutions/qk.py", "int(rank / 2))", "rank // 2)")
    assert settled.snakemake()[0] == []


def test_a_change_of_the_calibration(settled):
    settled.edit("config/config.yaml", "tokens: 512", "tokens: 1024")
    rules, _ = settled.snakemake("-n")
    stages = {"collect_together", "approx", "eval_ppl", "eval_harness", "spectra"}
    assert set(rules) - {"all"} == stages | DOWNSTREAM
    settled.edit("config/config.yaml", "tokens: 1024", "tokens: 512")


@pytest.mark.parametrize("name", ["rxx/tiny/short/v_blocks.safetensors", "approx.json"])
def test_a_removed_file_is_built_alone(settled, name):
    path = next(path for path in settled.files() if str(path).endswith(name))
    if "rxx" not in name:
        path = settled.folder / "results/checkpoints/tiny/short/rxx-w-rxx+xkv+rxx-w/0.25" / name
    content = path.read_bytes()
    path.unlink()
    rules, _ = settled.snakemake(str(path.relative_to(settled.folder)))
    assert rules == ["collect"] if "rxx" in name else rules == ["approx"]
    assert path.read_bytes() == content
    assert settled.snakemake()[0] == []


def test_a_new_kind_is_collected_alone(settled):
    with (settled.folder / "experiments.tsv").open("a") as table:
        table.write("tiny\tshort\tdense\taxkv\tdense\t0.25\n")
    rules, output = settled.snakemake("-n")
    assert rules.count("collect") == 1
    assert "collect_together" not in rules
    assert "o_proj_blocks" in output


def test_a_ratio_that_is_shared_out_has_a_job_of_its_own(settled):
    table = settled.folder / "experiments.tsv"
    before = table.read_text()
    table.write_text(before + "tiny\tshort\tfisher~\tjoint~\tobs~\t0.25\n")
    rules, output = settled.snakemake("-n")
    table.write_text(before)
    assert [rules.count(rule) for rule in ("losses", "allocate", "approx")] == [1, 1, 1]
    assert "losses/tiny/short/fisher+joint+obs/0of1.safetensors" in output
    assert "allocations/tiny/short/fisher~+joint~+obs~/0.25.json" in output
    # For real with one component, which needs less.
    made = "results/checkpoints/tiny/short/dense+joint~+dense/0.25/approx.json"
    rules, _ = settled.snakemake(made)
    assert {"losses", "allocate", "approx"} <= set(rules)
    ranks = settled.folder / "results/allocations/tiny/short/dense+joint~+dense/0.25.json"
    found = [json.loads(path.read_text()) for path in (settled.folder / made, ranks)]
    assert found[0]["ranks"] == found[1]["ranks"]
    assert settled.snakemake(made)[0] == []
    # Another ratio, and a ratio of each layer's own, need no other losses.
    for mode, ratio in (("joint~", "0.5"), ("joint", "0.5")):
        made = f"results/checkpoints/tiny/short/dense+{mode}+dense/{ratio}/approx.json"
        assert "losses" not in settled.snakemake("-n", made)[0]
    # A target stands in place of the ratio; a loss that is to be kept is measured.
    for target in ("kv-cache@0.8", "max-loss@9"):
        made = f"results/checkpoints/tiny/short/dense+joint~+dense/{target}/approx.json"
        rules, _ = settled.snakemake("-n", made)
        assert rules == ["allocate_target", "approx"]
    settled.snakemake(made)
    ranks = settled.folder / f"results/allocations/tiny/short/dense+joint~+dense/{target}.json"
    assert json.loads(ranks.read_text())["held_out"]["increase"] <= 9
    assert settled.snakemake("-n", made)[0] == []
    table.write_text(before + "tiny\tshort\tfisher~\tjoint~\tobs~\tfit@1\n")
    assert "expected a size with its unit" in settled.snakemake("-n", status=1)[1]
    table.write_text(before)
    assert main(["verify", str(settled.folder / "results")]) == 0


def test_a_frontier_is_made_where_it_is_asked_for(project):
    """Once for all ratios of the same modes, and only of modes whose ranks are allocated."""
    names = ("experiments.tsv", "config/config.yaml")
    before = {name: (project.folder / name).read_text() for name in names}
    with (project.folder / "experiments.tsv").open("a") as table:
        table.write(
            "".join(f"tiny\tshort\tdense\tjoint~\tobs~\t{ratio}\n" for ratio in (0.25, 0.5))
        )
    project.edit("config/config.yaml", "harness: [titles]", "harness: [titles]\n  frontier: true")
    rules, output = project.snakemake("-n")
    assert rules.count("frontier") == 1
    assert "output: results/frontiers/tiny/short/dense+joint~+obs~.json" in output
    for name in before:
        (project.folder / name).write_text(before[name])


@pytest.mark.parametrize(
    ("folder", "record", "rule"),
    [
        ("models/tiny", "arch.json", "model"),
        ("checkpoints/tiny/short/dense+identity+dense/0.75", "approx.json", "approx"),
    ],
)
def test_what_a_user_puts_into_a_made_folder_stays(settled, folder, record, rule):
    """Snakemake deletes the record first; a3 still tells the stage's own files from others."""
    results = settled.folder / "results"
    target = f"results/{folder}/{record}"
    settled.snakemake(target)
    mine = results / folder / "mydata/thesis.tex"
    mine.parent.mkdir()
    mine.write_text("mine")
    settled.snakemake(target, "--forcerun", rule, status=1)
    assert not (results / folder / record).exists()
    assert "holds mydata, which" in (results / f"logs/{folder}.log").read_text()
    assert mine.read_text() == "mine"
    shutil.rmtree(mine.parent)
    assert settled.snakemake(target)[0] == [rule]
    assert not (results / folder / "mydata").exists()


def test_one_file_by_its_path_builds_only_that(settled):
    target = "results/checkpoints/tiny/short/dense+identity+dense/0.5/approx.json"
    rules, _ = settled.snakemake(target)
    assert rules == ["approx"]


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("config/config.yaml", "models:", "reference: palu\nmodels:", "reference is 'palu'"),
        ("config/config.yaml", "calibrations:", "calibration:", "Did you mean 'calibrations'"),
        ("config/config.yaml", "tokens: 512", "tokens: many", "calibrations.short.tokens"),
        ("config/config.yaml", "exclude: [learn]", "exclude: []", "texts.score.exclude"),
        ("config/config.yaml", "text: learn", "text: lerne", "'lerne'"),
        ("experiments.tsv", "xkv", "xvk", "'xvk'"),
        ("experiments.tsv", "0.25", "1.25", "ratio is 1.25"),
        ("experiments.tsv", "0.25", "-", "has no ratio or rank"),
        ("experiments.tsv", "tiny", "huge", "'huge'"),
        ("experiments.tsv", "ratio", "ration", "columns are"),
    ],
)
def test_wrong_configuration_is_named(settled, name, old, new, says):
    before = (settled.folder / name).read_text()
    settled.edit(name, old, new)
    _, output = settled.snakemake("-n", "--logger", "a3", status=1)
    (settled.folder / name).write_text(before)
    assert says in output
    assert "Traceback" not in output


def test_exports_are_made_by_their_paths_and_hold_to_their_hashes(settled, capsys):
    run = "tiny/short/uniform-global@12+xkv@12+rxx-w/0.25"
    targets = [f"results/exports/{run}/{name}" for name in ("hf/config.json", "model-f16.gguf")]
    rules, _ = settled.snakemake(*targets)
    assert rules == ["approx", "collect", "export_gguf", "export_hf"]
    assert settled.snakemake(*targets)[0] == []
    results = settled.folder / "results"
    tokenizer = results / "exports" / run / "hf/tokenizer.json"
    assert main(["verify", str(results)]) == 0
    assert "1 exports" in capsys.readouterr().out
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert main(["verify", str(results)]) == 1
    assert f"{tokenizer}: changed since it was written" in capsys.readouterr().err
    shutil.rmtree(results / "exports")


def test_lint_finds_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--lint"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Congratulations" in done.stdout + done.stderr


def test_shards_are_merged_and_a_lost_one_is_redone_alone(settled):
    """Three shards give the sums of one to rounding, and the same bytes again when redone."""
    settled.edit(
        "config/config.yaml",
        "block_length: 64}\nperplexity",
        "block_length: 64, shards: 3}\nperplexity",
    )
    folder = settled.folder / "results/rxx/tiny/short"
    # Those of the table, and not what other tests left: gradients are of too few of these blocks.
    kinds = ("q_blocks", "k_blocks", "v_blocks", "o_proj_blocks", "down_diagonal")
    paths = [folder / f"{kind}.safetensors" for kind in kinds]
    whole = {path.name: load_file(path) for path in paths}
    targets = [str(path.relative_to(settled.folder)) for path in paths]
    rules, _ = settled.snakemake(*targets)
    assert rules.count("collect_together") == 3
    assert rules.count("merge") == len(whole)
    for name, sums in whole.items():
        merged = load_file(folder / name)
        assert merged.keys() == sums.keys()
        for key, value in sums.items():
            torch.testing.assert_close(merged[key], value, rtol=1e-12, atol=0)
    before = (folder / "q_blocks.safetensors").read_bytes()
    (folder / "shards/1of3/q_blocks.safetensors").unlink()
    (folder / "q_blocks.safetensors").unlink()
    rules, _ = settled.snakemake(*targets)
    assert rules == ["collect", "merge"]
    assert (folder / "q_blocks.safetensors").read_bytes() == before
    settled.edit("config/config.yaml", ", shards: 3", "")


def test_a_large_model_has_several_files_of_weights(settled):
    """As one of more than 1 GiB has: the files of each layer, and one of what is in no layer."""
    run = "tiny/short/uniform-global+xkv+dense/0.25"
    made, export = f"results/checkpoints/{run}", f"results/exports/{run}/hf"
    settled.edit("a3/core/shards.py", "2**30", "2**14")
    settled.snakemake(f"{export}/config.json")
    settled.edit("a3/core/shards.py", "2**14", "2**30")
    for folder in (made, export):
        found = sorted(path.name for path in (settled.folder / folder).glob("*.safetensors"))
        assert found == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    AutoModelForCausalLM.from_pretrained(settled.folder / made)


def test_shards_by_several_jobs_make_the_same_model(settled):
    """Each job solves one of the two layers; the checkpoint has three files of weights."""
    made = settled.folder / "results/checkpoints/tiny/short/rxx-w-rxx+xkv+rxx-w/0.25"
    whole = load_file(made / "model.safetensors")
    with (settled.folder / "config/config.yaml").open("a") as config:
        config.write("approx_jobs: 2\n")
    rules, _ = settled.snakemake(str((made / "approx.json").relative_to(settled.folder)))
    assert rules == ["approx_shard", "approx_shard", "gather"]
    files = sorted(made.glob("*.safetensors"))
    assert [path.name[6:11] for path in files] == ["00001", "00002", "00003"]
    joined = {name: value for path in files for name, value in load_file(path).items()}
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], value) for name, value in whole.items())
    assert not list(settled.folder.glob("results/shards/**/*.*"))
    AutoModelForCausalLM.from_pretrained(made)
    settled.edit("config/config.yaml", "approx_jobs: 2\n", "")
