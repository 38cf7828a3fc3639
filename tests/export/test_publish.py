"""Publishing to a stand-in for the hub: what is checked, what is uploaded, and what loads back."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Repository, running
from huggingface_hub import constants, snapshot_download
from safetensors.torch import load_file, save_file
from tiny import run, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils
from transformers.utils import hub as transformers_hub

from a3.artifacts.card import is_own_card, show_graph
from a3.cli.main import main
from a3.core.errors import A3Error
from a3.core.files import read_record, seal_folder, sha256, write_json, write_record
from a3.models.checkpoint import Checkpoint, front_matter
from a3.models.load import load_model
from a3.stages.export.checks import NEW_TOKENS, generates, licence_of, require_same, tokenises
from a3.stages.export.publish import There, call, publish

MODES = ["--qk", "uniform-global@12", "--ov", "joint@12", "--mlp", "obs@64"]
CHAT = "{{ messages[0].content }}"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A compressed folder and what it exports to, of a model with a licence."""
    work = tmp_path_factory.mktemp("publish")
    dense = tiny_llama(work / "dense")
    (dense / "README.md").write_text("---\nlicense: mit\n---\nA tiny model.\n")
    (dense / "chat_template.jinja").write_text(CHAT)
    (work / "text.txt").write_text("A river moves towards an ocean, or a lake. " * 60)
    text = ["--text", work / "text.txt", "--tokens", "256", "--block-length", "64"]
    run("compress", dense, *MODES, *text, "-o", work / "small")
    run("export", "hf", work / "small", "-o", work / "stock")
    return work


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that knows one token, which is set."""
    with running() as hub:
        hub.writers = {"hf_right"}
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # a client made for another hub
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield hub


def refused(folder, repo="who/tiny", **options) -> str:
    with pytest.raises(A3Error) as error:
        list(publish(folder, repo, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(work, hub, capsys):
    run("publish", work / "small", "who/tiny")
    said = capsys.readouterr().out
    for found in (
        "alone      with trust_remote_code=True its code runs, which equals that of this a3",
        "tokenises  4 texts, there and back, and its chat template",
        f"generates  {NEW_TOKENS} tokens with the cache as without it",
        "licence    mit",
        "hub        who/tiny: new, public",
        "  base_model: dense",
        "Nothing was uploaded",
    ):
        assert found in said
    size = (work / "small" / "model.safetensors").stat().st_size
    assert f"{size / 1e3:.1f} kB" in said
    assert "model.safetensors" in said
    assert "GET /api/models/who/tiny" in hub.requests
    assert all(request.startswith("GET") for request in hub.requests)


@pytest.mark.parametrize("name", ["small", "stock"])
def test_what_was_uploaded_loads_back_by_its_name(work, hub, name, tmp_path, monkeypatch):
    # transformers remembers, by name, which commit a repository has.
    repo = f"who/{name}"
    *_, last = publish(work / name, repo, upload=True, private=True)
    (_, repository) = hub.repositories["models", repo]
    assert repository.commit in last
    assert repository.private
    loaded = [AutoModelForCausalLM.from_pretrained(repo, cache_dir=tmp_path)]
    if name == "small":  # and by the code in the repository, as without a3
        # Not in the user's cache, nor in one that an earlier test had.
        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        others = [path for path in sys.path if not Path(path, "transformers_modules").is_dir()]
        monkeypatch.setattr(sys, "path", others)
        monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)
        named = loaded[0].config.auto_map["AutoModelForCausalLM"]
        own = dynamic_module_utils.get_class_from_dynamic_module(named, repo, cache_dir=tmp_path)
        assert own.__module__.startswith("transformers_modules")
        loaded.append(own.from_pretrained(repo, cache_dir=tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(repo, cache_dir=tmp_path)
    ids = tokenizer("A river, a lake.", return_tensors="pt").input_ids
    before = load_model(work / name, "float32")
    with torch.inference_mode():
        assert all(torch.equal(model(ids).logits, before(ids).logits) for model in loaded)
    assert tokenizer.chat_template == CHAT
    card = repository.files["README.md"].decode()
    assert f'from_pretrained("{repo}")' in card
    assert ("import a3" in card) == (name == "small")
    # Its record is of what was uploaded, and no path of this machine is in it.
    folder = snapshot_download(repo, cache_dir=tmp_path, local_dir=tmp_path / "back")
    Checkpoint(Path(folder)).verify_all()
    assert not any(str(work).encode() in content for content in repository.files.values())
    assert "timing.json" not in repository.files


def test_another_models_files_are_deleted_only_if_asked(work, hub):
    old = {"model-00001-of-00002.safetensors": b"old", "logo.png": b"png"}
    hub.add("models", "who/tiny", Repository(dict(old)))
    message = refused(work / "small", upload=True)
    assert message.startswith("who/tiny: has files of another model: model-00001-of-00002")
    assert [request for request in hub.requests if request.startswith("POST")] == []
    said = list(publish(work / "small", "who/tiny", upload=True, replace=True))
    assert any("exists, public, with 2 files" in line for line in said)
    files = hub.repositories["models", "who/tiny"][-1].files
    assert old.keys() & files.keys() == {"logo.png"}


def test_records_and_configs_name_no_path(work, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(work)
    folder = shutil.copytree(work / "small", tmp_path / "small")
    content = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", content | {"_name_or_path": "below/dense"})
    said = {"source": {"path": "below/dense"}, "said": f"of {work}/dense: x"}
    write_json(folder / "source.json", said)
    record = read_record(folder / "approx.json")
    del record["sha256"]
    record["files"] |= {name: sha256(folder / name) for name in ("config.json", "source.json")}
    record["provenance"]["model"] = said
    write_record(folder / "approx.json", record)
    seal_folder(folder, "approx.json")
    lines = list(publish(folder, "who/tiny", upload=True))
    assert any(line.startswith("hides ") and "below/dense" in line for line in lines)
    files = hub.repositories["models", "who/tiny"][-1].files
    hidden = {"source": {"path": "dense"}, "said": "of dense: x"}
    assert json.loads(files["source.json"]) == hidden
    assert json.loads(files["approx.json"])["provenance"]["model"] == hidden
    assert json.loads(files["config.json"]) == content
    for place in ("below/", str(work), str(tmp_path)):
        assert not any(place.encode() in one for one in files.values())


def test_only_files_of_a_model_are_shared(work, hub, tmp_path):
    folder = shutil.copytree(work / "small", tmp_path / "small")
    for name in ("approx.json", ".a3.json"):
        (folder / name).unlink()
    for name in ("notes.txt", "secret.json", "other_a3.py", "optimizer.safetensors", "LICENSE.md"):
        (folder / name).write_text("{}")
    (said,) = (one for one in publish(folder, "who/tiny", upload=True) if one.startswith("stays"))
    assert (
        "notes.txt, optimizer.safetensors, other_a3.py, secret.json and 1 more: not shared" in said
    )
    files = hub.repositories["models", "who/tiny"][-1].files
    code = {"modeling_a3.py", "attention_a3.py", "experts_a3.py", "own_attention_a3.py"}
    assert code | {"LICENSE.md", "tokenizer.json", "config.json"} <= files.keys()
    assert not files.keys() & {"notes.txt", "secret.json", "other_a3.py", "optimizer.safetensors"}


def test_weights_of_another_model_are_replaced_only_if_asked(work, hub):
    old = {"config.json": b"{}", "model.safetensors": b"old", "x.gguf": b"old", "logo.png": b""}
    record = {"approx.json": b'{"base": {"weights_sha256": "0"}}'}  # without a seal
    hub.add("models", "who/tiny", Repository(old | record))
    message = refused(work / "small", upload=True)
    assert "another model: config.json, model.safetensors, x.gguf. Replace" in message
    list(publish(work / "small", "who/tiny", upload=True, replace=True))
    files = hub.repositories["models", "who/tiny"][-1].files
    assert files["model.safetensors"] != b"old"
    assert old.keys() - files.keys() == {"x.gguf"}
    # The repository's record says now that its model was made of the same weights.
    assert list(publish(work / "small", "who/tiny", upload=True))[-1].startswith("Uploaded")
    assert "config.json, experts_a3.py and 3 more" in refused(work / "stock", upload=True)


def test_a_public_repository_does_not_become_private(work, hub, monkeypatch):
    hub.add("models", "who/tiny", Repository({".gitattributes": b""}))
    assert refused(work / "stock", private=True).startswith("who/tiny: is public. Make it private")
    assert all(request.startswith("GET") for request in hub.requests)
    monkeypatch.setattr("a3.stages.export.publish.look", lambda *_: There())  # made meanwhile
    message = refused(work / "stock", private=True, upload=True)
    assert "not written (409: You already created this model repo" in message


def test_the_hubs_refusals_take_one_line(work, hub, monkeypatch):
    for token, found in (("hf_wrong", "403"), ("", "401")):
        monkeypatch.setenv("HF_TOKEN", token)
        message = refused(work / "stock", upload=True)
        assert message.startswith(f"hub: who/tiny: may not be written ({found}: Invalid username")
        assert "hf auth login" in message
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert refused(work / "stock", "a/b/c").startswith("hub: a/b/c: no repository name")
    hub.lost = {"config.json"}
    assert "config.json is not what was uploaded" in refused(work / "stock", upload=True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(work / "stock", upload=True)


def test_without_a_hub_a_dry_run_still_checks(work, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = list(publish(work / "stock", "who/tiny"))
    assert any(line.endswith("who/tiny: not known whether it exists") for line in said)


def test_somebody_elses_commit_meanwhile_is_not_overwritten(work, hub):
    hub.add("models", "who/tiny", Repository({".gitattributes": b""}))
    lines = publish(work / "stock", "who/tiny", upload=True)
    next(lines)
    hub.repositories["models", "who/tiny"][0].files["README.md"] = b"theirs"
    with pytest.raises(A3Error, match="Somebody else changed it meanwhile"):
        list(lines)


def test_damaged_folders_are_refused(work, tmp_path):
    folder = shutil.copytree(work / "small", tmp_path / "small")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "changed since it was written" in refused(folder)
    for name in ("approx.json", ".a3.json"):
        (folder / name).unlink()
    assert any("nothing to compare" in line for line in publish(folder, "who/tiny"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "modeling_a3.A3Other"
    (folder / "config.json").write_text(json.dumps(config))
    assert "auto_map names modeling_a3.A3Other" in refused(folder)
    config["auto_map"]["AutoModelForCausalLM"] = "modeling_a3.A3LlamaForCausalLM"
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": config["auto_map"] | {"AutoTokenizer": "other.Own"}})
    )
    assert "auto_map names other.Own for AutoTokenizer, expected nothing more" in refused(folder)
    weights["model.norm.weight"] *= float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    assert "not finite" in refused(folder)


def test_other_code_is_said_and_not_uploaded(work, hub, tmp_path):
    folder = shutil.copytree(work / "small", tmp_path / "small")
    for name in ("approx.json", ".a3.json"):
        (folder / name).unlink()
    (folder / "attention_a3.py").write_text("print('other')\n")
    lines = list(publish(folder, "who/tiny"))
    assert any("not tried: attention_a3.py in it is of another version" in one for one in lines)
    assert "attention_a3.py in it is of another version of a3" in refused(folder, upload=True)
    assert all(request.startswith("GET") for request in hub.requests)


def test_a_cache_that_changes_logits_is_seen(work):
    model = load_model(work / "small", "float32")
    tokenizer = AutoTokenizer.from_pretrained(work / "small")
    forward = model.forward

    def shifted(*words, **options):
        found = forward(*words, **options)
        if options.get("use_cache"):
            found.logits[..., :7] += 1
        return found

    model.forward = shifted
    with pytest.raises(A3Error, match="with the cache differ from those without it"):
        generates(work / "small", model, tokenizer, "float32")
    one = torch.ones(2, 3)
    require_same(work, one, one + 1e-4, 1e-3)


def test_a_tokenizer_that_does_not_come_back_is_seen(work):
    tokenizer = AutoTokenizer.from_pretrained(work / "small")
    tokenizer.decode = lambda ids, **_: "something else"
    with pytest.raises(A3Error, match="its tokenizer reads"):
        tokenises(work / "small", tokenizer)


def test_a_tokenizer_that_writes_nothing_and_a_template_that_fails_are_seen(work):
    tokenizer = AutoTokenizer.from_pretrained(work / "small")
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(A3Error, match=r"its chat template fails .*no system message"):
        tokenises(work / "small", tokenizer)
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(1)
    tokenizer.encode = lambda *_, **__: [1]
    with pytest.raises(A3Error, match="an unknown token in each of 4 texts"):
        tokenises(work / "small", tokenizer)


def test_errors_of_files_are_not_the_hubs():
    def fail(error):
        raise error

    with pytest.raises(A3Error, match=r"^model\.safetensors: Permission denied, so who/x was not"):
        call(
            "who/x",
            lambda: fail(PermissionError(13, "Permission denied", "model.safetensors")),
            "written",
        )
    with pytest.raises(A3Error, match="cannot be reached"):
        call("who/x", lambda: fail(ConnectionResetError("reset")), "written")


def test_a_file_with_its_old_time_is_hashed_again(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(2**20))
    before, time = sha256(path), path.stat().st_mtime_ns
    path.write_bytes(b"x" * 2**20)
    os.utime(path, ns=(time, time))
    assert sha256(path) != before


def test_a_file_that_changes_meanwhile_is_not_uploaded(work, hub, tmp_path):
    folder = shutil.copytree(work / "stock", tmp_path / "stock")
    lines = publish(folder, "who/tiny", upload=True)
    while not next(lines).startswith("hub "):
        pass
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(A3Error, match=r"model\.safetensors: changed since it was checked"):
        list(lines)
    assert all(request.startswith("GET") for request in hub.requests)


@pytest.mark.parametrize(
    ("card", "licence", "said"),
    [
        ("license: apache-2.0", "apache-2.0", "apache-2.0"),
        ("license: cc-by-nd-4.0", None, "forbids to share"),
        ("license: cc-by-nc-4.0", "cc-by-nc-4.0", "not for commercial use"),
        ("license: llama3.2", "llama3.2", "begins with Llama"),
        ("license: other", None, "unknown"),
        ("license: other\nlicense_name: river", "other", "other (river)"),
        ("license: other\nlicense_name: Unknown", None, "unknown"),
        ("license: other\nlicense_name: CC-BY-NC-ND-4.0", None, "forbids to share"),
        ("license: CC-BY-NC-ND-4.0", None, "forbids to share"),
        ("license: [cc-by-nd-4.0, mit]", None, "forbids to share"),
        ("license: [MIT, apache-2.0]", "mit, apache-2.0", "mit, apache-2.0"),
        ("license: [1, mit]", None, "unknown"),
        ("license: []", None, "unknown"),
        ("license: ''", None, "unknown"),
        ("license: Unknown", None, "unknown"),
        ("license: unlicensed", None, "unknown"),
        ("tags: []", None, "unknown"),
    ],
)
def test_licences(tmp_path, card, licence, said):
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    found = licence_of(tmp_path)
    assert found[0] == licence
    assert said in found[1]


def test_the_card_of_a_graph_loads_the_graph(work, tmp_path):
    shutil.copy(work / "small/README.md", tmp_path)
    show_graph(tmp_path, "onnx/model.onnx")
    card = (tmp_path / "README.md").read_text()
    assert 'InferenceSession("FOLDER/onnx/model.onnx")' in card
    assert "import a3" not in card
    assert "\n## Licence and provenance\n" in card
    assert is_own_card(tmp_path / "README.md")


def test_a_licence_is_added_to_the_card_and_its_record(work, hub, tmp_path, capsys):
    folder = tmp_path / "small"
    dense = shutil.copytree(work / "dense", tmp_path / "dense")
    (dense / "README.md").unlink()
    text = ["--text", work / "text.txt", "--tokens", "256", "--block-length", "64"]
    run("compress", dense, *MODES, *text, "-o", folder)
    assert "licence unknown" in refused(folder, upload=True)
    assert main(["card", str(folder)]) == 1
    assert main(["card", str(folder), "--licence", "Apache 2"]) == 1
    assert "expected a short name" in capsys.readouterr().err
    run("card", folder, "--licence", "apache-2.0")
    assert front_matter(folder / "README.md")["license"] == "apache-2.0"
    *_, last = publish(folder, "who/tiny", upload=True)
    assert last.startswith("Uploaded")


def test_the_origin_of_a_model_reaches_the_card(work, tmp_path):
    made = tmp_path / "made"
    run("model", work / "dense", "-o", made)
    source = json.loads((made / "source.json").read_text())
    hub = source | {"source": {"hub": "who/base"}, "commit": "c0ffee", "licence": "mit"}
    (made / "source.json").write_text(json.dumps(hub))
    (made / "README.md").unlink()
    (made / "arch.json").unlink()
    run("model", made, "-o", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "source.json").read_text())
    assert again["licence"] == "mit"
    assert again["origin"] == {"source": {"hub": "who/base"}, "commit": "c0ffee"}
