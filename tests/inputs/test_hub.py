"""Models and data sets of a hub, for real, from a stand-in for it on this machine."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import fork_server
import pandas
import pytest
from hub_server import Repository, running
from tiny import tiny_llama

from a3.core.files import load_yaml
from a3.experiments.config import CATALOGUE

ROOT = Path(__file__).parents[2]
EARLY = b'{"text": "early one"}\n{"text": ""}\n{"text": "early two"}\n'
LATE = b'{"text": "late one"}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_llama(tmp_path_factory.mktemp("tiny"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA tiny model.\n")
    return folder


@pytest.fixture
def hub():
    with running() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    """Run jobs against the hub, with a folder and a cache of their own; each says one line.

    huggingface_hub reads its settings when it is imported: each call is a process of its own.
    """
    program = Path(fork_server.python(fork_server.WITHOUT_HUB)).with_name("hub-jobs")

    def call(*jobs: tuple[str, dict], **environment: str) -> list[str]:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests/helpers"))),
        }
        done = subprocess.run(
            [program, json.dumps(jobs)],
            env=os.environ | settings | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.strip().splitlines()
        assert len(lines) == len(jobs)
        return lines

    return call


def test_model_of_a_revision_then_offline(hub, run, model, tmp_path):
    commit = hub.add("models", "who/tiny", Repository.of(model, branches=("v1",)))
    source = {"hub": "who/tiny", "revision": "v1"}
    (said,) = run(("model", source))
    assert commit in said
    assert "'licence': 'mit'" in said
    made = tmp_path / "models" / "m"
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (made / name).read_bytes() == (model / name).read_bytes()
    assert (made / "model.safetensors").is_symlink()
    hub.requests.clear()
    other = {"hub": "who/tiny", "revision": "main"}
    again, unknown = run(("model", source), ("model", other), HF_HUB_OFFLINE="1")
    assert again == said
    assert unknown.startswith("A3Error: hub: who/tiny, revision: main: the hub cannot be reached")
    assert hub.requests == []


def test_chat_templates_by_name_are_fetched_and_no_other_folders(hub, run, model, tmp_path):
    name = "additional_chat_templates/tool_use.jinja"
    files = Repository.of(model).files | {name: b"tools", "onnx/config.json": b"{}"}
    hub.add("models", "who/tiny", Repository(files))
    run(("model", {"hub": "who/tiny", "revision": "main"}))
    assert (tmp_path / "models" / "m" / name).read_text() == "tools"
    assert not any("onnx" in request for request in hub.requests)


def test_what_is_not_there_is_named(hub, run, model, tmp_path):
    hub.add("models", "who/tiny", Repository.of(model))
    files = {"config.json": b"{}", "pytorch_model.bin": b"pickle", "tokenizer.json": b"{}"}
    hub.add("models", "who/old", Repository(files))
    repository, revision, pickled = run(
        ("model", {"hub": "who/none", "revision": "main"}),
        ("model", {"hub": "who/tiny", "revision": "v9"}),
        ("model", {"hub": "who/old", "revision": "main"}),
    )
    assert "hub: who/none, revision: main: no such repository" in repository
    assert "no such branch, tag or commit" in revision
    assert "no .safetensors file" in pickled
    assert not any("pytorch_model.bin" in request for request in hub.requests)
    assert list((tmp_path / "models").iterdir()) == []


def test_adapters_and_quantised_weights_are_refused_before_they_are_fetched(hub, run, model):
    files = Repository.of(model).files
    adapter = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.bin": b"pickle"}
    config = json.loads(files["config.json"]) | {"quantization_config": {"quant_method": "gptq"}}
    hub.add("models", "who/lora", Repository(files | adapter))
    hub.add("models", "who/alone", Repository(adapter))
    hub.add("models", "who/gptq", Repository(files | {"config.json": json.dumps(config).encode()}))
    names = ("lora", "alone", "gptq")
    said = run(*(("model", {"hub": f"who/{name}", "revision": "main"}) for name in names))
    assert all("an unmerged adapter (LORA)" in one for one in said[:2])
    assert "quantised (gptq); dequantise it first" in said[2]
    assert not any("safetensors" in path or ".bin" in path for path in hub.requests)


def test_a_download_that_breaks_off_leaves_nothing(hub, run, model, tmp_path):
    broken = Repository.of(model, truncated={"model.safetensors"})
    hub.add("models", "who/tiny", broken)
    source = {"hub": "who/tiny", "revision": "main"}
    (said,) = run(("model", source))
    assert said.startswith("A3Error: hub: who/tiny, revision: main: the download failed")
    assert list((tmp_path / "models").iterdir()) == []
    # Run again, as the message says, once the hub is well.
    broken.truncated.clear()
    assert broken.commit in run(("model", source))[0]
    made = tmp_path / "models" / "m" / "model.safetensors"
    assert made.read_bytes() == (model / "model.safetensors").read_bytes()


def test_data_set_of_a_revision_then_offline(hub, run):
    early = hub.add("datasets", "who/rows", Repository({"train.jsonl": EARLY}, ("v1",)))
    late = hub.add("datasets", "who/rows", Repository({"train.jsonl": LATE}))
    source = {"hub": "who/rows", "revision": "v1", "split": "train", "column": "text"}
    rows, split, column = run(
        ("text", source),
        ("text", source | {"split": "nope"}),
        ("text", source | {"column": "prose"}),
    )
    assert rows == "['early one', 'early two']"
    assert 'Unknown split "nope"' in split
    assert "column prose: expected text, found columns {'text'" in column
    again, other = run(
        ("text", source | {"revision": early}),
        ("text", source | {"revision": late}),
        HF_HUB_OFFLINE="1",
    )
    assert again == rows
    # Left to itself, `datasets` hands out the revision it has for the one asked for.
    assert f"holds commit {early}, not {late}" in other


def test_chosen_files_of_a_data_set_then_offline(hub, run):
    files = {"README.md": b"---\nconfigs: []\n---\n", "en/a.jsonl": EARLY, "en/b.jsonl": LATE}
    hub.add("datasets", "who/web", Repository(files))
    source = {"hub": "who/web", "revision": "main", "files": "en/b*", "split": "train[:1]"}
    assert run(("text", source)) == ["['late one']"]
    assert not any("en/a.jsonl" in request for request in hub.requests)
    whole, again = run(("text", source | {"files": "en/*", "split": "train"}), ("text", source))
    assert whole == "['early one', 'early two', 'late one']"
    assert again == "['late one']"
    assert run(("text", source), HF_HUB_OFFLINE="1") == ["['late one']"]


def parquet(path: Path, **columns) -> bytes:
    pandas.DataFrame(columns).to_parquet(path)
    return path.read_bytes()


CARD = b"""---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: test, path: wikitext-2-raw-v1/test-*}
---
"""


def test_the_catalogues_data_sets(hub, run, tmp_path):
    """Repositories of the same layout as the hub's, read by the catalogue's entries."""
    one = tmp_path / "one.parquet"
    lines = ["", " = Robert Boulter = \n", "", " He is an actor . \n"]
    documents = [{"text": f"page {i}", "url": "https://x"} for i in range(3)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in documents).encode())
    repositories = {
        "wikitext-2": {
            "README.md": CARD,
            "wikitext-2-raw-v1/test-00000-of-00001.parquet": parquet(one, text=lines),
            "wikitext-103-raw-v1/test-00000-of-00001.parquet": b"not downloaded",
        },
        "c4-validation": {
            "en/c4-validation.00000-of-00008.json.gz": packed,
            "en/c4-validation.00001-of-00008.json.gz": b"not downloaded",
        },
        "slimpajama-validation": {
            "data/validation-00000-of-00001-4fb685.parquet": parquet(
                one, text=["a", "b"], n=[1, 2]
            ),
            "data/train-00000-of-00048-ab2b35.parquet": b"not downloaded",
        },
        "ptb": {
            "penn_treebank/test/0000.parquet": parquet(
                one, sentence=["no it was n't", "<unk> <N>"]
            ),
            "penn_treebank/train/0000.parquet": b"not downloaded",
        },
    }
    expected = {
        "wikitext-2": lines,
        "c4-validation": ["page 0", "page 1", "page 2"],
        "slimpajama-validation": ["a", "b"],
        "ptb": ["no it was n't", "<unk> <N>"],
    }
    entries = load_yaml(CATALOGUE)["texts"]
    commits, jobs = {}, []
    for name, files in repositories.items():
        entry = entries[name]
        source = entry["source"]
        branches = ("refs/convert/parquet",) if name == "ptb" else ("main",)
        commits[name] = hub.add("datasets", source["hub"], Repository(files, branches))
        if name != "ptb":  # whose branch is named
            source["revision"] = commits[name]
        jobs.append(("made", entry))
    for name, said in zip(repositories, run(*jobs), strict=True):
        source, texts = json.loads(said)
        assert source.startswith(f"{entries[name]['source']['hub']}@{commits[name]}, ")
        assert texts == expected[name]
    assert run(*jobs, HF_HUB_OFFLINE="1") == run(*jobs)
    unwanted = ("train", "wikitext-103", "00001-of-00008.json")
    files = [request for request in hub.requests if "/resolve/" in request]
    assert files
    assert not any(word in request for request in files for word in unwanted)
