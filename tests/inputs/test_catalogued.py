"""Texts of the catalogue by name: members of mixtures, splits, and what is excluded."""

import json

import pytest
import yaml

from a3.cli.main import main
from a3.core.errors import A3Error
from a3.core.files import load_yaml, read_record
from a3.experiments.entries import CATALOGUE
from a3.stages.inputs import catalogued
from a3.stages.inputs.split import exclude_and_split
from a3.stages.inputs.text import make_documents
from a3.texts.reading import Document, load_documents, write_documents

SHARES = {"dev": 0.3, "test": 0.3, "calibration": 0.4}


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A catalogue of two texts, of which `pages` has splits and excludes `plain`, and a mixture."""
    plain = [Document("", f"the plain text of number {number} " * 4) for number in range(30)]
    pages = [Document("", f"page {number} says nothing new about it " * 4) for number in range(60)]
    write_documents(tmp_path / "plain.jsonl", plain)
    write_documents(tmp_path / "pages.jsonl", [*pages, plain[3]])
    found = {
        "plain": {"source": {"path": str(tmp_path / "plain.jsonl")}},
        "pages": {
            "source": {"path": str(tmp_path / "pages.jsonl")},
            "exclude": ["plain"],
            "split": SHARES,
        },
        "mixed": {"source": {"mix": {"plain": 0.5, "pages": 0.5}}},
        "unseen": {"source": {"path": str(tmp_path / "pages.jsonl")}, "exclude": ["mixed"]},
    }
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"texts": found}))
    monkeypatch.setattr(catalogued, "CATALOGUE", path)
    return found


def made(texts, name, folder, split):
    folder.mkdir()
    catalogued.make_text(texts[name], folder, folder / "docs.jsonl", split)
    return load_documents(folder / "docs.jsonl")


def test_a_mixture_has_the_documents_that_the_workflow_gives_it(texts, tmp_path):
    found = made(texts, "mixed", tmp_path / "found", "calibration")
    for name in ("plain", "pages"):
        make_documents(texts[name], None, (), tmp_path / f"by/{name}/docs.jsonl")
    pages, plain = (tmp_path / f"by/{name}/docs.jsonl" for name in ("pages", "plain"))
    exclude_and_split(pages, [plain], SHARES, pages.parent)
    members = [pages.with_name("calibration.jsonl"), plain]
    make_documents(texts["mixed"], None, members, tmp_path / "expected.jsonl")
    assert found == load_documents(tmp_path / "expected.jsonl")
    said = read_record(tmp_path / "found/docs.json")
    assert said["source"] == read_record(tmp_path / "expected.json")["source"]


def test_a_split_text_serves_each_use_with_its_own_split(texts, tmp_path):
    uses = ("calibration", "dev", "test")
    found = {use: made(texts, "pages", tmp_path / use, use) for use in uses}
    all_of_it = [document for use in uses for document in found[use]]
    assert len(all_of_it) == len(set(all_of_it)) == 60
    assert all(found.values())
    assert read_record(tmp_path / "dev/docs.json")["provenance"]["split"] == "dev"


def test_a_text_without_splits_serves_whole_but_not_what_calibration_reads(texts, tmp_path):
    assert len(made(texts, "plain", tmp_path / "plain", "dev")) == 30
    # It is the same text as `pages`, all of which the mixture may read.
    with pytest.raises(A3Error, match="all 61 documents occur in the calibration texts"):
        made(texts, "unseen", tmp_path / "unseen", "dev")


def test_what_the_calibration_reads_is_no_dev_text(texts, tmp_path):
    for text in ("plain", "mixed"):
        with pytest.raises(A3Error, match="the calibration reads all of it"):
            catalogued.require_apart(texts[text], texts["plain"])
    # Of these the calibration has only a split, or nothing.
    for text, dev in (("mixed", "pages"), ("pages", "pages"), ("pages", "plain")):
        catalogued.require_apart(texts[text], texts[dev])
    with pytest.raises(A3Error, match="a mixture of plain, pages serves for calibration only"):
        made(texts, "mixed", tmp_path / "mixed", "dev")
    texts["pages"]["split"] = {"test": 0.5, "calibration": 0.5}
    with pytest.raises(A3Error, match="none of it is for dev; it has test, calibration"):
        made(texts, "pages", tmp_path / "pages", "dev")


def test_members_and_excluded_texts_of_the_catalogue_can_be_made_by_name():
    texts = load_yaml(CATALOGUE)["texts"]
    for member in texts["mixture"]["source"]["mix"]:
        assert "mix" not in texts[member]["source"]
        assert not set(texts[member].get("exclude", [])) - set(texts)
    assert sum(texts["mixture"]["source"]["mix"].values()) == pytest.approx(1)


def test_a3_text_makes_a_mixture_of_the_catalogue(texts, tmp_path, capsys):
    entry = json.dumps(texts["mixed"])
    assert main(["text", entry, "-o", str(tmp_path / "mixed.jsonl")]) == 0
    assert load_documents(tmp_path / "mixed.jsonl") == made(
        texts, "mixed", tmp_path / "found", "calibration"
    )
    gone = json.dumps({"source": {"mix": {"plain": 0.5, "gone": 0.5}}})
    assert main(["text", gone, "-o", str(tmp_path / "gone.jsonl")]) == 1
    assert "its member 'gone' is not in the catalogue" in capsys.readouterr().err
    assert not (tmp_path / "gone.jsonl").exists()
