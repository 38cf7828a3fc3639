"""Nothing of the user's is written over: a target is looked at before anything is computed."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import BLOCK, document, run, tiny_llama

from a3.artifacts import targets
from a3.cli.main import main, parser
from a3.core.errors import A3Error
from a3.core.files import HIDDEN_SEAL, write_record
from a3.experiments.config import check_models_made, check_outside
from a3.models.checkpoint import hash_files
from a3.stages.inputs.model import resolve_model
from a3.stages.inputs.train import Recipe, train

M, D, RX = "models/m", "texts/d.jsonl", "rx"
ROWS = json.dumps([{"model": "m"}])
TABLE = ["--results", "results", "--experiments", ROWS]
OPERATIONS = json.dumps([{"model": "m", "calibration": "c", "mode": "x", "size": "y"}])
TRAIN = {"config": {"model_type": "gpt2"}, "text": "t", "vocab_size": 300, "steps": 1}
TRAIN |= {"batch_size": 1, "block_length": 8, "learning_rate": 0.1, "seed": 0}
# Of every command that writes: its words, what it reads, and the end of the name of a file.
COMMANDS = {
    "compress": ([M, "--ratio", "0.2", "--text", D], M, ""),
    "collect": ([M, "--text", D], M, "v_blocks.safetensors"),
    "merge": (["rx/v_blocks.safetensors"], "rx/v_blocks.safetensors", "v_blocks.safetensors"),
    "losses": ([M, "--rxx", RX, "--preset", "a3-plus"], M, ".safetensors"),
    "frontier": ([M, "--rxx", RX, "--text", D], M, ".json"),
    "allocate": ([M, "--rxx", RX, "--mlp", "obs~", "--ratio", "0.2"], M, ".json"),
    "approx": ([M, "--rxx", RX, "--ratio", "0.2"], M, ""),
    "approx --shard": ([M, "--rxx", RX, "--ratio", "0.2", "--shard", "0of1"], M, ".safetensors"),
    "gather": ([M, "rx/0of1.safetensors"], M, ""),
    "surgery": ([M, "--size", "variance@0.5"], M, ""),
    "quantise": ([M, "--rxx", RX, "--rank", "4"], M, ""),
    "heal": ([M, "--teacher", "models/n", "--text", D], M, ""),
    "export hf": ([M], M, ""),
    "export dense": ([M], M, ""),
    "export gguf": ([M], M, ".gguf"),
    "export onnx": ([M], M, ""),
    "eval ppl": ([M, "--text", D], M, ".json"),
    "eval fit": ([M, "models/n", "--text", D], M, ".json"),
    "eval harness": ([M, "--task", "x", "--items", D], M, ".json"),
    "eval generation": ([M, "--prompt", "x"], M, ".json"),
    "eval speed": ([M, "models/n"], M, ".json"),
    "wheel": (["x", "1", "0" * 64], None, ".whl"),
    "model": ([M], M, ""),
    "convert": ([M], M, ""),
    "train": ([json.dumps({"source": {"train": TRAIN}}), "--text", D], D, ""),
    "text": ([D], D, ".jsonl"),
    "split": ([D], D, ""),
    "items": ([D, "--items", "4"], D, ""),
    "spectra": ([M, "--rxx", RX], M, ".json"),
    "tables": (TABLE, "results", ""),
    "figures": (TABLE, "results", ""),
    "speed-table": ([*TABLE, "--speed", "x"], "results", ""),
    "surgery-table": (["--results", "results", "--surgeries", OPERATIONS], "results", ""),
    "surgery-figures": (["--results", "results", "--surgeries", OPERATIONS], "results", ""),
    "report": ([*TABLE, "--tables", "results/t", "--config", "{}"], None, ".html"),
    "paper rows": (["p.yaml", "--model", "m", "--results", "results"], "p.yaml", ".csv"),
    "paper compare": (["p.yaml"], "p.yaml", ""),
}
TARGETS = [
    "/", "a detour to /", "no UTF-8",
    "the source", "its parent", "its child", "a link to it", "a link to its parent", ".", "..",
    "a foreign folder", "a foreign file", "a link to a foreign file", "below a file",
    "a long name", "below a long name", "a loop of links", "a detour",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folders; no model in it is a real one: nothing has to be read."""
    work = tmp_path_factory.mktemp("home") / "work"
    for name in (*(f"models/{m}/{f}" for m in "mn" for f in ("config.json", "model.safetensors")),
                 D, "rx/v_blocks.safetensors", "rx/0of1.safetensors", "results/t/mine.txt",
                 "p.yaml", "foreign/thesis.tex", "thesis.tex"):  # fmt: skip
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(f"{name} is mine")
    return work


def state(folder):
    """Every path in a folder, with its content or where it points."""
    return {
        str(path): str(path.readlink())
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def leaves(one, words=()):
    """Every command, with its parser."""
    below = [a for a in one._actions if a.dest == "==SUPPRESS==" and a.choices]
    if not below:
        yield " ".join(words), one
    for name, child in below[0].choices.items() if below else ():
        yield from leaves(child, (*words, name))


def test_every_command_with_an_output_says_what_it_writes():
    writing = {name: one for name, one in leaves(parser()) if "--out" in one._option_string_actions}
    assert all(isinstance(one.get_default("writes"), targets.Target) for one in writing.values())
    assert writing.keys() == COMMANDS.keys() - {"approx --shard"}


def place(target, home, source, ending):
    """Where a command is to write."""
    has_source, source = source is not None, source or "models/m"
    name = ending if ending and not ending.startswith(".") else f"out{ending}"
    if target.startswith("a link"):
        to = {"a link to it": source, "a link to its parent": str(Path(source).parent)}
        link = home / name
        link.unlink(missing_ok=True)
        link.symlink_to(home / to.get(target, "thesis.tex"))
        return link
    if target == "a loop of links":
        (home / "loop").unlink(missing_ok=True)
        (home / "loop").symlink_to("loop")
        return home / "loop" / name
    if target == "a foreign file":
        (home / name).write_text("mine")
    if target == "its child" and not has_source:
        return f"thesis.tex/{name}"
    if target == "its child" and source == "results":
        # Tables lie in the folder of results, but with nothing else.
        return "results/t"
    return {
        "the source": source,
        "its parent": str(Path(source).parent),
        "its child": f"{source}/{name}",
        ".": ".",
        "..": "..",
        "/": "/",
        "a detour to /": f"/{home.parts[1]}/..",
        "no UTF-8": f"out\udcff{ending}",
        "a foreign folder": "foreign",
        "a foreign file": name,
        "below a file": f"thesis.tex/deep/{name}",
        "a long name": "x" * (250 - len(name)) + name,
        "below a long name": f"{'x' * 300}/{name}",
        "a detour": f"foreign/../nowhere/../{source}",
    }[target]


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_there_stays(home, tmp_path, monkeypatch, capsys, target):
    """Every command, each with this target."""
    work = tmp_path / "work"
    shutil.copytree(home, work)
    monkeypatch.chdir(work)
    for command, (words, source, ending) in COMMANDS.items():
        out = place(target, work, source, ending)
        before = state(work.parent)
        named = command.removesuffix(" --shard").split()
        assert main([*named, *words, "-o", str(out)]) == 1, (command, out)
        said = capsys.readouterr().err
        assert said.startswith("a3: error: "), said
        assert len(said.splitlines()) == 1, said
        assert state(work.parent) == before, command


def test_it_is_refused_before_anything_is_imported(home, tmp_path):
    """Of all commands at once: torch takes seconds, and so would what they compute."""
    code = (
        "import sys, json; from a3.cli.main import main\n"
        "for words in json.loads(sys.argv[1]): assert main(words) == 1, words\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    words = [
        [*command.removesuffix(" --shard").split(), *words, "-o", "."]
        for command, (words, *_) in COMMANDS.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words)], cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(COMMANDS)


# --- what the same stage wrote -------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A dense folder, documents, statistics, a compressed folder and a result, by commands."""
    folder = tmp_path_factory.mktemp("made")
    tiny_llama(folder / "source")
    (folder / "cal.jsonl").write_text("".join(map(document, range(40))))
    for words in stages(folder):
        run(*words)
    return folder


def stages(folder):
    """Commands with what they write."""
    rxx = [folder / f"rxx/{k}.safetensors" for k in ("q_blocks", "k_blocks", "v_blocks")]
    modes = ["--mlp", "dense", "--ratio", "0.25", "-o", folder / "small"]
    scoring = ["--text", folder / "docs.jsonl", "--tokens", "256", *BLOCK]
    return [
        ["model", folder / "source", "-o", folder / "dense"],
        ["text", folder / "cal.jsonl", "-o", folder / "docs.jsonl"],
        ["split", folder / "docs.jsonl", "-o", folder / "splits"],
        ["items", folder / "docs.jsonl", "--items", "4", "-o", folder / "items"],
        ["collect", folder / "dense", *scoring, "-o", *rxx],
        ["approx", folder / "dense", "--rxx", folder / "rxx", *modes],
        ["eval", "ppl", folder / "small", *scoring, "-o", folder / "ppl.json"],
    ]


def test_a_stage_does_again_what_it_did(made):
    before = {k: v for k, v in state(made).items() if "timing" not in k and "approx" not in k}
    for words in stages(made):
        run(*words)
    again = state(made)
    assert {k: again[k] for k in before} == before
    hidden = {path.name for path in made.rglob("*") if path.name.startswith(".")}
    assert hidden == {HIDDEN_SEAL}


def put(folder):
    """A folder, in place of what is there, with a file in it."""
    folder.unlink(missing_ok=True)
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")


def test_a_folder_without_its_record_is_the_stages_own(made, tmp_path):
    """Snakemake deletes outputs before a job makes them again."""
    copy = tmp_path / "made"
    shutil.copytree(made, copy, symlinks=True)
    for name in ("approx.json", "timing.json", "config.json"):
        (copy / "small" / name).unlink()
    run(*stages(copy)[5])
    assert {p.name for p in (copy / "small").iterdir()} == {
        p.name for p in (made / "small").iterdir()
    }


def test_a_folder_with_chat_templates_is_made_again(tmp_path, capsys):
    source = tiny_llama(tmp_path / "source")
    template = source / "additional_chat_templates/tool_use.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages }}")
    for _ in range(2):
        run("model", source, "-o", tmp_path / "dense")
    (tmp_path / "dense/additional_chat_templates/mine.txt").write_text("mine")
    assert main(["model", str(source), "-o", str(tmp_path / "dense")]) == 1
    assert "holds additional_chat_templates/mine.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: (m / "small/notes.txt").write_text("mine"), "holds notes.txt"),
        (lambda m: (m / "small/trained").mkdir(), "holds trained"),
        (lambda m: (m / "small/config.json").write_text("{}"), "config.json in it was changed"),
        (lambda m: (m / "small/model.safetensors").write_text("x"), "model.safetensors in it was"),
        (lambda m: (m / "small/train.json").write_text('{"my": 1}'), "holds train.json"),
        (lambda m: shutil.copy(m / "dense/arch.json", m / "small/arch.json"), "holds arch.json"),
        (lambda m: (m / "small/export.json").mkdir(), "holds export.json"),
        (lambda m: (m / "small/timing.json").write_text('{"my": 1}'), "no sha256"),
        (lambda m: put(m / "small/timing.json"), "holds timing.json"),
        (lambda m: put(m / "small/approx.json"), "holds approx.json"),
        (lambda m: put(m / "small/additional_chat_templates"), "holds additional_chat_templates"),
        (lambda m: (m / "small/.a3.json").write_text('{"my": 1}'), "no sha256"),
        (lambda m: [(m / "small" / f).unlink() for f in ("approx.json", ".a3.json")], "no approx"),
        # Snakemake deletes what it knows as outputs.
        (lambda m: ((m / "small/approx.json").unlink(), put(m / "small/mine")), "holds mine"),
        (lambda m: [(m / "small/approx.json").unlink(), (m / "small/config.json").write_text("")],
         "config.json in it was changed"),
        (lambda m: shutil.copy(m / "dense/arch.json", m / "small/approx.json"), "another stage"),
        (lambda m: (m / "small/approx.json").write_text('{"provenance": 1}'), "no sha256"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_longer_only_the_stages_own_stays(
    made, tmp_path, capsys, monkeypatch, change, says
):
    copy = tmp_path / "made"
    shutil.copytree(made, copy, symlinks=True)
    change(copy)
    before = state(copy)
    assert main([str(word) for word in stages(copy)[5]]) == 1
    assert says in capsys.readouterr().err
    assert state(copy) == before


@pytest.mark.parametrize(
    ("stage", "name", "content"),
    [
        (1, "docs.jsonl", '{"text": "edited"}\n'),
        (1, "docs.json", "{}"),
        (2, "splits/test.jsonl", "mine"),
        (2, "splits/thesis.tex", "mine"),
        (3, "items/items.json", "[]"),
        (4, "rxx/v_blocks.safetensors", "mine"),
        (4, "rxx/k_blocks.timing.json", '{"seconds": 1}'),
        (6, "ppl.json", '{"perplexity": 3}'),
        (6, "ppl.timing.json", "mine"),
    ],
)
def test_a_file_that_is_no_longer_the_stages_own_stays(
    made, tmp_path, capsys, stage, name, content
):
    copy = tmp_path / "made"
    shutil.copytree(made, copy, symlinks=True)
    (copy / name).write_text(content)
    before = state(copy)
    assert main([str(word) for word in stages(copy)[stage]]) == 1
    assert "exists already" in capsys.readouterr().err
    assert state(copy) == before


@pytest.mark.parametrize(
    "words",
    [
        ["model", "dense", "-o", "dense"],
        ["model", "dense", "-o", "small/../dense"],
        ["text", "docs.jsonl", "-o", "docs.jsonl"],
        # The record beside it would be the source.
        ["text", "ppl.json", "-o", "ppl.jsonl"],
        # Another command made these.
        ["text", "docs.jsonl", "-o", "splits/test.jsonl"],
        ["text", "docs.jsonl", "-o", "splits/split.jsonl"],
        ["text", "docs.jsonl", "-o", "items/items.jsonl"],
        ["split", "splits/test.jsonl", "-o", "splits"],
        ["text", json.dumps({"source": {"mix": {"a": 0.5, "b": 0.5}}}), "--members", "docs.jsonl",
         "cal.jsonl", "-o", "docs.jsonl"],
        ["eval", "ppl", "dense", "--text", "docs.jsonl", "--source", "ppl.json", "-o", "ppl.json"],
        ["eval", "ppl", "dense", "--text", "docs.jsonl", "-o", "dense/ppl.json"],
        ["eval", "harness", "dense", "--task", "x", "--items", "items/items.json", "-o",
         "items/items.json"],
        ["collect", "dense", "--text", "docs.jsonl", "-o", "a/v_blocks.safetensors",
         "b/v_blocks.safetensors"],
        ["export", "gguf", "dense", "-o", "dense/model.safetensors"],
        ["eval", "ppl", "dense", "--text", "docs.jsonl", "-o", "rxx/v_blocks.safetensors"],
    ],
)  # fmt: skip
def test_what_is_read_is_not_written_though_the_stage_made_it(made, monkeypatch, capsys, words):
    monkeypatch.chdir(made)
    before = state(made)
    assert main(words) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert state(made) == before


@pytest.mark.parametrize("command", ["model", "surgery", "by hand", "by a second link"])
def test_weights_that_a_source_links_to_stay(made, tmp_path, capsys, command):
    """The links' folder is read: to write where they point to would leave nothing."""
    own, links = tmp_path / "own", tmp_path / "links"
    size = ["--mode", "pca-shared-kv", "--size", "variance@0.5"]
    again = ["model", links, "-o", own]
    if command == "surgery":
        run("surgery", made / "source", *size, "-o", own)
        again = ["surgery", links, *size, "-o", own]
    else:
        tiny_llama(own)
        # Sealed, so that the stage itself would replace it.
        made_own = {"files": hash_files(own), "provenance": {"stage": "model"}}
        write_record(own / "arch.json", made_own)
    if command.startswith("by"):
        links.mkdir()
        for path in own.iterdir():
            (links / path.name).symlink_to(f"../own/{path.name}")
        if command == "by a second link":
            (tmp_path / "weights").symlink_to(own / "model.safetensors")
            (links / "model.safetensors").unlink()
            (links / "model.safetensors").symlink_to("../weights")
    else:
        run("model", own, "-o", links)
    before = state(tmp_path)
    assert main([str(word) for word in again]) == 1
    assert f"{own}: holds {own}/" in capsys.readouterr().err
    with pytest.raises(A3Error, match="links to"):
        resolve_model({"path": str(links)}, own)
    assert state(tmp_path) == before


def test_callers_in_python_are_refused_too(made, tmp_path):
    dense, mine = made / "dense", tmp_path / "mine"
    before = state(made)
    for out in (dense, made):
        with pytest.raises(A3Error, match=r"is an input|holds"):
            resolve_model({"path": str(dense)}, out)
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    with pytest.raises(A3Error, match=r"thesis\.tex"):
        resolve_model({"path": str(dense)}, mine)
    with pytest.raises(A3Error, match=r"thesis\.tex"):
        train(Recipe(**TRAIN | {"block_length": 16}), made / "docs.jsonl", mine)
    with pytest.raises(A3Error, match="exists already"):
        write_record(mine / "thesis.tex", {"seconds": 1})
    assert state(made) == before
    assert (mine / "thesis.tex").read_text() == "mine"


def test_words_that_the_user_put_into_a_card_stay(made, tmp_path, capsys):
    shutil.copytree(made / "small", tmp_path / "small")
    card = tmp_path / "small/README.md"
    card.write_text(card.read_text() + "My own words.")
    before, result = state(tmp_path), str(made / "ppl.json")
    words = ["card", str(tmp_path / "small"), "--dense", result, "--compressed", result]
    assert main(words) == 1
    assert "move it elsewhere first" in capsys.readouterr().err
    assert state(tmp_path) == before


def test_a_made_folder_is_made_again_when_its_source_changed(made, tmp_path):
    """Its weights are links: the record's hashes are of what they pointed to."""
    copy = tmp_path / "source"
    shutil.copytree(made / "source", copy)
    run("model", copy, "-o", tmp_path / "dense")
    tiny_llama(copy, seed=1)
    run("model", copy, "-o", tmp_path / "dense")
    assert hash_files(tmp_path / "dense") != hash_files(made / "dense")


def test_the_workflow_deletes_no_source():
    config = {"results": "results", "models": {"m": {"source": {"path": "results/models/m"}}}}
    with pytest.raises(A3Error, match="deletes before"):
        check_outside("models", "m", config)
    config["models"]["m"]["source"]["path"] = "models/m"
    check_outside("models", "m", config)
    config["results"] = "."
    with pytest.raises(A3Error, match="deletes before"):
        check_outside("models", "m", config)
    # Another's own, or of another section.
    config["models"]["n"] = {"source": {"path": "models/m/"}}
    config["texts"] = {"t": {"source": {"path": "models/m/README.md"}}}
    for section, name in (("models", "n"), ("texts", "t")):
        with pytest.raises(A3Error, match=r"deletes before it makes models\.m"):
            check_outside(section, name, config)
    config["texts"]["t"]["source"]["path"] = "models/k/README.md"
    check_outside("texts", "t", config)


def test_the_workflow_makes_no_model_where_a_foreign_folder_is(made, tmp_path):
    config = {"results": str(tmp_path), "models": {"m": {}}}
    (tmp_path / "models/m").mkdir(parents=True)
    check_models_made(config)
    (tmp_path / "models/m/config.json").write_text("mine")
    with pytest.raises(A3Error, match="exists already"):
        check_models_made(config)
    shutil.copy(made / "dense/.a3.json", tmp_path / "models/m")
    check_models_made(config)


def test_a_name_that_is_not_utf8_is_refused_as_such(made, tmp_path, capsys):
    source = tmp_path / "m\udcff"
    shutil.copytree(made / "source", source)
    before = state(tmp_path)
    for words in (["model", source, "-o", tmp_path / "out"], ["inspect", source]):
        assert main(list(map(str, words))) == 1
        assert "not UTF-8" in capsys.readouterr().err
    assert state(tmp_path) == before


# --- what messages name --------------------------------------------------------------------------


def test_errors_name_what_the_user_does(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "mine")
    weights = tmp_path / "mine/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    text = ["--text", made / "cal.jsonl", "--tokens", "256", *BLOCK]
    assert main([*map(str, ["compress", "mine", "--ratio", "0.2", *text, "-o", "small"])]) == 1
    assert "a3: error: mine/model.safetensors: truncated" in capsys.readouterr().err
    weights.write_bytes(content)
    config = tmp_path / "mine/config.json"
    config.write_text(
        config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 9')
    )
    assert main([*map(str, ["compress", "mine", "--ratio", "0.2", *text, "-o", "small"])]) == 1
    assert "a3: error: mine: tensor" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "words",
    [
        ["model", "dense", "-o", "x"],
        ["compress", "dense", "--ratio", "0.2", "--text", "docs.jsonl", "-o", "x"],
        ["collect", "dense", "--text", "docs.jsonl", "-o", "x/v_blocks.safetensors"],
        ["eval", "ppl", "dense", "--text", "docs.jsonl", "-o", "x.json"],
        ["inspect", "dense"],
    ],
)
def test_a_made_folder_whose_source_was_moved_says_so(made, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "source", "source")
    shutil.copy(made / "docs.jsonl", "docs.jsonl")
    run("model", "source", "-o", "dense")
    Path("source").rename("elsewhere")
    capsys.readouterr()
    assert main(words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"dense/model.safetensors: a link to {tmp_path}/source/model.safetensors" in said
    assert "a3 model SOURCE -o dense" in said
    run("model", "elsewhere", "-o", "dense")
    capsys.readouterr()
    assert main(["inspect", "dense"]) == 0
