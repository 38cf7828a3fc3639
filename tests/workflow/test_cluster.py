"""What jobs ask a cluster for, the profiles, and what can be said of Slurm without one."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from test_workflow import ROOT, Project

from a3.cli.main import main
from a3.core.files import HIDDEN_SEAL, write_record
from a3.models.cost import (
    FIELDS,
    approx_cost,
    collect_cost,
    harness_cost,
    perplexity_cost,
    shapes,
    stream_cost,
)
from a3.rxx.kinds import KINDS, shape_of

PROFILES = ROOT / "workflow/profiles"
SMOLLM2 = {
    "dtype": "float32",
    "experts": 0,
    "experts_per_token": 0,
    "head_dim": 64,
    "heads": 9,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "kv_heads": 3,
    "layers": 30,
    "mlp_inputs": 2,
    "qk_norm": None,
    "rope_dims": 64,
    "size": {"parameters": 134515008, "flops_per_token": 339738624},
    "vocab_size": 49152,
}
# The same shapes as a model of 70B in bfloat16 has.
LLAMA_70B = {
    "dtype": "bfloat16",
    "experts": 0,
    "experts_per_token": 0,
    "head_dim": 128,
    "heads": 64,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "kv_heads": 8,
    "layers": 80,
    "mlp_inputs": 2,
    "qk_norm": None,
    "rope_dims": 128,
    "size": {"parameters": 70553706496, "flops_per_token": 142e9},
    "vocab_size": 128256,
}
PAPER = ("q_blocks", "k_blocks", "v_blocks", "down_diagonal")


# --- estimates ---


@pytest.mark.parametrize(
    ("cost", "measured"),
    [
        (collect_cost(SMOLLM2, 2048, 256, "float32", PAPER), 937),
        (collect_cost(SMOLLM2, 2048, 1024, "float32", PAPER), 953),
        (approx_cost(SMOLLM2), 1292),
        (perplexity_cost(SMOLLM2, 2048, 256, "float32"), 1051),
        (perplexity_cost(SMOLLM2, 2048, 1024, "float32"), 1396),
    ],
)
def test_memory_suffices_and_is_not_wasted(cost, measured):
    """Peaks of resident memory, MiB, as measured on SmolLM2-135M (docs/log.md)."""
    assert measured < cost.megabytes() < 1.4 * measured


@pytest.mark.parametrize("kind", KINDS)
def test_costs_read_the_fields_that_statistics_have_their_shapes_from(kind):
    record = {field: 8 for field in FIELDS} | {"experts": 0, "qk_norm": "head"}
    assert shape_of(KINDS[kind], shapes(record)) == shape_of(KINDS[kind], record)


def test_estimates_follow_the_model():
    gib = 2**30
    big = collect_cost(LLAMA_70B, 131072, 2048, "bfloat16", PAPER)
    assert 131 * gib < big.memory < 145 * gib  # weights, and little beside them
    assert collect_cost(LLAMA_70B, 131072, 2048, "float32", PAPER).memory > 3 * 131 * gib
    assert big.minutes(8, "cpu") > 24 * 60 > 60 > big.minutes(1, "cuda")
    # Attention of one layer in float64, and one file of weights; a shard of eight is 16 GiB.
    assert 5.7 * gib < approx_cost(LLAMA_70B).memory < 8 * gib
    assert 28 * gib < approx_cost(LLAMA_70B, 8).memory < 36 * gib
    assert stream_cost(LLAMA_70B, 131072, 2048, "bfloat16", PAPER).memory < 13 * gib
    short, long = (perplexity_cost(LLAMA_70B, 4096, n, "bfloat16").memory for n in (512, 4096))
    assert long - short > 4 * (4096 - 512) * 128256
    assert harness_cost(SMOLLM2, 60, 5, "float32").memory > (
        harness_cost(SMOLLM2, 60, 0, "float32").memory
    )


def test_shapes_are_what_is_read():
    assert shapes(SMOLLM2 | {"family": "llama"}) == SMOLLM2
    with pytest.raises(KeyError, match="experts"):
        shapes({"dtype": "float32", "head_dim": 64})


# --- profiles ---


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny project of which nothing is built yet."""
    return Project(tmp_path_factory.mktemp("project"))


def dry(project, profile, *arguments, status=0):
    """What a dry run on a profile says of each rule's resources; all it says where it fails."""
    output = project.run(profile, "--dry-run", *arguments, status=status)
    if status:
        return output
    found = re.findall(r"^(?:local)?rule (\w+):\n.*?resources: (.*?)$", output, re.M | re.S)
    return {rule: dict(re.findall(r"(\w+)=([^\s,]+)", said)) for rule, said in found}


@pytest.mark.parametrize("profile", ["slurm", "cluster-generic"])
def test_a_dry_run_on_every_profile(project, profile):
    asked = dry(project, profile)
    for rule in ("collect_together", "approx", "eval_ppl", "eval_harness"):
        assert (asked[rule]["mem_mb"], asked[rule]["runtime"]) == ("<TBD>", "<TBD>")


def test_memory_and_time_come_from_the_model_or_the_config(project):
    model = project.folder / "results/models/tiny"
    model.mkdir(parents=True)
    write_record(model / "arch.json", SMOLLM2)
    (model / HIDDEN_SEAL).write_text("{}")
    config = project.folder / "config/config.yaml"
    before = config.read_text()
    said = "{collect: {mem_mb: 7000, account: lab, partition: long}, eval: {gres: 'gpu:a100:2'}}"
    config.write_text(before + f"device: cuda\nresources: {said}\n")
    asked = dry(project, "slurm")
    config.write_text(before)
    needed = approx_cost(SMOLLM2)  # and 500 MiB for Snakemake itself
    collect, approx, ppl = (asked[rule] for rule in ("collect_together", "approx", "eval_ppl"))
    assert approx["mem_mb"] == str(500 + needed.megabytes())
    assert (approx["runtime"], approx["gpu"]) == (str(needed.minutes(1, "cuda")), "1")
    assert (collect["mem_mb"], collect["runtime"], collect["gpu"]) == ("7000", "10", "1")
    assert (collect["slurm_account"], collect["slurm_partition"]) == ("lab", "long")
    assert ppl["gres"] == "gpu:a100:2"
    assert "gpu" not in ppl

    write_record(model / "arch.json", {})
    output = dry(project, "slurm", status=1)
    assert "results/models/tiny/arch.json: KeyError('dtype'). Delete it" in output
    assert "Traceback (most recent" not in output
    shutil.rmtree(model)


def test_a_wrong_key_of_resources_is_named(project):
    config = project.folder / "config/config.yaml"
    before = config.read_text()
    config.write_text(before + "resources: {collect: {memory: 7000}}\n")
    output = dry(project, "slurm", status=1)
    config.write_text(before)
    assert "unknown key 'memory' at resources.collect" in output


def test_profiles_agree_and_try_again():
    """A rule's own retries would stay inside an allocation, so that they stand in the profiles.

    Only this machine's prints a line a job: a cluster's text says where each job went.
    """
    default = yaml.safe_load((PROFILES / "default/profile.yaml").read_text())
    for name in ("slurm", "cluster-generic"):
        profile = yaml.safe_load((PROFILES / name / "profile.yaml").read_text())
        assert profile["retries"] > 0
        shared = default.keys() - {"cores", "logger"}
        assert {key: profile[key] for key in shared} == {key: default[key] for key in shared}


# --- a3 recover, make test-cluster ---


def test_recover_says_where_it_belongs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recover"]) == 1
    assert "expected the folder that snakemake was started in" in capsys.readouterr().err


def test_recover_leaves_a_running_snakemake_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(".snakemake/log").mkdir(parents=True)
    with Path(".snakemake/log/today.snakemake.log").open("w"):
        assert main(["recover"]) == 1
    said = f"Snakemake still runs here, as process {os.getpid()}. Stop it with Ctrl-C"
    assert said in capsys.readouterr().err


def test_recover_needs_slurms_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    Path(".snakemake/log").mkdir(parents=True)
    Path(".snakemake/log/today.snakemake.log").write_text("SLURM run ID: 1f3c-aa\n")
    assert main(["recover"]) == 1
    assert "scancel not found" in capsys.readouterr().err


@pytest.mark.parametrize(("required", "status", "says"), [("", 0, "SKIPPED"), ("1", 1, "FAILED")])
def test_without_root_the_cluster_tests_say_so(tmp_path, required, status, says):
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "tests/cluster/run"],
        env=os.environ | {"PATH": path, "A3_REQUIRE": required},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status
    assert (done.stdout + done.stderr).startswith(f"{says}: a Slurm of its own needs root")
