"""Models, texts and configurations are data: nothing of them runs, escapes its place or leaks."""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hub_server import Repository, running
from safetensors.torch import load_file
from test_workflow import HEADER, Project
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

import a3
from a3.cli.main import main
from a3.core.errors import A3Error
from a3.core.files import load_yaml
from a3.experiments.config import complete
from a3.experiments.rows import read_experiments
from a3.models.checkpoint import Checkpoint
from a3.models.load import load_model, load_tokenizer
from a3.models.packing import CODE as TRAVELLING
from a3.stages.inputs import wheels
from a3.stages.inputs.convert import convert
from a3.stages.inputs.model import resolve_model

ROOT = Path(__file__).parents[2]
PACKAGE = Path(a3.__file__).parent
CODE = sorted(PACKAGE.rglob("*.py"))
RULES = sorted((ROOT / "workflow" / "rules").glob("*.smk"))
MODES = {"qk": "rxx-w-rxx", "ov": "xkv", "mlp": "rxx-w", "ratio": "0.25"}
BLOCKS = ["--tokens", "256", "--block-length", "64"]
TEXT = "Dogs bark at the river, and the Moon looks on. " * 60


# --- pickles --------------------------------------------------------------------------------------


@pytest.fixture
def no_pickle(monkeypatch, tmp_path):
    """Fail at a call of pickle or torch.load that a3 makes, at any depth, or on files of ours."""

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*arguments, **options):
            frame, by = sys._getframe(1), []
            while frame is not None:
                by.append(frame.f_code.co_filename)
                frame = frame.f_back
            ours = [path for path in by if Path(path).is_relative_to(PACKAGE)]
            file = getattr(arguments[0], "name", arguments[0]) if arguments else ""
            assert not ours, f"{name} called from {ours[0]}, in {by[0]}"
            assert str(tmp_path) not in str(file), f"{name} of {file}"
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    for name in ("load", "loads", "Unpickler"):
        watch(pickle, name)
    watch(torch, "load")


def whole_run(folder):
    """Model, text, statistics, checkpoint, perplexities and tables, as the workflow makes them."""
    results = folder / "results"
    tiny_llama(folder / "tiny")
    (folder / "text.txt").write_text(TEXT)
    dense, rxx = results / "models" / "tiny", results / "rxx" / "tiny" / "short"
    small = Path("tiny", "short", "rxx-w-rxx+xkv+rxx-w", "0.25")
    kinds = ("q_blocks", "k_blocks", "v_blocks", "down_diagonal")
    text = ["--text", folder / "text.txt"]
    row = json.dumps([{"model": "tiny", "calibration": "short"} | MODES])
    table = ["--results", results, "--experiments", row, "--perplexity", "score"]
    commands = [
        ["model", folder / "tiny", "-o", dense],
        ["collect", dense, *text, *BLOCKS, "-o", *(rxx / f"{kind}.safetensors" for kind in kinds)],
        ["approx", dense, "--rxx", rxx, "--ratio", "0.25", "-o", results / "checkpoints" / small],
        *(
            ["eval", "ppl", of, *text, *BLOCKS, "-o", results / "eval" / run / "ppl" / "score.json"]
            for of, run in ((dense, "tiny/dense"), (results / "checkpoints" / small, small))
        ),
        ["tables", *table, "-o", results / "tables"],
        ["figures", *table, "-o", results / "tables" / "figures"],
    ]
    for command in commands:
        assert main([str(word) for word in command]) == 0, command
    return results


def test_a_whole_run_unpickles_nothing_and_leaves_no_pickle(tmp_path, no_pickle):
    results = whole_run(tmp_path)
    files = [path for path in results.rglob("*") if path.is_file()]
    assert len(files) > 20
    # safetensors start with the length of their header, which may be any two bytes.
    for path in (path for path in files if path.suffix != ".safetensors"):
        start = path.read_bytes()[:4]
        # Protocols 2 to 5, and the zip that torch.save writes.
        assert not re.match(rb"\x80[\x02-\x05]|PK\x03\x04", start), path
    with pytest.raises(AssertionError, match="load of"):
        pickle.load((tmp_path / "text.txt").open("rb"))  # noqa: S301


MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def found_in(source):
    """What Python source does that a3 must not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            yield from MODULES & {name.split(".")[0] for name in names if name}
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            forbidden = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
            if call in forbidden or call.endswith(("pickle.load", "pickle.loads")):
                yield call
            if call == "torch.load" and options.get("weights_only") != "True":
                yield "torch.load without weights_only"
            for option in ("shell", "trust_remote_code", "allow_pickle"):
                if options.get(option, "False") != "False":
                    yield option


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_no_source_reads_pickles_or_runs_strings(path):
    assert list(found_in(path.read_text())) == []


def test_the_check_of_sources_sees_what_it_looks_for():
    bad = (
        "import pickle\nfrom dill import loads\ntorch.load(p)\neval(x)\nos.system(x)\n"
        "subprocess.run(x, shell=True)\nyaml.load(x)\nf(trust_remote_code=True)"
    )
    assert len(list(found_in(bad))) == 8
    assert not list(found_in("torch.load(p, weights_only=True)\nyaml.safe_load(x)"))


def test_rules_quote_what_they_put_into_the_shell():
    """Numbers of threads apart, every name in a command is quoted (`:q`)."""
    quoted = 0
    for path in RULES:
        source = path.read_text()
        assert not re.search(r"shell=True|os\.system|\beval\(|\bexec\(|import pickle", source), path
        # Lines of commands: a string that starts with the program or goes on with an option.
        for line in re.findall(r"^ +f?\"(a3 .*| ?-.*| \{.*)\"$", source, re.MULTILINE):
            names = re.findall(r"\{+([a-z]+(?:\.\w+)?)\}", line)
            assert set(names) <= {"params.threads", "EVERYTHING"}, (path, line)
            quoted += line.count(":q}")
    assert quoted > 40


# --- pickled checkpoints --------------------------------------------------------------------------


class Evil:
    """What a hostile checkpoint holds: whoever unpickles it runs a command."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def pickled(folder, files=1, **config):
    """A tiny model whose weights are .bin files, as transformers used to save them."""
    tiny_llama(folder, **config)
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    if files == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    names = [f"pytorch_model-{i:05}-of-{files:05}.bin" for i in range(1, files + 1)]
    where = {key: names[i * files // len(weights)] for i, key in enumerate(weights)}
    for name in names:
        held = {key: value for key, value in weights.items() if where[key] == name}
        torch.save(held, folder / name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("command", ["model", "collect", "approx", "gather", "ppl", "harness"])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(
    tmp_path, capsys, command, files
):
    folder, text, out = pickled(tmp_path / "my model", files), tmp_path / "text", tmp_path / "o"
    text.write_text(TEXT)
    # A record of a dense folder that has been there does not help.
    shutil.copyfile(folder / "config.json", folder / "arch.json")
    arguments = {
        "model": ["model", folder, "-o", out],
        "collect": ["collect", folder, "--text", text, "-o", out / "v_blocks.safetensors"],
        "approx": ["approx", folder, "--rxx", tmp_path, "--ratio", "0.2", "-o", out],
        "gather": ["gather", folder, tmp_path / "0of1.safetensors", "-o", out],
        "ppl": ["eval", "ppl", folder, "--text", text, "-o", out],
        "harness": ["eval", "harness", folder, "--task", "arc_easy", "-o", out],
    }[command]
    assert main([str(word) for word in arguments]) == 1
    said = capsys.readouterr().err
    assert f"a3 convert '{folder}' -o '{folder}-safetensors'" in said
    assert "any code" in said
    assert not out.exists()


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_converted_weights_are_the_same_model(tmp_path, files, tied):
    folder = pickled(tmp_path / "old", files, tie_word_embeddings=tied)
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    torch.save({"lr": 1}, folder / "training_args.bin")
    assert main(["convert", str(folder), "-o", str(tmp_path / "new")]) == 0
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert not any(name.endswith((".py", ".bin", ".bin.index.json")) for name in names)
    weights = [name for name in names if name.endswith(".safetensors")]
    assert len(weights) == files
    stored = {key for name in weights for key in load_file(tmp_path / "new" / name)}
    assert ("lm_head.weight" in stored) != (tied and files == 1)
    ids = torch.arange(40)[None]
    old, new = (
        AutoModelForCausalLM.from_pretrained(path)(ids).logits
        for path in (folder, tmp_path / "new")
    )
    assert torch.equal(old, new)
    resolve_model({"path": str(tmp_path / "new")}, tmp_path / "model")


def test_tensors_that_share_memory_stay_two_where_nothing_ties_them(tmp_path):
    folder = pickled(tmp_path / "old")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["slice"] = weights["lm_head.weight"][:3]
    torch.save(weights, folder / "pytorch_model.bin")
    convert({"path": str(folder)}, tmp_path / "new")
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], value) for name, value in weights.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, capsys, zipped):
    folder, mark = pickled(tmp_path / "old"), tmp_path / "ran"
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    content = weights | {"extra": Evil(mark)}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert main(["convert", str(folder), "-o", str(tmp_path / "new")]) == 1
    said = capsys.readouterr().err
    assert "posix.system" in said
    assert "weights_only" not in said  # torch's advice is to read it all the same
    assert not mark.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
    # The test would see it: whoever unpickles it is caught.
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"junk", "damaged"),
        (b"", "damaged"),
        ({"state_dict": {"w": torch.zeros(2)}}, "'state_dict' is dict"),
        ({"w": torch.zeros(2).to_sparse()}, "expected dense tensors"),
        ([torch.zeros(2)], "'' is list"),
    ],
)
def test_a_bin_that_is_no_weights(tmp_path, content, says):
    folder = pickled(tmp_path / "old")
    path = folder / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(A3Error, match=says):
        convert({"path": str(folder)}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_not_converted(tmp_path):
    folder = pickled(tmp_path / "old", 2)
    tiny_llama(tmp_path / "safe")
    with pytest.raises(A3Error, match="has safetensors already"):
        convert({"path": str(tmp_path / "safe")}, tmp_path / "new")
    with pytest.raises(A3Error, match="exists already"):
        convert({"path": str(folder)}, tmp_path / "safe")
    index = folder / "pytorch_model.bin.index.json"
    for name in ("../evil.bin", "/etc/passwd", "pytorch_model-9.bin", "pytorch_model-../../x.bin"):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(A3Error, match=r"expected pytorch_model\.bin, or"):
            convert({"path": str(folder)}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- code that comes with models ------------------------------------------------------------------


def with_code(folder, mark, own_type):
    """Give a folder code for model, config and tokenizer that leaves a mark where it runs."""
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    code += "class X(LlamaConfig): model_type = 'x'\n"
    code += (
        "class XM(LlamaForCausalLM): config_class = X\nclass XT(PreTrainedTokenizerFast): pass\n"
    )
    (folder / "modeling_x.py").write_text(code)
    for name, auto in (
        ("config.json", {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.XM"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "modeling_x.XT"]}),
    ):
        config = json.loads((folder / name).read_text()) | {"auto_map": auto}
        config |= {"model_type": "x"} if own_type and name == "config.json" else {}
        (folder / name).write_text(json.dumps(config))
    return folder


@pytest.fixture
def eager_user(monkeypatch, tmp_path):
    """Somebody who says yes to whatever transformers asks."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "mod"))


def test_code_of_a_model_is_not_run(tmp_path, eager_user, monkeypatch, capsys):
    """Of a known family it is left out; the compressed model has a3's code in its place."""
    mark = tmp_path / "ran"
    dense = with_code(tiny_llama(tmp_path / "dense"), mark, own_type=False)
    shutil.copyfile(dense / "modeling_x.py", dense / "modeling_a3.py")
    (dense / "optimizer.pt").write_bytes(b"pickle")
    (tmp_path / "text.txt").write_text(TEXT)
    text, out = ["--text", str(tmp_path / "text.txt"), *BLOCKS], tmp_path / "small"
    assert main(["model", str(dense), "-o", str(tmp_path / "model")]) == 0
    assert main(["compress", str(dense), "--ratio", "0.25", "-o", str(out), *text]) == 0
    kinds = [tmp_path / f"{kind}.safetensors" for kind in ("q_blocks", "k_blocks", "v_blocks")]
    for stream in ("--stream", "--no-stream"):
        assert main(["collect", str(dense), *text, stream, "-o", *map(str, kinds)]) == 0
    options = ["--rxx", str(tmp_path), "--ratio", "0.25", "--mlp", "dense"]
    assert main(["approx", str(dense), *options, "-o", str(tmp_path / "direct")]) == 0
    for folder in (dense, out, tmp_path / "direct"):
        assert main(["eval", "ppl", str(folder), *text, "-o", str(tmp_path / "ppl.json")]) == 0
    for folder in (out, tmp_path / "model", tmp_path / "direct"):
        code = {path.name for path in folder.iterdir() if path.suffix in (".py", ".pt")}
        ours = {Path(module.__file__) for module in TRAVELLING}
        ours = {path.name: path.read_bytes() for path in ours if folder.name != "model"}
        assert {name: (folder / name).read_bytes() for name in code} == ours
    named = json.loads((tmp_path / "direct" / "config.json").read_text())["auto_map"]
    assert all(name.startswith("modeling_a3.A3Llama") for name in named.values())
    assert not mark.exists()


def test_a_model_that_needs_its_own_code_is_refused(tmp_path, eager_user, capsys):
    mark = tmp_path / "ran"
    folder = with_code(tiny_llama(tmp_path / "dense"), mark, own_type=True)
    (tmp_path / "text.txt").write_text(TEXT)
    text = ["--text", str(tmp_path / "text.txt"), *BLOCKS]
    for command, says in (
        (["model", str(folder), "-o", str(tmp_path / "m")], "which a3 does not know"),
        (["eval", "ppl", str(folder), *text, "-o", str(tmp_path / "p")], "a3 runs no code"),
    ):
        assert main(command) == 1
        assert says in capsys.readouterr().err
    with pytest.raises(A3Error, match="a3 runs no code that comes with a model"):
        load_model(folder, "float32")
    load_tokenizer(folder)
    assert not mark.exists()
    # The test would see it: transformers, left to ask, runs it after this user's yes.
    AutoModelForCausalLM.from_pretrained(folder)
    assert mark.exists()


# --- archives and downloads -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../evil.gguf", "/tmp/a3-evil.gguf", "a/../../../evil.gguf"])
@pytest.mark.parametrize("as_glob", [False, True])
def test_a_wheels_member_lands_nowhere_else(tmp_path, name, as_glob):
    wheel, inside = tmp_path / "toy-1.0.whl", tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, "evil")
    member = f"*{Path(name).name}" if as_glob else name
    target = wheels.extract_member(wheel, member, inside)
    assert target.resolve().parent == inside.resolve()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {wheel, target}
    assert not Path("/tmp/a3-evil.gguf").exists()


@pytest.mark.parametrize("member", ["..", "a/..", "a\\..\\evil", "*"])
def test_a_member_that_is_no_file_name_is_refused(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "toy.whl", "w") as archive:
        for name in ("..", "a/..", "a\\..\\evil", "b"):
            archive.writestr(name, "evil")
    (tmp_path / "in").mkdir()
    with pytest.raises(A3Error, match=r"must name one file"):
        wheels.extract_member(tmp_path / "toy.whl", member, tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_an_index_names_files_of_its_folder_only(tmp_path):
    tiny_llama(tmp_path / "outside")
    folder = tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"w": "../outside/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(A3Error, match=r"index\.json: expected .* files of this folder"):
        Checkpoint(folder)


# huggingface_hub reads its settings when it is imported: a process of its own.
RUN = """
import json, sys, time
from a3.cli.main import main
time.sleep = lambda seconds: None  # between the hub client's five tries
for command in json.loads(sys.argv[1]):
    print(">>>", main(command), file=sys.stderr, flush=True)
"""
TOKEN = "hf_" + "s3cret" * 6


@pytest.fixture
def at_the_hub(tmp_path):
    """Run commands of a3, one after the other, against a hub; what each said, and the hub."""
    with running() as hub:

        def call(*commands, **environment):
            settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
            settings |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, "-c", RUN, json.dumps(commands)],
                env=os.environ | settings | environment,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, done.stdout
            *said, rest = re.split(r">>> \d\n", done.stdout)
            assert len(said) == len(commands), done.stdout
            assert rest == ""
            return said

        yield call, hub


def test_the_hubs_token_is_sent_and_written_nowhere(at_the_hub, tmp_path):
    call, hub = at_the_hub
    model = tiny_llama(tmp_path / "tiny")
    hub.add("models", "who/tiny", Repository.of(model))
    hub.add("models", "who/broken", Repository.of(model, truncated={"model.safetensors"}))
    rows = {"train.jsonl": TEXT.encode() + b"not json", "../../../climbed.jsonl": b"{}"}
    hub.add("datasets", "who/rows", Repository(rows))
    data = {"source": {"hub": "who/rows", "revision": "main", "files": "*"}}
    fine, broken, absent, escaped = call(
        ["model", "who/tiny@main", "-o", "fine"],
        ["model", "who/broken@main", "-o", "broken"],
        ["model", "who/none@main", "-o", "none"],
        ["text", json.dumps(data), "-o", "docs.jsonl"],
        HF_HUB_VERBOSITY="debug",
    )
    assert f"Bearer {TOKEN}" in hub.tokens
    assert "a3: error" not in fine
    assert "the download failed" in broken
    assert "no such repository" in absent
    assert "A3Error" not in escaped
    assert "hub: who/rows" in escaped
    assert TOKEN not in fine + broken + absent + escaped
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    # A name that climbs out of the cache.
    assert not list(tmp_path.rglob("climbed*"))


def test_a_download_that_is_not_what_the_hub_has(at_the_hub, tmp_path):
    call, hub = at_the_hub
    hub.add("models", "who/tiny", Repository.of(tiny_llama(tmp_path / "tiny")))
    hub.add("models", "who/old", Repository.of(pickled(tmp_path / "old")))
    rows = Repository({"train.jsonl": b'{"text": "one"}\n'})
    hub.add("datasets", "who/rows", rows)
    data = {"source": {"hub": "who/rows", "revision": "main"}}
    model = ["model", "who/tiny@main", "-o", "model"]
    _, refused, _, _ = call(
        model,
        ["model", "who/old@main", "-o", "new"],
        ["convert", "who/old@main", "-o", "new"],
        ["text", json.dumps(data), "-o", "docs.jsonl"],
    )
    assert "a3 convert who/old@main -o" in refused
    assert {"model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "new").iterdir()}
    before = (tmp_path / "model" / "source.json").read_bytes()
    blobs = [path.resolve() for path in (tmp_path / "cache").rglob("snapshots/*/*")]
    for path in blobs:
        if path.stat().st_size > 200_000 or path.read_bytes().startswith(b'{"text"'):
            path.write_bytes(path.read_bytes().replace(b"1", b"2").replace(b"one", b"two"))
    for said in call(
        model,
        ["convert", "who/old@main", "-o", "newer"],
        ["text", json.dumps(data), "-o", "docs.jsonl"],
    ):
        assert "is not what the hub records" in said
    assert (tmp_path / "model" / "source.json").read_bytes() == before
    assert not (tmp_path / "newer").exists()


def test_a_password_in_an_address_is_refused_and_not_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "https://user:passw0rd@hub.example")
    assert main(["model", "who/tiny@main", "-o", str(tmp_path / "m")]) == 1
    said = capsys.readouterr().err
    assert "HF_ENDPOINT" in said
    assert "passw0rd" not in said
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:passw0rd@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert main(["wheel", "toy", "1.0", "0" * 64, "-o", str(tmp_path / "toy.whl")]) == 1
    said = capsys.readouterr().err
    assert "pip could not download it" in said
    assert "passw0rd" not in said


# --- the shell ------------------------------------------------------------------------------------

NAMES = ["a b", "a'b", 'a"b', "a;touch pwned", "$(touch pwned)", "`touch pwned`", "-rf"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("project"))


def test_paths_reach_commands_as_they_are(project):
    """Sources and the folder of results with all that a shell would act on."""
    hostile = 'it\'s "$(touch pwned)"; touch pwned `touch pwned` & #'
    for old, name in (("tiny", hostile), ("learn.txt", f"{hostile}.txt")):
        (project.folder / old).rename(project.folder / name)
        project.edit("config/config.yaml", f"path: {old}}}", f"path: {json.dumps(name)}}}")
    results = "re'sults; touch pwned $(touch pwned)"
    config = project.folder / "config" / "config.yaml"
    config.write_text(f"results: {json.dumps(results)}\n{config.read_text()}")
    small = f"{results}/checkpoints/tiny/short/dense+xkv+dense/0.25/approx.json"
    rules, _ = project.snakemake(small)
    assert rules == ["approx", "collect_together", "model", "text"]
    assert (project.folder / small).is_file()
    assert not list(project.folder.rglob("pwned"))


@pytest.mark.parametrize("name", NAMES)
def test_names_and_modes_that_a_shell_would_act_on_are_refused(project, name):
    """At the start: the config's names, the device, and every cell of the table."""
    config, table = project.folder / "config" / "config.yaml", project.folder / "experiments.tsv"
    before = config.read_text(), table.read_text()
    row = ["tiny", "short", "rxx-w-rxx", "xkv", "rxx-w", "0.25"]
    bad = [(i, cell) for i, good in enumerate(row) for cell in (name, f"{good}@{name}")]
    rows = [[*row[:i], cell, *row[i + 1 :]] for i, cell in bad]
    schema = load_yaml(project.folder / "workflow" / "schemas" / "config.schema.yaml")
    good = load_yaml(config)
    for section in ("models", "texts", "calibrations", "perplexity", "harness"):
        value = next(iter(good[section].values()))
        with pytest.raises(A3Error, match=section):
            complete(good | {section: good[section] | {name: value}}, schema)
    for key in ("device", "table"):
        with pytest.raises(A3Error, match=key):
            complete(good | {key: name}, schema)
    whole = complete(good, schema)
    for cells in rows:
        table.write_text(HEADER + "\t".join(cells) + "\n")
        with pytest.raises(A3Error, match="row 1"):
            read_experiments(table, whole)
    config.write_text(before[0])
    table.write_text(before[1])
