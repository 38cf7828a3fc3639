"""Rows that are trained: a stage, a place and a method of their own, beside training-free rows."""

import json
import re

import pandas as pd
from test_workflow import HEADER, ROW, Project

from a3.cli.main import main
from a3.core.files import sha256
from a3.texts.reading import Document, write_documents

HEAL = """
heal:
  quick: {text: train, tokens: 640, block_length: 64, learning_rate: 0.001}
"""


def test_a_trained_row_has_its_own_place_method_and_column(tmp_path, monkeypatch, capsys):
    project = Project(tmp_path / "project")
    folder = project.folder
    text = "train: {source: {path: boats.jsonl}, split: {test: 0.3, calibration: 0.7}}"
    project.edit("config/config.yaml", "texts:\n", f"texts:\n  {text}\n")
    project.edit("config/config.yaml", "exclude: [learn]", "exclude: [learn, train]")
    with (folder / "config/config.yaml").open("a") as config:
        config.write(HEAL)
    boats = (f"In {i} harbours {7 * i} boats were counted by {i} men. " for i in range(200))
    write_documents(folder / "boats.jsonl", [Document("", one) for one in boats])
    rows = [ROW.format("0.25").rstrip("\n") + f"\t{cell}\n" for cell in ("-", "quick")]
    (folder / "experiments.tsv").write_text(HEADER.rstrip("\n") + "\theal\n" + "".join(rows))
    rules, _ = project.snakemake()
    assert rules.count("heal") == rules.count("approx") == 1
    assert rules.count("eval_ppl") == 3

    made = folder / "results/healed/tiny/short/rxx-w-rxx+xkv+rxx-w/0.25/heal-quick"
    record = json.loads((made / "approx.json").read_text())
    assert record["healed"]["tokens"] == 640
    said = record["provenance"]
    assert said["skipped_blocks"] == 0  # another text
    # Only the part that may be learned from.
    assert said["text_sha256"] == sha256(folder / "results/texts/train/calibration.jsonl")
    table = pd.read_csv(folder / "results/tables/default/results.csv", dtype=str)
    assert table["heal"].fillna("-").tolist() == ["-", "-", "quick"]
    assert table["trained_tokens"].fillna("").str.removesuffix(".0").tolist() == ["", "", "640"]
    assert table["score.perplexity"].nunique() == 3
    seconds = pd.read_csv(folder / "results/tables/default/timings.csv")
    assert seconds["heal.seconds"].notna().tolist() == [False, False, True]
    said = (folder / "results/tables/default/results.md").read_text()
    assert "rxx-w-rxx + xkv + rxx-w + heal-quick" in said
    assert "trained on tokens" in said

    page = (folder / "results/tables/default/report.html").read_text()
    free, trained = (
        f"{start} of the smallest models at each ratio: at 0.25, "
        for start in ("Best", "Best after training (a3 heal)")
    )
    assert re.search(re.escape(free) + r"[^;]* by a3, which", page)
    assert re.search(re.escape(trained) + r"[^;]* by a3\+heal-quick, which", page)

    monkeypatch.chdir(folder)
    assert main(["verify", "results"]) == 0
    found = capsys.readouterr().out
    assert "1 trained checkpoints" in found
    assert "not checked" not in found
    assert project.snakemake()[0] == []
    # Another budget trains again, and nothing before that.
    project.edit("config/config.yaml", "tokens: 640", "tokens: 128")
    rules, _ = project.snakemake()
    assert set(rules) & {"collect", "collect_together", "approx", "heal"} == {"heal"}
