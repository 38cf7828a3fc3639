"""What a3 plan says: sizes held to real files; times to nothing here (docs/log.md has them)."""

import json
import shutil
from collections import Counter
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from test_compressed import MODELS
from test_workflow import Project
from tiny import tiny_llama, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from a3.cli.main import main
from a3.core import memory
from a3.core.errors import A3Error
from a3.jobs import counts, forecast, pieces, trial
from a3.jobs.counts import CALLS
from a3.jobs.forecast import Job, stages_of
from a3.jobs.settings import SETTINGS as SETTINGS_OF
from a3.jobs.trial import START, Trial
from a3.models.arch import describe, sketch
from a3.solutions.modes import COMPONENTS, PRESETS

ROW = {"qk": "dense", "ov": "xkv", "mlp": "rxx-w", "ratio": "0.25"}
SETTINGS = {"tokens": 512, "block_length": 64, "dtype": "float32", "device": "cpu"}


@pytest.mark.parametrize("variant", MODELS)
def test_config_json_is_enough_for_every_family(tmp_path, variant):
    family, config = MODELS[variant]
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {family}")
    tiny_model(tmp_path / "dense", family, **config)
    known = describe(tmp_path / "dense")
    (tmp_path / "dense/model.safetensors").unlink()
    guess = sketch(tmp_path / "dense")
    assert guess.to_json() | {"weights_sha256": known.weights_sha256} == known.to_json()
    for estimate in forecast.forecast(stages_of(tmp_path / "dense", ROW, SETTINGS)):
        assert estimate.flops > 0
        assert START < estimate.seconds < START + 60


def test_every_stage_takes_its_settings_and_no_others():
    assert forecast.STAGES.keys() == SETTINGS_OF.keys()
    for stage, estimate in forecast.STAGES.items():
        assert tuple(signature(estimate).parameters) == ("self", *SETTINGS_OF[stage])


def test_sizes_are_those_of_the_files(tmp_path):
    dense, rxx, small = (tmp_path / name for name in ("dense", "rxx", "small"))
    tiny_llama(dense)
    (tmp_path / "text.txt").write_text("A river moves towards an ocean or a lake. " * 60)
    kinds = ["v_blocks", "down_diagonal"]
    files = [str(rxx / f"{kind}.safetensors") for kind in kinds]
    text = ["--text", str(tmp_path / "text.txt"), "--tokens", "256", "--block-length", "64"]
    assert main(["collect", str(dense), *text, "-o", *files]) == 0
    modes = [word for key, value in ROW.items() for word in (f"--{key}", value)]
    assert main(["approx", str(dense), "--rxx", str(rxx), *modes, "-o", str(small)]) == 0

    trial = Trial(dense, "cpu", 1)
    record = json.loads((small / "approx.json").read_text())
    assert trial.compressed(ROW) == record["size"]["compressed"]
    _, disk, _ = trial.collect(kinds, tokens=256, block_length=64, dtype="float32")
    assert 0 < sum((rxx / f"{k}.safetensors").stat().st_size for k in kinds) - disk < 4096
    _, disk, _ = trial.approx(ROW, jobs=1)
    assert 0 < (small / "model.safetensors").stat().st_size - disk < 4096
    half = [trial.approx(ROW, jobs=jobs)[1] for jobs in (1, 2)]
    assert half == [disk, disk // 2]


def test_the_command_needs_no_weights(tmp_path, capsys):
    tiny_llama(tmp_path / "dense")
    (tmp_path / "dense/model.safetensors").unlink()
    plan = ["plan", str(tmp_path / "dense"), "--ratio", "0.25", "--results", str(tmp_path)]
    assert main(plan) == 0
    said = capsys.readouterr().out
    stages = [line.split()[1] for line in said.splitlines()[1:5]]
    assert stages == ["collect", "approx", "ppl", "ppl"]
    assert "together" in said
    assert main([*plan, "--preset", "a3-plus"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines()[1:4]] == ["collect", "allocate", "approx"]
    assert main(["plan"]) == 1
    assert "plan: no model. Name" in capsys.readouterr().err
    assert main([*plan, "--qk", "guess"]) == 1
    assert "'guess'" in capsys.readouterr().err


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("mode", ["a3", "a3-plus", "svd-llm"])
@pytest.mark.parametrize("shape", [(4096, 14336, 32, 32), (8192, 28672, 64, 80)])
def test_pieces_of_large_models_are_small(tmp_path, monkeypatch, shape, mode):
    """Of the shapes of Llama-3.1-8B and 70B; what the pieces compute is as small as they are."""
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    sizes = {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
    config = AutoConfig.for_model("llama", **dict(zip(keys, shape, strict=True)), **sizes)
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(pieces, "clock", lambda call, device: 1.0)
    monkeypatch.setattr(trial, "clock", lambda call, device: 1.0)
    monkeypatch.setattr(pieces, "counted", lambda call: Counter({CALLS: 1}))
    row = dict(PRESETS.get(mode) or dict.fromkeys(COMPONENTS, mode)) | {"ratio": "0.2"}
    with Largest() as made:
        found = forecast.forecast(stages_of(tmp_path, row, SETTINGS | {"block_length": 1024}))
    assert made.bytes < 128 * 2**20
    assert min(one.seconds for one in found) > START


@pytest.mark.parametrize("mode", ["a3-plus", "reap", "hc-smoe", "m-smoe"])
def test_a_mixture_is_counted_by_its_experts(tmp_path, monkeypatch, mode):
    """Of the shapes of Qwen3-30B-A3B; nothing of the size of all its experts is computed."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(pieces, "clock", lambda call, device: 1.0)
    monkeypatch.setattr(trial, "clock", lambda call, device: 1.0)
    monkeypatch.setattr(pieces, "counted", lambda call: Counter({CALLS: 1}))
    plain = {"qk": "dense", "ov": "dense", "mlp": mode}
    row = dict(PRESETS.get(mode) or plain) | {"ratio": "0.25"}
    with Largest() as made:
        found = forecast.forecast(stages_of(tmp_path, row, SETTINGS | {"block_length": 1024}))
    assert made.bytes < 128 * 2**20
    collecting = next(one for one in found if one.stage == "collect")
    if mode == "a3-plus":
        # Of each expert 1.5 bytes for an entry of its C, and attention's statistics.
        experts = 48 * 128 * 1.5 * 768**2
        assert experts < collecting.disk < 2 * experts
        # Each statistic has one sum for each of the eight experts that a token reaches.
        by_hand = 512 * 48 * 8 * 768**2
        assert collecting.flops < 6 * 2 * 3e9 * 512 + 4 * by_hand
    else:
        # Hidden states; the router's logits or the mean outputs of experts.
        more = {"m-smoe": 48 * 128**2 * 2, "hc-smoe": 48 * 128 * 2048 * 8}
        assert collecting.disk < 2**24 + more.get(mode, 0)
        # What every expert makes of every token, where that is asked for.
        outputs = 512 * 48 * 128 * 2 * 3 * 2048 * 768
        assert (collecting.flops > outputs) == (mode == "hc-smoe")
        # Channels of all experts are put in order, in 3³ times the second that a piece takes.
        own = pieces.Pieces(sketch(tmp_path), torch.device("cpu"))
        assert own.solve("mlp", mode, 96) == (128 * 27 if mode == "m-smoe" else 0)


def test_times_grow_by_their_law():
    law = [(2, 4.0 * 2 + 3.0 * 4), (4, 4.0 * 4 + 3.0 * 16)]
    assert pieces.grown(law, 64) == pytest.approx(4 * 64 + 3 * 64**2)
    assert pieces.grown(law, 4) == pytest.approx(law[1][1])
    # Never slower than in proportion, never faster than the square.
    assert pieces.grown([(2, 5.0), (4, 5.0)], 8) == pytest.approx(10)
    assert pieces.grown([(2, 1.0), (4, 9.0)], 8) == pytest.approx(36)


def test_operations_are_counted_and_scaled():
    def call(n):
        x = torch.ones(n, n, dtype=torch.float64)
        return lambda: (torch.linalg.cholesky(x @ x + n * x.diag().diag()), x[:, :1] @ x[:1])

    less, more, large = (counts.counted(call(n)) for n in (32, 64, 512))
    assert large[CALLS] == more[CALLS]
    assert large["product", torch.float64] == 512**3 + 512**2
    found = counts.scaled(less, more, (32, 64), 512)
    assert found.keys() == large.keys()
    for key, number in large.items():
        assert found[key] == pytest.approx(number, rel=0.01)


def estimates(tmp_path):
    tiny_llama(tmp_path / "dense")
    return forecast.forecast(stages_of(tmp_path / "dense", ROW, SETTINGS))


def test_too_little_disk_is_refused(tmp_path, monkeypatch):
    found = estimates(tmp_path)
    forecast.refuse(found, tmp_path / "results", here=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        A3Error, match=r"results: 0\.\d\d GiB are to be written, 0\.00 GiB are free"
    ):
        forecast.refuse(found, tmp_path / "results", here=True)


def test_too_little_memory_is_refused_for_jobs_that_run_here(tmp_path, monkeypatch):
    found = estimates(tmp_path)
    monkeypatch.setattr(memory, "memory_at_hand", lambda: 100 * 2**20)
    with pytest.raises(A3Error, match=r"dense: a job of collect needs at least 0\.\d GiB"):
        forecast.refuse(found, tmp_path, here=True)
    forecast.refuse(found, tmp_path, here=False)


def test_where_weights_do_not_fit_collect_is_planned_layer_by_layer(tmp_path, monkeypatch):
    tiny_llama(tmp_path / "dense")
    job = Job(str(tmp_path / "dense"), "collect", SETTINGS | {"threads": 1, "kinds": ["v_blocks"]})
    (resident,) = forecast.forecast([job])
    monkeypatch.setattr(trial, "memory_at_hand", lambda: 100)
    (streamed,) = forecast.forecast([job])
    assert streamed.memory < resident.memory
    assert streamed.disk - resident.disk == 2 * 512 * 64 * 4  # hidden states of two layers


def test_the_workflow_says_what_it_will_cost_and_refuses(tmp_path):
    project = Project(tmp_path)
    project.edit("a3/core/memory.py", "at_hand = memory_at_hand()", "at_hand = 0")
    rows = "tiny\tshort\tfisher~\tjoint~\tobs~\t0.25\t-\n"
    rows += "tiny\tshort\tdense\tdense\tdense\t-\tw4a8+none\n"
    table = tmp_path / "experiments.tsv"
    head, *old = table.read_text().splitlines()
    old = "".join(f"{line}\t-\n" for line in old)
    table.write_text(f"{head}\tquantise\n{old}{rows}")
    rules, output = project.snakemake(plan=True, status=1)
    assert rules == []
    assert not (tmp_path / "results/models").exists()
    for stage in ("collect", "allocate", "approx", "quantise", "ppl", "harness"):
        assert f" tiny {stage} " in " ".join(output.split())
    assert "with 2 at once" in output
    assert "tiny: a job of collect needs at least" in output
    assert "these jobs cannot run here" in output
