"""The studies of config/studies/, and what the workflow needs for the rows of a table."""

import subprocess
from pathlib import Path

import pytest

from a3.artifacts.places import Place, SurgeryPlace
from a3.core.errors import A3Error
from a3.core.files import load_yaml
from a3.experiments.config import SCHEMA, complete
from a3.experiments.needed import (
    evaluations,
    is_partly_collected,
    kinds_by_calibration,
    option_words,
    spectra_are_free,
)
from a3.experiments.rows import read_experiments, read_surgeries

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "config/studies").iterdir())
A3 = {"qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w", "ratio": "0.2"}
PAPER_KINDS = ["down_diagonal", "k_blocks", "q_blocks", "v_blocks"]


def row(calibration, **own):
    return {"model": "m", "calibration": calibration} | A3 | own


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_study_is_whole_and_its_table_has_its_name(study):
    config = load_yaml(ROOT / "config/config.yaml")
    for key, value in load_yaml(study / "config.yaml").items():
        both = isinstance(value, dict) and key not in ("evaluate", "surgery")
        config[key] = config.get(key, {}) | value if both else value
    assert config["table"] == study.name
    assert config["experiments"] == f"config/studies/{study.name}/experiments.tsv"
    whole = complete(config, load_yaml(SCHEMA))
    assert read_experiments(ROOT / whole["experiments"], whole)
    if "surgery" in whole:
        assert read_surgeries(ROOT / whole["surgery"]["rows"], whole)


def test_make_knows_every_study_and_names_them_for_a_wrong_one():
    for name in ("plus", "nosuch"):
        done = subprocess.run(
            ["make", "-n", f"study-{name}"], cwd=ROOT, capture_output=True, text=True
        )
        known = "config/studies/plus/config.yaml\na3 show results/tables/plus"
        says = known if name == "plus" else "there is no study nosuch; config/studies/ has "
        assert says in done.stdout
    assert all(study.name in done.stdout for study in STUDIES)


def test_one_pass_collects_what_its_calibration_needs_and_no_more():
    rows = [row("a"), row("b", ov="axkv"), row("a", qk="dense", ov="dense", ratio="0.4")]
    found = kinds_by_calibration(rows, [{"calibration": "c", "mode": "pca-separate-rxx"}])
    assert found["a"] == PAPER_KINDS
    assert set(found["b"]) == {*PAPER_KINDS, "o_proj_blocks"}
    assert found["c"] == ["attention_input"]


def test_spectra_are_made_of_every_calibration_where_they_are_free():
    lean = row("b", ov="dense", mlp="dense")
    assert not spectra_are_free([lean])
    assert kinds_by_calibration([lean])["b"] == ["k_blocks", "q_blocks"]
    assert spectra_are_free([row("a"), lean])
    assert kinds_by_calibration([row("a"), lean])["b"] == PAPER_KINDS


def test_a_shard_that_lacks_a_kind_makes_its_calibration_partly_collected(tmp_path):
    assert not is_partly_collected(tmp_path, ["x", "y"])
    for folder in (tmp_path, tmp_path / "shards/0of2"):
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("x", "y"):
            (folder / f"{kind}.safetensors").touch()
    assert not is_partly_collected(tmp_path, ["x", "y"])
    (tmp_path / "shards/0of2/x.safetensors").unlink()
    assert is_partly_collected(tmp_path, ["x", "y"])
    assert not is_partly_collected(tmp_path, ["z"])


def test_a_table_is_made_of_weights_and_scores():
    evaluate = {"perplexity": ["p"], "harness": ["h"], "speed": ["s"]}
    places = [Place("m"), SurgeryPlace("m", "c", mode="pca-separate", size="parameters@0.5")]
    assert evaluations(places, Path("r"), evaluate) == [
        "r/models/m/arch.json",
        "r/eval/m/dense/ppl/p.json",
        "r/eval/m/dense/harness/h.json",
        "r/checkpoints/m/c/pca-separate/parameters@0.5/approx.json",
        "r/eval/m/c/pca-separate/parameters@0.5/ppl/p.json",
        "r/eval/m/c/pca-separate/parameters@0.5/harness/h.json",
        "r/eval/m/c/pca-separate/parameters@0.5/generation/prompt.json",
    ]


def test_the_fit_of_compressed_rows_is_part_of_a_table_where_it_is_asked_for():
    evaluate = {"perplexity": [], "harness": [], "fit": {"blocks": 2}}
    small = Place("m", "c", "xkv", ratio="0.2")
    operated = SurgeryPlace("m", "c", mode="pca-separate", size="parameters@0.5")
    found = evaluations([Place("m"), small, operated], Path("r"), evaluate)
    assert [path for path in found if "/fit/" in path] == [
        "r/eval/m/c/xkv+dense+dense/0.2/fit/blocks.json"
    ]


def test_an_entry_becomes_options():
    entry = {"block_length": 8, "bos": "once", "attention": ["sdpa", "eager"], "text": "x"}
    entry |= {"apply_chat_template": True, "fewshot_as_multiturn": False}
    entry |= {"system_instruction": "-be brief"}
    names = ("block_length", "bos", "attention", "limit", "apply_chat_template")
    words = option_words(entry, (*names, "fewshot_as_multiturn", "system_instruction"))
    assert words == [
        *("--block-length", "8", "--bos-once", "--attention", "sdpa", "eager"),
        *("--apply-chat-template", "--system-instruction=-be brief"),
    ]
    assert option_words({"apply_chat_template": "-t"}, names[-1:]) == ["--apply-chat-template=-t"]


def test_a_training_is_of_a_compressed_row_and_its_text_is_not_scored(tmp_path):
    text = {"source": {"path": "x.txt"}}
    config = {
        "experiments": "x.tsv",
        "models": {"m": {"source": {"path": "m"}}},
        "texts": {"a": text, "b": text, "c": text | {"exclude": ["a"]}},
        "calibrations": {"a": {"text": "a", "tokens": 64}},
        "heal": {"short": {"text": "b", "tokens": 64}, "same": {"text": "a", "tokens": 64}},
        "perplexity": {"p": {"text": "c"}},
        "evaluate": {"perplexity": ["p"]},
    }
    whole, path = complete(config, load_yaml(SCHEMA)), tmp_path / "x.tsv"
    assert whole["heal"]["short"]["learning_rate"] == 3e-4

    def read(*cells, modes="rxx-w-rxx xkv rxx-w 0.2", columns="quantise heal"):
        names = ["model", "calibration", "qk", "ov", "mlp", "ratio", *columns.split()]
        row = ["m", "a", *modes.split(), *cells]
        path.write_text("\t".join(names) + "\n" + "\t".join(row) + "\n")
        return read_experiments(path, whole)

    assert read("-", "same")[0]["heal"] == "same"
    assert read("same", columns="heal")[0]["heal"] == "same"
    assert read("-", "-")
    for cells, options, message in (
        (("-", "long"), {}, "heal names the training 'long', which is not defined"),
        (("w4a8+none", "same"), {}, "only a compressed row that is not quantised is trained"),
        (("-", "same"), {"modes": "dense dense dense -"}, "only a compressed row"),
        (("-", "short"), {}, "heal 'short' uses the text 'b', and perplexity 'p' is scored on"),
        (("same", "-"), {"columns": "heal quantise"}, "columns are"),
    ):
        with pytest.raises(A3Error, match=message):
            read(*cells, **options)
    wrong = config | {"heal": {"short": {"text": "nosuch", "tokens": 64}}}
    with pytest.raises(A3Error, match=r"heal\.short names the text 'nosuch'"):
        complete(wrong, load_yaml(SCHEMA))
