"""Speed of compiled decoding: what is run, in what order, and that its tokens are the same."""

from functools import partial

import pytest
import torch
from tiny import run, small_model, tiny_model

from a3.cli.main import main
from a3.core.errors import A3Error
from a3.core.files import read_record
from a3.stages.evaluate import speed as stage
from a3.stages.evaluate.speed_compiled import COMPILED, Compiled
from a3.stages.evaluate.speed_models import of_folder
from a3.stages.evaluate.speed_summary import compared

SHORT = ["--prompt", "6", "--new-tokens", "3", "--batch", "2", "--repeats", "2", "--compile"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a dense model and one with ranks by layer."""
    work = tmp_path_factory.mktemp("compiled")
    small_model(work, "llama", {}, ["--preset", "a3-plus"])
    return work


@pytest.fixture(autouse=True)
def quick_compile(monkeypatch):
    """Compile without the code generator: the same graphs, in seconds."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_compiled_and_other_decoding_take_turns(folder, tmp_path, monkeypatch):
    order, real = [], stage.Subject.run

    def noted(self, ids, new_tokens, way):
        order.append((way, self.candidate.name.endswith("small")))
        return real(self, ids, new_tokens, way)

    monkeypatch.setattr(stage.Subject, "run", noted)
    folders = [folder / "dense", folder / "small"]
    run("eval", "speed", *folders, *SHORT, "--attention", "sdpa", "-o", tmp_path / "speed.json")
    ways = ["sdpa", f"sdpa{COMPILED}"]
    assert order == [(way, small) for way in ways for small in (False, True)] * 3
    record = read_record(tmp_path / "speed.json")
    assert (record["attention"], record["compiled"]) == (ways[:1], ways[1:])
    assert [row["attention"] for row in compared(record)] == ways * 2
    for model in record["models"]:
        assert list(model["attention"]) == ways
        assert all(len(one["decode"]["samples"]) == 2 for one in model["attention"].values())
        # A static cache has as many bytes as one that has grown to this length.
        assert model["cache_bytes"] == model["size"]["kv_bytes_per_token"] * 2 * (6 + 3)


def test_compiled_steps_continue_as_others_do(folder):
    way = f"eager{COMPILED}"
    subject = stage.Subject(
        of_folder(folder / "small", "float32", "cpu"), stage.Clock("cpu"), [way]
    )
    ids, seen = torch.tensor([[0, 5, 9, 40]]), []
    with torch.inference_mode():
        subject.compile(ids, 3)
        real = subject.compiled.step

        def noted(way, ids, **options):
            seen.append(ids.item())
            return real(way, ids, **options)

        subject.compiled.step = noted
        expected = subject.model.generate(
            ids, max_new_tokens=3, do_sample=False, eos_token_id=None
        )[0, 4:]
        for _ in range(2):  # the second time with the cache of the first
            seen.clear()
            subject.run(ids, 3, way)
            assert seen == expected.tolist()
            assert subject.compiled.cache.get_seq_length() == 7


def test_a_family_that_cannot_use_a_static_cache_is_refused(tmp_path, capsys):
    """GPT-Neo's local layers take the end of a static cache for the present."""
    local = {"attention_types": [[["global", "local"], 1]], "window_size": 4}
    folder = tiny_model(tmp_path / "neo", "gpt_neo", **local)
    words = ["eval", "speed", str(folder), *SHORT, "--attention", "eager"]
    assert main([*words, "-o", str(tmp_path / "speed.json")]) == 1
    assert "compiled, the logits of the next token differ by" in capsys.readouterr().err
    assert not (tmp_path / "speed.json").exists()


def test_a_compiler_that_fails_is_named(folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("no g++ here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile.func, backend=fail))
    model = of_folder(folder / "dense", "float32", "cpu").build()
    compiled = Compiled(model, "dense", 9, None)
    with pytest.raises(A3Error, match=r"dense: torch.compile cannot compile it .* Leave out --c"):
        compiled.check("sdpa", torch.tensor([[0, 5, 9, 40]]))
