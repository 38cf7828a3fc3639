"""a3 compress after a kill: the same command goes on from its work folder, to the same bytes."""

import os
import re
import shutil
import signal
from fnmatch import fnmatch
from pathlib import Path

import pytest
from tiny import document, run, tiny_llama

from a3 import pipeline
from a3.artifacts.card import record_loss
from a3.cli.main import main
from a3.core.files import read_record
from a3.core.work import RECORD, locked
from a3.jobs import forecast
from a3.solutions.modes import PRESETS, choose
from a3.solutions.plan import Plan
from a3.stages.approx import kept

# After which of its files, in order, a run is killed.
KILLS = [
    "*.a3-work/model",
    "*.a3-work/docs.jsonl",
    "*.a3-work/dev.jsonl",
    "*.a3-work/collecting/sums/*.1.safetensors",
    "*.a3-work/rxx/k_blocks.safetensors",
    "*.a3-work/losses/0of1.safetensors",
    "*.a3-work/allocation.json",
    "*.a3-work/layers/0of3.safetensors",
    "*.a3-work/layers/1of3.json",
    "*.a3-work/result",
    "*.a3-work/result/README.md",
    "*.a3-work/result/approx.json",
    "*.a3-work/finished.json",
    "*/small",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a model of three layers and a text."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "dense", num_hidden_layers=3)
    (tmp_path / "text.jsonl").write_text("".join(map(document, range(40))))
    (tmp_path / "dev.jsonl").write_text("".join(map(document, range(40, 60))))
    return tmp_path


def command(preset="a3", *others):
    words = ["compress", "dense", "--preset", preset, "--ratio", "0.25", "--text", "text.jsonl"]
    words += ["--dev-text", "dev.jsonl"]
    sizes = ["--tokens", "512", "--block-length", "64", "--threads", "1"]
    return [*words, *sizes, "-o", "small", *others]


def killed(words, pattern):
    """Run a command in a process that SIGKILL ends when it has written what the pattern names."""
    if not (child := os.fork()):
        replace = os.replace

        def write(source, target):
            replace(source, target)
            if fnmatch(Path(target).resolve(), pattern):
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = write
        os._exit(main(words))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def content(folder):
    """Files of a folder, but for the seconds that it took."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "timing.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def stages(preset):
    """The same result from the stages, in the folder `stages`."""
    blocks = ["--tokens", "512", "--block-length", "64", "--threads", "1"]
    modes = ["--rxx", "stages", "--preset", preset, "--ratio", "0.25", "--threads", "1"]
    kinds = Plan(choose(PRESETS[preset] | {"ratio": "0.25"})).kinds()
    run("model", "dense", "-o", "stages/model")
    run("text", "text.jsonl", "-o", "stages/docs.jsonl")
    files = [f"stages/{kind}.safetensors" for kind in kinds]
    run("collect", "stages/model", "--text", "stages/docs.jsonl", *blocks, "-o", *files)
    if preset != "a3":
        run("allocate", "stages/model", *modes, "-o", "stages/ranks.json")
        modes += ["--allocation", "stages/ranks.json"]
    run("approx", "stages/model", *modes, "-o", "stages/small")
    run("text", "dev.jsonl", "-o", "stages/dev.jsonl")
    allocation = modes[modes.index("--allocation") :] if "--allocation" in modes else []
    texts = ["--text", "stages/docs.jsonl", "--dev-text", "stages/dev.jsonl", *blocks]
    models = ["stages/model", "stages/small"]
    run("eval", "fit", *models, *texts, *allocation, "-o", "stages/fit.json")
    found = read_record(Path("stages/fit.json"))
    loss = {key: found[key] for key in ("predicted", "calibration", "dev")}
    record_loss(Path("stages/small"), loss)


@pytest.mark.parametrize("preset", ["a3", "a3-plus"])
def test_a_run_killed_again_and_again_gives_the_bytes_of_the_stages(folder, capfd, preset):
    for pattern in KILLS:
        if preset != "a3" or not re.search("losses|allocation", pattern):
            assert killed(command(preset), pattern), pattern
    assert main(command(preset)) == 0
    assert names(folder) == ["dense", "dev.jsonl", "small", "text.jsonl"]
    count = 4 if preset == "a3" else 7
    assert f"small.a3-work, which has {count} statistics, 2 layers" in capfd.readouterr().out
    stages(preset)
    assert content(folder / "small") == content(folder / "stages/small")


def test_what_was_finished_is_not_done_again(folder, monkeypatch):
    assert killed(command(), "*/layers/1of3.json")
    monkeypatch.setattr(pipeline, "collect", None)
    solved = []
    solve_shard = kept.solve_shard
    monkeypatch.setattr(kept, "solve_shard", lambda *a: (solved.append(a[2]), solve_shard(*a)))
    assert main(command()) == 0
    assert solved == ["2of3"]


def test_a_damaged_layer_is_solved_again(folder):
    assert killed(command(), "*/layers/1of3.json")
    damaged = folder / "small.a3-work/layers/0of3.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert main(command()) == 0
    stages("a3")
    assert content(folder / "small") == content(folder / "stages/small")


def test_another_command_is_refused_and_fresh_starts_over(folder, capsys):
    assert killed(command(), "*/rxx/k_blocks.safetensors")
    before = content(folder)
    assert main([*command(), "--seed", "1"]) == 1
    said = capsys.readouterr().err
    assert "small.a3-work: was made for another command: seed is 0, now 1" in said
    assert "--fresh" in said
    assert main(command("a3-plus")) == 1
    assert "qk is 'rxx-w-rxx@0.25', now 'fisher~@0.25'" in capsys.readouterr().err
    with (folder / "text.jsonl").open("a") as text:
        text.write(document(41))
    assert main(command()) == 1
    assert "the content of text.jsonl is" in capsys.readouterr().err
    (folder / "text.jsonl").write_bytes(before["text.jsonl"])
    with (folder / "dev.jsonl").open("a") as text:
        text.write(document(61))
    assert main(command()) == 1
    assert "the content of dev.jsonl is" in capsys.readouterr().err
    (folder / "dev.jsonl").write_bytes(before["dev.jsonl"])
    assert content(folder) == before
    assert main([*command(), "--seed", "1", "--fresh"]) == 0
    assert names(folder) == ["dense", "dev.jsonl", "small", "text.jsonl"]


def test_foreign_files_stay(folder, capsys):
    work = folder / "small.a3-work"
    work.mkdir()
    (work / "thesis.tex").write_text("mine")
    for words in (command(), command("a3", "--fresh")):
        assert main(words) == 1
        assert "small.a3-work: exists already, expected a work folder" in capsys.readouterr().err
        assert names(folder) == ["dense", "dev.jsonl", "small.a3-work", "text.jsonl"]
        assert content(work) == {"thesis.tex": b"mine"}
    shutil.rmtree(work)
    assert killed(command(), "*/layers/0of3.json")
    for name in ("thesis.tex", "model/thesis.tex", "rxx/thesis.tex"):
        (work / name).write_text("mine")
        for words in (command(), command("a3", "--fresh")):
            assert main(words) == 1
            assert f"holds {name}, which is not of this command" in capsys.readouterr().err
        (work / name).unlink()
    (work / RECORD).write_text("{}")
    assert main(command()) == 1
    assert "work.json: found no sha256" in capsys.readouterr().err


def test_a_result_that_came_from_elsewhere_stays(folder, capsys):
    assert killed(command(), "*/finished.json")
    (folder / "small").mkdir()
    (folder / "small/thesis.tex").write_text("mine")
    assert main(command()) == 1
    assert "small: exists already, and holds thesis.tex" in capsys.readouterr().err
    assert content(folder / "small") == {"thesis.tex": b"mine"}


def test_a_deleted_result_is_made_again(folder):
    assert killed(command(), "*/small")
    shutil.rmtree(folder / "small")
    assert main(command()) == 0
    assert names(folder) == ["dense", "dev.jsonl", "small", "text.jsonl"]


def test_an_error_keeps_long_work_and_nothing_else(folder, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    assert main([*command(), "--qk", "qk"]) == 1
    assert names(folder) == ["dense", "dev.jsonl", "text.jsonl"]
    monkeypatch.setattr(pipeline, "collect", stop)
    assert main(command()) == 130
    assert names(folder) == ["dense", "dev.jsonl", "text.jsonl"]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(pipeline, "solve_missing", stop)
    capsys.readouterr()
    assert main(command()) == 130
    assert "small.a3-work: keeps what is finished; the same command" in capsys.readouterr().err
    assert names(folder) == ["dense", "dev.jsonl", "small.a3-work", "text.jsonl"]


def test_a_work_folder_serves_one_run_at_a_time(folder, capsys):
    assert killed(command(), "*/layers/0of3.json")
    with locked(folder / "small.a3-work"):
        assert main(command()) == 1
    assert "another command is at work in it" in capsys.readouterr().err
    assert main(command()) == 0


def test_long_work_says_first_what_it_costs_and_only_once(folder, capfd, monkeypatch):
    monkeypatch.setattr(forecast, "MUCH", 0)
    assert killed(command("a3-plus"), "*/layers/0of3.json")
    said = capfd.readouterr().out.splitlines()
    assert re.match(r"compress: about \d+ s \(collect \d+ s, allocate \d+ s, approx", said[0])
    assert ", loss " in said[0]
    assert re.search(r"[\d.]+ GiB of memory and 0\.0 GiB on disk$", said[0])
    assert main(command("a3-plus")) == 0
    assert "about" not in capfd.readouterr().out
