"""The loss on calibration and dev text, beside the predicted one: what shows overfitting."""

import json
import random
import re

import pytest
import torch
from test_workflow import Project
from tiny import document, run, tiny_llama
from transformers import AutoModelForCausalLM

import a3  # noqa: F401
from a3.artifacts.fit import said_of, warning_of
from a3.cli.main import main
from a3.core.files import read_record, write_record
from a3.models.load import load_tokenizer
from a3.stages.evaluate.fit import few_blocks
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

BLOCKS = ["--tokens", 512, "--block-length", 64, "--seed", 1]
MODES = ["--preset", "a3-plus", "--ratio", "0.25"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A dense model, two texts, and the compressed model that a3 compress makes with both."""
    work = tmp_path_factory.mktemp("fit")
    tiny_llama(work / "dense")
    (work / "text.jsonl").write_text("".join(map(document, range(40))))
    (work / "dev.jsonl").write_text("".join(map(document, range(40, 80))))
    words = [*MODES, "--text", work / "text.jsonl", "--dev-text", work / "dev.jsonl", *BLOCKS]
    run("compress", work / "dense", *words, "-o", work / "small")
    run("model", work / "dense", "-o", work / "model")
    for name in ("text", "dev"):
        run("text", work / f"{name}.jsonl", "-o", work / f"{name}/docs.jsonl")
    kinds = read_record(work / "small/approx.json")["provenance"]["statistics"]
    outputs = [work / f"rxx/{kind}.safetensors" for kind in kinds]
    run("collect", work / "model", "--text", work / "text.jsonl", *BLOCKS, "-o", *outputs)
    sharing = ["--rxx", work / "rxx", *MODES, "-o", work / "ranks.json"]
    run("allocate", work / "model", *sharing)
    return work


def fit(work, name, *others):
    """What `a3 eval fit` records of the small model."""
    texts = ["--text", work / "text/docs.jsonl", "--dev-text", work / "dev/docs.jsonl", *BLOCKS]
    run("eval", "fit", work / "dense", work / "small", *texts, *others, "-o", work / name)
    return read_record(work / name)


def block_loss(model, block):
    """By transformers itself."""
    with torch.no_grad():
        return model(block[None], labels=block[None]).loss.double()


def test_losses_are_those_of_the_models_on_the_calibrations_own_blocks(work):
    found = fit(work, "all.json", "--blocks", 8)
    before, after = (AutoModelForCausalLM.from_pretrained(work / n) for n in ("dense", "small"))
    tokenizer = load_tokenizer(work / "dense")
    for name, text in (("calibration", "text"), ("dev", "dev")):
        documents = load_documents(work / f"{text}.jsonl")
        blocks = token_blocks(documents, tokenizer, 64, 512, seed=1, bos=True)
        one, other = (torch.stack([block_loss(m, b) for b in blocks]) for m in (before, after))
        more = other - one
        said = found[name]
        assert said["blocks"] == len(blocks) == 8
        assert said["dense"] == pytest.approx(one.mean().item(), abs=1e-6)
        assert said["compressed"] == pytest.approx(other.mean().item(), abs=1e-6)
        assert said["increase"] == pytest.approx(more.mean().item(), abs=1e-6)
        assert said["stderr"] == pytest.approx(more.std().item() / 8**0.5, abs=1e-6)


def test_a_few_blocks_are_spread_over_the_calibration(work):
    text, cut = work / "text.jsonl", {"block_length": 64, "seed": 1, "bos": True}
    every = few_blocks(work / "dense", text, 99, tokens=512, **cut).blocks
    few = few_blocks(work / "dense", text, 4, tokens=512, **cut).blocks
    assert len(every) == 8
    assert torch.equal(few, every[[0, 2, 4, 7]])
    # A dev text has no tokens that were used: its first blocks.
    assert torch.equal(few_blocks(work / "dense", text, 4, **cut).blocks, every[:4])
    assert len(few_blocks(work / "dense", text, 1, tokens=512, **cut).blocks) == 1


def test_compress_and_the_stage_record_the_same(work):
    own = read_record(work / "small/approx.json")["loss"]
    found = fit(work, "fit.json", "--allocation", work / "ranks.json")
    assert own == {key: found[key] for key in ("predicted", "calibration", "dev")}
    assert own["predicted"] == read_record(work / "ranks.json")["predicted_nll"]
    streamed = fit(work, "streamed.json", "--allocation", work / "ranks.json", "--stream")
    assert {key: streamed[key] for key in own} == own


def test_the_card_and_inspect_show_it(work, capsys):
    loss = read_record(work / "small/approx.json")["loss"]
    assert f"nats a token: {said_of(loss)}." in (work / "small/README.md").read_text()
    capsys.readouterr()
    run("inspect", work / "small")
    assert f"loss over dense  {said_of(loss)}, nats a token" in capsys.readouterr().out
    # Inspect has compared all files with the record; the hidden seal names the same ones.
    seals = [read_record(work / "small" / name)["files"] for name in ("approx.json", ".a3.json")]
    assert seals[0] == seals[1]


def test_it_is_said_at_the_end_of_compress(work, capfd):
    words = [*MODES, "--text", work / "text.jsonl", *BLOCKS, "-o", work / "alone"]
    run("compress", work / "dense", *words)
    said = capfd.readouterr().out.splitlines()
    loss = read_record(work / "alone/approx.json")["loss"]
    assert loss["dev"] is None
    assert said[-2] == f"compress: loss over the dense model's, nats a token: {said_of(loss)}"
    assert said[-1].endswith("--dev-text TEXT measures it")


def test_an_overfitted_model_is_warned_of(work, capfd, monkeypatch):
    monkeypatch.setattr("a3.pipeline.predicted_loss", lambda *_: -1.0)
    monkeypatch.setattr("a3.artifacts.fit.SURE", -1e9)
    texts = ["--text", work / "text.jsonl", "--dev-text", work / "dev.jsonl"]
    run("compress", work / "dense", *MODES, *texts, *BLOCKS, "-o", work / "over")
    warning = warning_of(read_record(work / "over/approx.json")["loss"])
    assert f"compress: warning: {warning}" in capfd.readouterr().err
    assert f"**Warning**: {warning}" in (work / "over/README.md").read_text()
    run("inspect", work / "over")
    assert f"warning: {warning}" in capfd.readouterr().out


def test_modes_without_a_prediction_have_the_measured_losses_only(work):
    mixed = ["--qk", "rxx-w-rxx", "--ov", "joint~", "--mlp", "obs~", "--ratio", "0.25"]
    words = [*mixed, "--text", work / "text.jsonl", *BLOCKS, "-o", work / "mixed"]
    run("compress", work / "dense", *words)
    loss = read_record(work / "mixed/approx.json")["loss"]
    assert (loss["predicted"], loss["dev"]) == (None, None)
    assert loss["calibration"]["blocks"] == 4


def test_modes_without_statistics_are_not_fitted_to_a_text(work):
    mode = ["--qk", "dense", "--ov", "identity", "--mlp", "dense", "--ratio", "0.25"]
    short = work / "short.txt"
    short.write_text("River.")
    run("compress", work / "dense", *mode, "--text", short, "-o", work / "plain")
    assert "loss" not in read_record(work / "plain/approx.json")


@pytest.mark.parametrize(
    ("loss", "over"),
    [
        ((0.1, 0.21, 0.01), True),
        ((0.1, 0.19, 0.01), False),
        ((0.1, 0.21, 0.11), False),  # within two standard errors of nothing
        ((0.0, 1e-9, 1e-9), False),
        ((None, 5.0, 0.1), False),
    ],
)
def test_twice_the_predicted_loss_is_overfitted(loss, over):
    predicted, increase, stderr = loss
    dev = {"increase": increase, "stderr": stderr, "blocks": 4}
    said = {"predicted": predicted, "calibration": None, "dev": dev}
    assert (warning_of(said) is not None) == over
    assert warning_of(said | {"dev": None}) is None


def test_what_does_not_belong_together_is_refused(work, capsys, tmp_path):
    tiny_llama(tmp_path / "other", seed=5)
    words = [work / "small", "--text", work / "text.jsonl", *BLOCKS, "-o", tmp_path / "fit.json"]
    words = [str(word) for word in words]
    assert main(["eval", "fit", str(tmp_path / "other"), *words]) == 1
    assert "Name that model's folder" in capsys.readouterr().err
    ranks = read_record(work / "ranks.json")
    del ranks["sha256"]
    write_record(tmp_path / "ranks.json", ranks | {"modes": ranks["modes"] | {"mlp": "obs~@0.5"}})
    words += ["--allocation", str(tmp_path / "ranks.json")]
    assert main(["eval", "fit", str(work / "dense"), *words]) == 1
    assert "Name the allocation that it was made with" in capsys.readouterr().err
    assert not (tmp_path / "fit.json").exists()


def test_a_model_that_transformers_saved_again_is_measured_too(work, capsys):
    saved = AutoModelForCausalLM.from_pretrained(work / "small")
    saved.save_pretrained(work / "again")
    load_tokenizer(work / "small").save_pretrained(work / "again")
    words = ["--text", work / "text/docs.jsonl", *BLOCKS, "-o", work / "again.json"]
    run("eval", "fit", work / "dense", work / "again", *words)
    loss = read_record(work / "small/approx.json")["loss"]
    assert read_record(work / "again.json")["calibration"] == loss["calibration"]
    words = [str(word) for word in ("eval", "fit", work / "dense", work / "dense", *words)]
    assert main(words) == 1
    assert "a dense model. Name the dense folder, then a compressed one" in capsys.readouterr().err


def test_a_dev_text_that_is_too_short_is_refused_before_the_long_work(work, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("River.")
    texts = ["--text", work / "text.jsonl", "--dev-text", tmp_path / "short.txt"]
    words = ["compress", work / "dense", *MODES, *texts, *BLOCKS, "-o", tmp_path / "small"]
    assert main([str(word) for word in words]) == 1
    said = capsys.readouterr()
    assert "text too short for one block" in said.err
    assert "statistics take" not in said.out
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_the_workflow_measures_it_where_it_is_asked_to(tmp_path, monkeypatch, capsys):
    project = Project(tmp_path / "project")
    assert "fit" not in " ".join(project.snakemake("-n")[0])
    project.edit(
        "config/config.yaml", "harness: [titles]", "harness: []\n  fit: {blocks: 2, dev: score}"
    )
    project.edit("config/config.yaml", "test: 0.5, harness: 0.5", "dev: 0.5, test: 0.5")
    with (project.folder / "experiments.tsv").open("a") as table:
        table.write("tiny\tshort\tdense\tjoint~\tobs~\t0.25\n")
    project.snakemake("results/models/tiny/arch.json")
    rules, output = project.snakemake("results/tables/default/results.md", plan=True)
    assert rules.count("eval_fit") == 2
    assert re.search(r"^ *tiny +ppl +1 ", output, re.MULTILINE)
    table = (project.folder / "results/tables/default/results.md").read_text()
    assert "predicted Δ nll" in table
    assert "dev Δ nll" in table
    assert "is overfitted" in table
    folder = project.folder / "results/eval/tiny/short"
    record = read_record(folder / "dense+joint~+obs~/0.25/fit/blocks.json")
    ranks = project.folder / "results/allocations/tiny/short/dense+joint~+obs~/0.25.json"
    assert record["predicted"] == json.loads(ranks.read_text())["predicted_nll"]
    assert record["dev"]["blocks"] == 2
    monkeypatch.chdir(project.folder)
    assert main(["verify", "results"]) == 0
    assert "2 losses on calibration and dev text" in capsys.readouterr().out
    text = project.folder / "results/texts/score/dev.jsonl"
    lines = text.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    text.write_text("".join(lines))
    assert main(["verify", "results"]) == 1
    assert "dev.text_sha256" in capsys.readouterr().err
    # A dev text that has seen the calibration is refused.
    project.edit("config/config.yaml", "exclude: [learn], ", "")
    project.edit("config/config.yaml", "perplexity: [score]", "perplexity: []")
    _, output = project.snakemake("-n", status=1)
    assert "evaluate.fit.dev is scored on 'score' without excluding it" in output
