"""Whatever changes in the files that a result is made from is seen, and nothing else is redone."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_workflow import Project
from tiny import run, tiny_llama

from a3.cli.main import main
from a3.models import inputs
from a3.models.inputs import local_inputs, mark, marks

TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: items.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: gold
"""


def older(path):
    """Give a file, and its folder, a time before all results."""
    os.utime(path, (1e9, 1e9))
    os.utime(path.parent, (1e9, 1e9))


def rewrite(path, old, new):
    """Write over a file in place."""
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    older(path)


def add(path):
    """A file that was not there."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    older(path)


def scale(folder):
    """Write over the weights in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {name: 2 * value for name, value in tensors.items()}, folder / "new", {"format": "pt"}
    )
    path.write_bytes((folder / "new").read_bytes())
    (folder / "new").unlink()
    older(path)


def replace(folder):
    """Another model's folder, by a link, all of it older."""
    other = tiny_llama(folder.with_name(f"{folder.name}-other"), seed=1)
    for path in other.iterdir():
        older(path)
    shutil.rmtree(folder)
    folder.symlink_to(other)


def through_a_link(folder):
    """As the hub's cache has its files: the link stays, what it points to does not."""
    path = folder / "config.json"
    blob = path.rename(folder.with_name(f"{folder.name}-blob"))
    path.symlink_to(blob)
    rewrite(blob, '"rope_theta": 10000.0', '"rope_theta": 500.0')


MODELS = {
    "config.json": lambda f: rewrite(
        f / "config.json", '"rope_theta": 10000.0', '"rope_theta": 5.0'
    ),
    "model.safetensors": scale,
    "tokenizer.json": lambda f: rewrite(f / "tokenizer.json", '"version"', ' "version"'),
    "tokenizer_config.json": lambda f: (f / "tokenizer_config.json").write_text("{}"),
    "chat_template.jinja": lambda f: add(f / "chat_template.jinja"),
    "additional_chat_templates/tools.jinja": lambda f: add(
        f / "additional_chat_templates/tools.jinja"
    ),
    "model-00002-of-00002.safetensors": lambda f: add(f / "model-00002-of-00002.safetensors"),
    "vocab.txt": lambda f: add(f / "vocab.txt"),
    "generation_config.json": lambda f: (f / "generation_config.json").unlink(),
    "model.safetensors and others": replace,
    "config.json through a link": through_a_link,
}
TEXTS = {
    "a.txt": lambda f: rewrite(f / "a.txt", "river", "brook"),
    "b.txt": lambda f: add(f / "b.txt"),
    "c.txt": lambda f: (f / "c.txt").unlink(),
}


def pages(folder):
    """A text in two files."""
    folder.mkdir()
    for name in "ac":
        (folder / f"{name}.txt").write_text("A river moves towards a lake.")


def verified(folder, capsys):
    """What `a3 verify` says is wrong."""
    capsys.readouterr()
    status = main(["verify", str(folder)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert "not checked" not in said.out
    return said.err if status else ""


@pytest.mark.parametrize("name", MODELS)
def test_every_file_of_a_model_is_one_of_its_inputs(tmp_path, capsys, name):
    """Whatever times say; and `a3 verify` names it, until the model is made again."""
    tiny_llama(tmp_path / "tiny")
    made, source = tmp_path / "results/models/tiny", {"path": str(tmp_path / "tiny")}
    run("model", tmp_path / "tiny", "-o", made)
    assert verified(tmp_path / "results", capsys) == ""
    before = marks(local_inputs("models", source))
    for path in (tmp_path / "tiny").iterdir():
        path.touch()
    add(tmp_path / "tiny/notes.md")
    add(tmp_path / "tiny/onnx/config.json")
    assert marks(local_inputs("models", source)) == before
    assert verified(tmp_path / "results", capsys) == ""
    MODELS[name](tmp_path / "tiny")
    assert marks(local_inputs("models", source)) != before
    said = verified(tmp_path / "results", capsys)
    assert re.search(rf"{re.escape(name.split()[0])}(: | changed| is new| is gone)", said)
    if "00002" not in name:
        shutil.rmtree(made)
        run("model", tmp_path / "tiny", "-o", made)
        assert verified(tmp_path / "results", capsys) == ""


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_of_a_text_is_one_of_its_inputs(tmp_path, capsys, name):
    pages(tmp_path / "pages")
    source = {"path": str(tmp_path / "pages")}
    text = json.dumps({"source": source, "format": "text"})
    run("text", text, "-o", tmp_path / "results/texts/pages/docs.jsonl")
    before = marks(local_inputs("texts", source))
    add(tmp_path / "pages/notes.log")
    assert marks(local_inputs("texts", source)) == before
    assert verified(tmp_path / "results", capsys) == ""
    TEXTS[name](tmp_path / "pages")
    assert marks(local_inputs("texts", source)) != before
    said = verified(tmp_path / "results", capsys)
    what = {"a": "changed", "b": "is new", "c": "is gone"}[name[0]]
    assert f"made from {tmp_path / 'pages'}, where since then {name} {what}. Delete" in said


def test_files_of_other_formats_are_their_own_inputs(tmp_path):
    for name in ("m.gguf", "text.jsonl", "text.parquet"):
        (tmp_path / name).write_text("one")
        for section in ("models", "texts"):
            source = {"path": str(tmp_path / name)}
            before = marks(local_inputs(section, source))
            assert before == {str(tmp_path / name): mark(tmp_path / name)}
            (tmp_path / name).write_text("two" + section)
            assert marks(local_inputs(section, source)) != before
    # What is not there stays an input, so that it is said which is missing.
    assert local_inputs("models", {"path": "nowhere"}) == [Path("nowhere")]
    assert local_inputs("models", {"hub": "owner/name", "revision": "main"}) == []


def test_large_files_are_read_in_pieces(tmp_path, monkeypatch):
    """Other content of the same size is seen wherever most of it is another; so is another size."""
    monkeypatch.setattr(inputs, "LARGE", 1000)
    monkeypatch.setattr(inputs, "PIECE", 10)
    path = tmp_path / "weights"
    path.write_bytes(bytes(5000))
    before = mark(path)
    path.touch()
    assert mark(path) == before
    for content in (bytes(5001), b"1" + bytes(4999), bytes(4999) + b"1", bytes(2000) + b"1" * 3000):
        path.write_bytes(content)
        assert mark(path) != before


def test_a_file_that_comes_to_a_built_folder_is_refused(tmp_path, capsys):
    """transformers would read it; what it does not read may lie there."""
    tiny_llama(tmp_path / "tiny")
    made = tmp_path / "results/models/tiny"
    run("model", tmp_path / "tiny", "-o", made)
    for name in ("notes.md", "ppl.json"):
        (made / name).write_text("{}")
    assert verified(tmp_path / "results", capsys) == ""
    (made / "chat_template.jinja").write_text("{{ messages }}")
    assert "its record does not name chat_template.jinja" in verified(tmp_path / "results", capsys)
    (tmp_path / "text.txt").write_text("A river moves towards an ocean or a lake. " * 60)
    words = ["eval", "ppl", made, "--text", tmp_path / "text.txt", "-o", tmp_path / "ppl.json"]
    assert main([str(word) for word in words]) == 1
    assert "its record does not name chat_template.jinja. Build" in capsys.readouterr().err


def jobs(output):
    """What would run: rules, each with the model or text that it is for."""
    found = re.findall(r"^(?:local)?rule (\w+):\n.*?wildcards: (.*?)$", output, re.M | re.S)
    return {(rule, re.search(r"(?:model|text)=([\w]+)", said)[1]) for rule, said in found}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project of three models, two texts and a local task, all of them built."""
    made = Project(tmp_path_factory.mktemp("inputs"))
    for name in ("edited", "linked"):
        shutil.copytree(made.folder / "tiny", made.folder / name)
    for name in ("kept", "pages"):
        pages(made.folder / name)
    (made.folder / "mine.yaml").write_text(TASK)
    items = [{"query": "A river", "choices": ["moves", "is"], "gold": i % 2} for i in range(4)]
    (made.folder / "items.json").write_text(json.dumps(items))
    for section, names in (("models", ("edited", "linked")), ("texts", ("kept", "pages"))):
        ending = ", format: text" if section == "texts" else ""
        lines = [f"  {name}: {{source: {{path: {name}}}{ending}}}\n" for name in names]
        made.edit("config/config.yaml", f"{section}:\n", f"{section}:\n{''.join(lines)}")
    made.edit("config/config.yaml", "harness:\n", "harness:\n  mine: {yaml: mine.yaml}\n")
    made.targets = [f"results/models/{name}/arch.json" for name in ("edited", "linked")]
    made.targets += [f"results/texts/{name}/docs.jsonl" for name in ("kept", "pages")]
    made.targets += ["results/eval/tiny/dense/harness/mine.json"]
    made.snakemake(*made.targets)
    return made


def test_snakemake_builds_again_what_changed_and_nothing_else(project, monkeypatch, capsys):
    """All changes are older than the results, but for a touch and a note, which change nothing."""
    monkeypatch.chdir(project.folder)
    assert verified(project.folder / "results", capsys) == ""
    (project.folder / "tiny/config.json").touch()
    (project.folder / "tiny/notes.md").write_text("A note.")
    MODELS["config.json"](project.folder / "edited")
    replace(project.folder / "linked")
    TEXTS["c.txt"](project.folder / "pages")
    rewrite(project.folder / "items.json", "river", "brook")
    stale = {("model", "edited"), ("model", "linked"), ("text", "pages"), ("eval_harness", "tiny")}
    assert jobs(project.snakemake("-n", *project.targets)[1]) == stale
    said = verified(project.folder / "results", capsys)
    for one in (
        "models/edited/arch",
        "models/linked/",
        "texts/pages/docs",
        "task_files items.json",
    ):
        assert one in said
    assert "4 problems" in said
    assert jobs(project.snakemake(*project.targets)[1]) == stale
    assert verified(project.folder / "results", capsys) == ""
    assert project.snakemake("-n", *project.targets)[0] == []
    made = json.loads((project.folder / "results/models/edited/config.json").read_text())
    assert made["rope_parameters"]["rope_theta"] == 5.0
