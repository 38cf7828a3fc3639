"""Perplexity on a set of texts: one pass, each text's record, the mean and the worst."""

import math
from pathlib import Path
from statistics import fmean

import pytest
import torch
from test_workflow import Project
from tiny import run, tiny_llama

from a3.artifacts.verify import Verifier
from a3.cli.main import main
from a3.core.errors import A3Error
from a3.core.files import load_yaml, read_record
from a3.experiments.config import CATALOGUE, complete
from a3.experiments.rows import check_row
from a3.models.layerwise import Streamed
from a3.texts.reading import Document, load_documents, write_documents

ROOT = Path(__file__).parents[2]
SCHEMA = load_yaml(ROOT / "workflow/schemas/config.schema.yaml")
TEXTS = {"rivers": "A river moves towards a lake. ", "code": "x = [i ** 2 for i in range(9)]\n"}
SMALL = ["--tokens", 96, "--block-length", 32]
# Keys of a result that say which code made it.
MADE = ("provenance", "sha256")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and two texts of several documents."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny_llama(folder / "dense")
    for name, text in TEXTS.items():
        some = [Document("", f"{number} {text * 3}") for number in range(20)]
        write_documents(folder / f"{name}.jsonl", some)
    return folder


def ppl(folder, out, *words):
    run("eval", "ppl", folder / "dense", "--text", *words, *SMALL, "-o", out)
    return read_record(out)


def test_each_text_of_a_set_has_the_scores_that_it_has_alone(folder, tmp_path):
    paths = [folder / f"{name}.jsonl" for name in TEXTS]
    both = ppl(folder, tmp_path / "both.json", *paths)
    hashes = {key: both[key] for key in ("checkpoint_sha256", "config_sha256")}
    for path, found in zip(paths, both["texts"], strict=True):
        alone = ppl(folder, tmp_path / f"{path.stem}.json", path)
        assert found | hashes == {key: alone[key] for key in alone if key not in MADE}
        assert found["blocks"] == 3
    assert [found["text"] for found in both["texts"]] == list(TEXTS)


def test_the_mean_weighs_texts_equally_and_the_worst_is_named(folder, tmp_path):
    paths = [folder / f"{name}.jsonl" for name in TEXTS]
    both = ppl(folder, tmp_path / "both.json", *paths, "--name", "a", "b")
    losses = [torch.tensor(found["block_nll"]) for found in both["texts"]]
    assert both["nll"] == pytest.approx(fmean(found["nll"] for found in both["texts"]))
    assert both["perplexity"] == pytest.approx(math.exp(both["nll"]))
    errors = [float(found.std()) / math.sqrt(3) for found in losses]
    expected = both["perplexity"] * math.sqrt(sum(error**2 for error in errors)) / 2
    assert both["perplexity_stderr"] == pytest.approx(expected, rel=1e-6)
    worst = max(both["texts"], key=lambda found: found["perplexity"])
    assert both["worst"] == {key: worst[key] for key in ("text", "nll", "perplexity")}
    assert both["worst"]["text"] in "ab"


def test_a_streamed_model_reads_each_layer_once_for_all_texts(folder, tmp_path, monkeypatch):
    paths = [folder / f"{name}.jsonl" for name in TEXTS]
    whole = ppl(folder, tmp_path / "whole.json", *paths)
    read: list[int] = []
    original = Streamed.layer

    def layer(self, index):
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(Streamed, "layer", layer)
    streamed = ppl(folder, tmp_path / "streamed.json", *paths, "--stream")
    # The first layer once more: to see how the model calls it.
    assert sorted(read) == [0, *range(len(set(read)))]
    assert streamed["texts"] == whole["texts"]


def test_a_seed_draws_the_order_of_documents(folder, tmp_path):
    path = folder / "rivers.jsonl"
    plain = ppl(folder, tmp_path / "plain.json", path)
    first = ppl(folder, tmp_path / "first.json", path, "--seed", 0)
    again = ppl(folder, tmp_path / "again.json", path, "--seed", 0)
    other = ppl(folder, tmp_path / "other.json", path, "--seed", 1)
    assert first == again
    assert len({each["token_ids_sha256"] for each in (plain, first, other)}) == 3
    assert (first["seed"], other["seed"]) == (0, 1)
    assert "seed" not in plain


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rivers.jsonl", "rivers.jsonl"], "rivers names two of these texts"),
        (["rivers.jsonl", "code.jsonl", "--name", "one"], "--name: found 1, expected one for each"),
        (["rivers.jsonl", "--source", "a", "b"], "--source: found 2, expected one for each of 1"),
        (["rivers.jsonl", "short.jsonl"], "short.jsonl: text too short for one block"),
    ],
)
def test_wrong_sets_are_refused(folder, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(folder)
    write_documents(folder / "short.jsonl", [Document("", "x")])
    out = tmp_path / "ppl.json"
    command = ["eval", "ppl", "dense", "--text", *words, *map(str, SMALL), "-o", str(out)]
    assert main(command) == 1
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_verify_knows_every_text_of_a_set(folder, tmp_path):
    """A text that changed is found, whichever it is."""
    results = tmp_path / "results"
    run("model", folder / "dense", "-o", results / "models/m")
    for name in TEXTS:
        run("text", folder / f"{name}.jsonl", "-o", results / f"texts/{name}/docs.jsonl")
    paths = [results / f"texts/{name}/docs.jsonl" for name in TEXTS]
    words = [*paths, "--name", *TEXTS, *SMALL, "-o", results / "eval/m/dense/ppl/kinds.json"]
    run("eval", "ppl", results / "models/m", "--text", *words)
    run("verify", results)
    run("text", folder / "rivers.jsonl", "-o", paths[1])
    verifier = Verifier(results)
    verifier.run()
    (problem,) = verifier.problems
    assert "kinds.json: text_sha256 is" in problem


# --- the configuration ---
BASE = {
    "experiments": "x",
    "calibrations": {"c": {"text": "web", "tokens": 1024}},
    "evaluate": {"perplexity": ["kinds"]},
}
ROW = dict(model="smollm2-135m", calibration="c", qk="dense", ov="xkv", mlp="dense", ratio="0.1")


@pytest.mark.parametrize("text", ["web", "code", "stories", "wiki-articles", "c4", "technical"])
def test_kinds_may_be_scored_after_calibration_on_any_source(text):
    chosen = BASE | {"calibrations": {"c": {"text": text, "tokens": 1024}}}
    check_row(ROW, complete(chosen, SCHEMA), "row 1")


@pytest.mark.parametrize("text", ["encyclopedia", "summaries", "science", "speeches"])
def test_kinds_without_a_calibration_split_are_not_calibrated_on(text):
    chosen = BASE | {"calibrations": {"c": {"text": text, "tokens": 1024}}}
    with pytest.raises(A3Error, match=f"uses the text '{text}', and perplexity 'kinds'"):
        check_row(ROW, complete(chosen, SCHEMA), "row 1")


def test_a_mixture_is_of_calibration_splits():
    mix = {"half": {"source": {"mix": {"web": 0.5, "wiki-articles": 0.5}}}}
    chosen = BASE | {"texts": mix, "calibrations": {"c": {"text": "half", "tokens": 1024}}}
    config = complete(chosen, SCHEMA)
    check_row(ROW, config, "row 1")
    del config["texts"]["web"]["split"]["calibration"]
    with pytest.raises(A3Error, match="is scored on 'web' without excluding it"):
        check_row(ROW, config, "row 1")


def test_science_and_speeches_are_in_no_choice():
    catalogue = load_yaml(CATALOGUE)
    held_out = set(catalogue["perplexity"]["kinds"]["texts"])
    held_out -= set(catalogue["perplexity"]["kinds-dev"]["texts"])
    assert held_out == {"science", "speeches"}
    assert all(catalogue["texts"][name]["split"] == {"test": 1} for name in held_out)


def test_a_set_of_undefined_texts_is_refused():
    chosen = BASE | {"perplexity": {"kinds": {"texts": ["web", "gone"]}}}
    with pytest.raises(A3Error, match=r"perplexity\.kinds names the text 'gone'"):
        complete(chosen, SCHEMA)
    chosen = BASE | {"perplexity": {"kinds": {"texts": ["web", "code"], "text": "web"}}}
    with pytest.raises(A3Error, match=r"perplexity\.kinds"):
        complete(chosen, SCHEMA)


def test_the_workflow_scores_a_set_in_one_job_and_calibrates_on_the_calibration_split(tmp_path):
    project = Project(tmp_path / "project")
    split = "{dev: 0.2, test: 0.4, calibration: 0.4}"
    texts = f"""  mine: {{source: {{path: score.jsonl}}, split: {split}}}
  half: {{source: {{mix: {{mine: 0.5, learn: 0.5}}}}}}
"""
    project.edit("config/config.yaml", "  learn: {", f"{texts}  learn: {{")
    project.edit("config/config.yaml", "  short:", "  half: {text: half, tokens: 256}\n  short:")
    entry = "  two: {texts: [mine, score], tokens: 64, block_length: 32, seed: 0}\n"
    project.edit("config/config.yaml", "perplexity:\n", f"perplexity:\n{entry}")
    made = ["results/texts/half/docs.jsonl", "results/eval/tiny/dense/ppl/two.json"]
    rules, output = project.snakemake("--printshellcmds", *made)
    assert rules == ["eval_ppl", "model", "split", "split", *["text"] * 4]
    assert "--name mine score" in output
    record = read_record(project.folder / made[1])
    assert [text["text"] for text in record["texts"]] == ["mine", "score"]
    texts = project.folder / "results/texts"
    learned = set(load_documents(texts / "mine/calibration.jsonl"))
    mixed = load_documents(texts / "half/docs.jsonl")
    assert {d.text for d in mixed if d.member == "mine"} <= {d.text for d in learned}
    assert not learned & set(load_documents(texts / "mine/test.jsonl"))
    said = read_record(texts / "half/docs.json")["provenance"]["inputs"]
    assert set(said) == {"learn/docs.jsonl", "mine/calibration.jsonl"}
    run("verify", project.folder / "results")
    # Nothing is left to do; another text of the set is another result.
    assert project.snakemake("-n", *made)[0] == []
    project.edit("config/config.yaml", "texts: [mine, score]", "texts: [score, mine]")
    assert project.snakemake("-n", *made)[0] == ["eval_ppl"]
