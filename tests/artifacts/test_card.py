"""The model card of a compressed folder, and what is put into it later."""

import json
import shutil

import pytest
import yaml
from tiny import run, tiny_llama

from a3.artifacts.card import base_of
from a3.cli.main import main
from a3.core.errors import A3Error
from a3.models.checkpoint import Checkpoint, front_matter

BLOCKS = ["--tokens", "256", "--block-length", "64"]
BASE = """---
license: other
license_name: river-licence
license_link: LICENSE
language: [en]
base_model: somebody/older
model-index: [{name: Base, results: []}]
---
# Base

Perplexity 3.
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A dense folder with a card, the compressed one, and both perplexities on one text."""
    work = tmp_path_factory.mktemp("card")
    dense = tiny_llama(work / "dense")
    (dense / "README.md").write_text(BASE)
    (dense / "LICENSE").write_text("Rivers are free.")
    text = work / "text.txt"
    text.write_text("A river moves towards an ocean, or a lake. " * 60)
    run("compress", dense, "--ratio", "0.25", "-o", work / "small", "--text", text, *BLOCKS)
    for name in ("dense", "small"):
        run("eval", "ppl", work / name, "--text", text, *BLOCKS, "-o", work / f"{name}.json")
    return work


def test_the_card_says_what_the_folder_is(work):
    card = (work / "small" / "README.md").read_text()
    data = yaml.safe_load(card.split("---")[1])
    assert data["base_model"] == "dense"
    assert data["library_name"] == "transformers"
    carried = {key: data[key] for key in ("license", "license_name", "license_link", "language")}
    assert carried == {
        "license": "other",
        "license_name": "river-licence",
        "license_link": "LICENSE",
        "language": ["en"],
    }
    record = json.loads((work / "small" / "approx.json").read_text())
    for size in (record["size"]["dense"], record["size"]["compressed"]):
        assert all(f" {value:,} |" in card for value in size.values())
    errors = [layer["ov"]["relative_error"] for layer in record["layers"]]
    assert f"| `xkv@0.25` | 12 of 16 | {sum(errors) / 2:.3g}, {max(errors):.3g} |" in card
    assert "256 tokens of a local file" in card
    assert "trust_remote_code=True" in card
    assert record["weights_sha256"] in card
    assert "Not measured yet" in card
    # The base model's own claims are not the compressed one's, its licence is.
    assert "Perplexity 3" not in card
    assert "model-index" not in data
    assert (work / "small" / "LICENSE").read_text() == "Rivers are free."


def card(folder, dense, compressed):
    return main(["card", *map(str, (folder, "--dense", dense, "--compressed", compressed))])


def test_perplexities_are_added_and_the_record_holds_the_new_card(work, tmp_path):
    folder = shutil.copytree(work / "small", tmp_path / "small")
    assert card(folder, work / "dense.json", work / "small.json") == 0
    text = (folder / "README.md").read_text()
    said = [json.loads((work / f"{name}.json").read_text()) for name in ("dense", "small")]
    values = (f"{one['perplexity']:.2f} ± {one['perplexity_stderr']:.2f}" for one in said)
    assert f"| text, test, blocks of 64, float32 | 252 | {' | '.join(values)} |" in text
    Checkpoint(folder).verify_all()
    # Again gives the same, and a card that somebody else changed is seen.
    assert card(folder, work / "dense.json", work / "small.json") == 0
    assert (folder / "README.md").read_text() == text
    (folder / "README.md").write_text(text.replace("±", "+"))
    with pytest.raises(A3Error, match=r"README\.md: changed since"):
        Checkpoint(folder)


def test_results_of_other_weights_or_protocols_are_refused(work, tmp_path, capsys):
    folder = shutil.copytree(work / "small", tmp_path / "small")
    before = (folder / "README.md").read_text()
    assert card(folder, work / "small.json", work / "dense.json") == 1
    assert "the result is of another model" in capsys.readouterr().err
    other = tmp_path / "other.json"
    options = ["--tokens", "128", "--block-length", "64", "-o", str(other)]
    main(["eval", "ppl", str(work / "small"), "--text", str(work / "text.txt"), *options])
    assert card(folder, work / "dense.json", other) == 1
    assert "different protocols: blocks is 2 here and 4 there" in capsys.readouterr().err
    two = ["--dense", str(work / "dense.json"), str(other), "--compressed", str(other)]
    assert main(["card", str(folder), *two]) == 1
    assert "2 dense results, 1 compressed ones" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == before


@pytest.mark.parametrize(
    "content",
    ["", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: 2020-99-99\n---\n", "\xff"],
)
def test_a_damaged_card_of_the_base_model_says_nothing(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content.encode("latin-1"))
    assert front_matter(tmp_path / "README.md") == {}


def test_only_text_of_a_base_card_is_carried(tmp_path):
    (tmp_path / "mine").mkdir()
    card = tmp_path / "mine" / "README.md"
    card.write_text("---\nlicense: [mit]\nlicense_name: 2020-01-01\nlanguage: no\n---\n")
    assert base_of(None, card) == {"name": "mine", "commit": None, "license": ["mit"]}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"hub": "owner/name", "revision": "main"}, "owner/name"),
        ({"wheel": {"member": "pack/Small-1B.Q4_1.gguf"}}, "Small-1B.Q4_1"),
        ({"path": "/home/somebody/models/mine"}, "mine"),
        ({"repeat_kv": "llama"}, "llama"),
        ({"train": {}}, None),
    ],
)
def test_names_of_base_models(tmp_path, source, name):
    model = {"source": source, "licence": "mit", "commit": "c0ffee"}
    found = base_of(model, tmp_path / "README.md")
    assert found == {"name": name, "commit": "c0ffee", "license": "mit"}
