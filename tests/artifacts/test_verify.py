"""`a3 verify`: a whole results folder, made here stage by stage, then damaged in every way."""

import shutil
from multiprocessing import get_context
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import BLOCK, TAIL, run, tiny_llama, tiny_results

from a3.cli.main import main
from a3.core import files
from a3.core.errors import A3Error
from a3.core.files import Seal, read_record, sha256, whole_folder, write_record
from a3.models.checkpoint import Checkpoint, hash_files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_results(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def results(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "results", symlinks=True)


def wrong(results, capsys):
    """What `a3 verify` finds wrong, one line each."""
    assert main(["verify", str(results)]) == 1
    first, *lines = capsys.readouterr().err.split("a3: error: ")[1].strip().split("\n")
    assert first == f"{results}: {len(lines)} problems:"
    return lines


def test_nothing_is_wrong_with_a_fresh_folder(results, capsys):
    assert main(["verify", str(results)]) == 0
    said = capsys.readouterr().out
    assert (
        "checked 2 texts, 1 splits, 1 items, 1 models, 4 statistics, 1 checkpoints, 1 spectra, "
        "2 perplexities, 7 seconds"
    ) in said
    assert "no problems found" in said
    assert "note" not in said
    assert "not checked" not in said


def flip(path):
    """Turn one bit in the middle of a file, which may be a link; fill an empty one."""
    content = bytearray(path.read_bytes() or b"1")
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_one_flipped_bit_anywhere_is_found_and_named(whole, tmp_path, capsys):
    """Every file but those that only a listing has: each is in one artifact or another."""
    names = [p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.is_file()]
    assert len(names) > 30
    for number, name in enumerate(names):
        results = shutil.copytree(whole, tmp_path / str(number), symlinks=True)
        flip(results / name)
        lines = wrong(results, capsys)
        assert any(str(results / name) in line for line in lines), name
        shutil.rmtree(results)


def test_artifacts_of_other_ones_are_found(results, tmp_path, capsys):
    """Each sealed anew, so that only its counterpart tells."""
    tiny_llama(tmp_path / "other", seed=1)
    run("model", tmp_path / "other", "-o", results / "models/tiny")
    lines = wrong(results, capsys)
    assert len(lines) == 7  # four statistics, the checkpoint, the spectra, the dense perplexity
    assert all("models/tiny/arch.json says weights_sha256 is" in line for line in lines)


def test_statistics_collected_again_make_what_was_made_of_them_stale(results, capsys):
    run("collect", results / "models/tiny", "--text", results / "texts/learn/docs.jsonl",
        "--tokens", "256", *BLOCK, "-o", results / "rxx/tiny/short/v_blocks.safetensors",
        )  # fmt: skip
    for line, name in zip(
        wrong(results, capsys), (f"checkpoints/{TAIL}/approx.json", "spectra/tiny/short.json"),
        strict=True,
    ):  # fmt: skip
        assert f"{name}: made of v_blocks whose sha256 is" in line


def test_a_text_made_again_makes_what_has_read_it_stale(results, tmp_path, capsys):
    (tmp_path / "learn.txt").write_text("Another river. " * 100)
    run("text", tmp_path / "learn.txt", "-o", results / "texts/learn/docs.jsonl")
    lines = wrong(results, capsys)
    assert len(lines) == 5  # the split that excludes it, and four statistics
    assert sum("the text changed" in line for line in lines) == 4


def test_what_is_gone_is_said_and_not_wrong(results, capsys):
    shutil.rmtree(results / "rxx")
    shutil.rmtree(results / "texts")
    assert main(["verify", str(results)]) == 0
    said = capsys.readouterr().out
    assert (
        "not checked, since missing: statistics of a checkpoint or spectra of 8 artifacts" in said
    )
    assert "not checked, since missing: text or items of 3 artifacts" in said


def test_other_code_and_libraries_are_a_note(results, capsys):
    path = results / "eval/tiny/dense/ppl/score.json"
    record = read_record(path)
    del record["sha256"]
    record["provenance"] |= {"code": "0" * 16}
    record["provenance"]["libraries"]["torch"] = "1.0"
    write_record(path, record)
    assert main(["verify", str(results)]) == 0
    said = capsys.readouterr().out
    assert "note: 1 artifacts were made by other code of perplexity" in said
    assert "note: 1 artifacts were made by other torch 1.0" in said


def test_a_folder_without_artifacts(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert "no artifact of a3 in it" in capsys.readouterr().err


def test_artifacts_say_where_the_model_came_from(whole):
    """Model revision and content hash, calibration text hash, settings, seeds, code, libraries."""
    source = read_record(whole / "models/tiny/arch.json")["provenance"]["source"]
    approx = read_record(whole / "checkpoints" / TAIL / "approx.json")
    statistics = approx["provenance"]["statistics"]["v_blocks"]
    score = read_record(whole / "eval" / TAIL / "ppl/score.json")
    assert source == {"path": str(whole.parent / "tiny")}
    for made in (approx["provenance"], statistics, score["provenance"]):
        assert made["model"]["source"] == source
        assert {"code", "libraries", "stage", "modules"} <= made.keys()
    text = whole / "texts/learn/docs.jsonl"
    assert statistics["text_sha256"] == sha256(text)
    assert {"seed", "tokens", "block_length", "bos", "dtype"} <= statistics.keys()
    assert score["checkpoint_sha256"] == approx["weights_sha256"]


# --- the pieces ---


def test_weights_are_hashed_once_and_when_first_read(results, monkeypatch):
    """Two readers, one hash; and none for a file of which no tensor is read."""
    hashed = []
    whole_digest = files.hashlib.file_digest
    monkeypatch.setattr(files, "SMALL", 0)
    monkeypatch.setattr(files, "_hashes", {})
    monkeypatch.setattr(
        files.hashlib,
        "file_digest",
        lambda stream, how: hashed.append(Path(stream.name).name) or whole_digest(stream, how),
    )
    folder = results / "models/tiny"
    for _ in range(2):
        checkpoint = Checkpoint(folder)
        checkpoint.shape(checkpoint.names()[0])
    assert "model.safetensors" not in hashed
    for _ in range(2):
        checkpoint.tensor(checkpoint.names()[0])
        Checkpoint(folder).verify_all()
    assert len(hashed) == len(set(hashed))
    assert hashed.count("model.safetensors") == 1


def test_weights_that_the_record_does_not_name_are_not_read(results):
    folder = results / "models/tiny"
    record = read_record(folder / "arch.json")
    del record["sha256"], record["files"]["model.safetensors"]
    write_record(folder / "arch.json", record)
    with pytest.raises(A3Error, match=r"its record does not name model\.safetensors"):
        Checkpoint(folder)


def test_one_damaged_weight_stops_every_stage(results, capsys):
    """Finite, of the right shape, and wrong."""
    for folder in ("models/tiny", f"checkpoints/{TAIL}"):
        path = results / folder / "model.safetensors"
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] += 1
        path.unlink()
        save_file(tensors, path, {"format": "pt"})
    text, out = results / "texts/score/test.jsonl", results / "out"
    rxx = out / "v_blocks.safetensors"
    collect = ["collect", results / "models/tiny", "--text", text, "--tokens", "128", *BLOCK]
    approx = ["approx", results / "models/tiny", "--rxx", results / "rxx/tiny/short"]
    score = ["--text", text, "--tokens", "128", *BLOCK, "-o", out / "ppl.json"]
    capsys.readouterr()
    for words in (
        [*collect, "-o", rxx],
        [*collect, "--stream", "-o", rxx],
        [*approx, "--ratio", "0.25", "-o", out / "small"],
        ["eval", "ppl", results / "models/tiny", *score],
        ["eval", "ppl", results / f"checkpoints/{TAIL}", *score],
    ):
        assert main([str(word) for word in words]) == 1
        assert "model.safetensors: changed since it was written" in capsys.readouterr().err
    assert not out.exists() or not list(out.iterdir())


def write_folders(path, mark, count):
    """Put a folder whose files all say `mark` at `path`, again and again."""
    for _ in range(count):
        with whole_folder(path, Seal("arch.json", "test")) as folder:
            for i in range(10):
                (folder / str(i)).write_text(mark)
            made = {"files": hash_files(folder), "provenance": {"stage": "test"}}
            write_record(folder / "arch.json", made)


def test_of_two_writers_of_a_folder_one_wins_whole(tmp_path):
    context = get_context("fork")
    path = tmp_path / "out"
    writers = [context.Process(target=write_folders, args=(path, m, 100)) for m in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len({(path / str(i)).read_text() for i in range(10)}) == 1
    assert len(list(path.iterdir())) == 12
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_another_writer_is_replacing_is_not_taken_for_missing(tmp_path, monkeypatch):
    out, exists = tmp_path / "out", Path.exists

    def gone_after(path):
        found = exists(path)
        if path == out and found:
            out.rmdir()
        return found

    out.mkdir()
    monkeypatch.setattr(Path, "exists", gone_after)
    write_folders(out, "a", 1)
    assert (out / "9").read_text() == "a"


def test_a_path_through_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(A3Error, match=f"leads through a folder .* Write {tmp_path / 'out'}"):
        write_folders(tmp_path / "gone/../out", "a", 1)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_put_over_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(A3Error, match="a file or link"):
        write_folders(tmp_path / "out", "a", 1)
    assert (tmp_path / "out").read_text() == "mine"
