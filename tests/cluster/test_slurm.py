"""The workflow through a real Slurm, and drills: each ends in the bytes of an undisturbed run."""

import re
import subprocess
from collections import Counter
from pathlib import Path

from drills import CHAIN, TARGET, check_same, slurm, until

STAGES = ("collect", "approx", "eval")


def records(node):
    """State of every finished job in Slurm's own log, by ID."""
    text = (node / "log" / "jobs.txt").read_text()
    return dict(re.findall(r"^JobId=(\d+) .* JobState=(\w+) ", text, re.MULTILINE))


# --- the whole workflow ---


def test_every_heavy_job_runs_on_slurm(project, undisturbed, node):
    """Partition, GPU, memory and time are asked for by the config, or by the model's size."""
    config = project.folder / "config/config.yaml"
    asked = {"partition": "other", "runtime": 7, "gres": "gpu:1"}
    config.write_text(config.read_text() + f"resources: {{eval: {asked}}}\n")
    run = project.start()
    rules, _ = run.finish()
    heavy = ["approx", "collect_together", *["eval_harness"] * 2, *["eval_ppl"] * 2, "spectra"]
    assert rules == heavy
    jobs = run.jobs()
    assert sorted(job["rule"] for job in jobs) == heavy
    finished = records(node)
    for job in jobs:
        assert finished[job["id"]] == job["state"] == "COMPLETED"
        evaluates = job["rule"].startswith("eval")
        assert job["partition"] == ("other" if evaluates else "main")
        assert job["time"] == ("7:00" if evaluates else "10:00")
        assert job["gres"] == ("gres:gpu:1" if evaluates else "N/A")
        assert 900 <= int(job["memory"].removesuffix("M")) < 1200  # libraries, Snakemake
    check_same(project, undisturbed)
    assert project.contents().keys() == undisturbed.contents().keys()
    logs = project.folder / "results/logs"
    assert len(list(logs.rglob("*.benchmark.tsv"))) > len(heavy)


# --- drills ---


def test_a_cancelled_job_is_done_again(project, undisturbed):
    for stage in STAGES:
        project.shut(stage)
    run = project.start(TARGET)
    for stage in STAGES:
        job = run.held(stage)
        slurm("scancel", job)
        run.held(stage, besides=[job])
        project.open(stage)
    _, output = run.finish()
    states = sorted((job["rule"], job["state"]) for job in run.jobs())
    assert states == sorted((rule, state) for rule in CHAIN for state in ("CANCELLED", "COMPLETED"))
    assert output.count("SLURM status is: 'CANCELLED'") == 3
    check_same(project, undisturbed)


def test_of_shards_and_runs_of_layers_the_cancelled_one_alone_is_done_again(project, tmp_path):
    config = project.folder / "config/config.yaml"
    sharded = config.read_text().replace("block_length: 64}", "block_length: 64, shards: 2}", 1)
    config.write_text(f"{sharded}approx_jobs: 2\n")
    local = project.copy(tmp_path / "local")
    local.snakemake(TARGET)
    for stage in ("collect", "approx"):
        project.shut(stage)
    run = project.start(TARGET)
    for stage in ("collect", "approx"):
        job = run.held(stage)
        slurm("scancel", job)
        run.held(stage, besides=[job])
        project.open(stage)
    run.finish()
    states = Counter((job["rule"], job["state"]) for job in run.jobs())
    for rule in ("collect_together", "approx_shard"):
        assert (states[rule, "CANCELLED"], states[rule, "COMPLETED"]) == (1, 2)
    check_same(project, local)


def test_snakemake_killed(project, undisturbed):
    """One command cancels what it left and unlocks; what was finished is not computed again."""
    project.shut("approx")
    run = project.start(TARGET)
    orphan = run.held("approx")
    finished = {name: made for name, made in project.contents().items() if "/rxx/" in name}
    assert "results/rxx/tiny/short/q_blocks.safetensors" in finished

    # A second workflow in the same folder, while the first one runs and after it was killed.
    for _ in "ab":
        second = project.start(TARGET)
        _, output = second.finish(status=1)
        assert "Directory cannot be locked" in output
        assert "Submitted job" not in output
        status, said = project.a3("recover")
        if run.process.poll() is None:
            assert status == 1
            assert f"Snakemake still runs here, as process {run.process.pid}" in said
            run.kill()
            assert run.jobs()[-1]["state"] == "RUNNING"
        else:
            assert (status, f"cancelling {orphan}" in said) == (0, True), said
    assert run.jobs()[-1]["state"] == "CANCELLED"
    # The job had time to take its temporary files away.
    assert {name for name in project.contents() if "checkpoints" in name} == set()

    project.open("approx")
    again = project.start(TARGET)
    rules, _ = again.finish()
    assert rules == ["approx", "eval_ppl"]
    assert [job["rule"] for job in again.jobs()] == rules
    assert finished.items() <= project.contents().items()
    check_same(project, undisturbed)


def test_an_orphan_spoils_nothing(project, undisturbed):
    """Unlocked without cancelling: two jobs write the same files at the same moment."""
    project.shut("collect")
    run = project.start(TARGET)
    orphan = run.held("collect")
    run.kill()
    project.snakemake("--unlock")
    again = project.start(TARGET)
    again.held("collect", besides=[orphan])
    project.open("collect")
    rules, _ = again.finish()
    assert rules == CHAIN
    until("the orphan ends well", lambda: run.jobs()[-1]["state"] == "COMPLETED")
    check_same(project, undisturbed)


def test_too_little_memory_or_time_and_a_restarted_daemon(project, undisturbed, node):
    """Jobs that Slurm kills are tried again with more; running ones survive a restart of slurmd."""
    config = project.folder / "config/config.yaml"
    config.write_text(
        config.read_text() + "resources: {collect: {mem_mb: 1500}, approx: {runtime: 1}}\n"
    )
    project.shut("collect", mebibytes=1500)
    project.shut("approx")
    project.shut("eval")
    run = project.start(TARGET)

    def ended(job):
        (state,) = [other["state"] for other in run.jobs() if other["id"] == job]
        return state not in ("RUNNING", "COMPLETING")

    for stage in ("collect", "approx"):
        job = run.held(stage)
        until(f"{stage} is killed", lambda job=job: ended(job))
        run.held(stage, besides=[job])
        project.open(stage)

    job = run.held("eval")
    daemon = node / "slurmd.pid"
    pid = daemon.read_text()
    slurm("kill", pid.strip())
    until("slurmd ends", lambda: not Path("/proc", pid.strip()).exists())
    subprocess.run(["slurmd", "-f", node / "slurm.conf"], check=True)
    until("the node is back", lambda: slurm("sinfo", "-h", "-p", "main", "-o", "%t") == ["mix"])
    project.open("eval")

    _, output = run.finish()
    by_rule = {rule: [job for job in run.jobs() if job["rule"] == rule] for rule in CHAIN}
    *killed, fine = by_rule["collect_together"]
    assert [job["memory"] for job in (*killed, fine)] == ["1500M", "3000M"]
    assert killed[0]["state"] in ("OUT_OF_MEMORY", "FAILED", "CANCELLED")
    assert fine["state"] == "COMPLETED"
    # On a busy machine two minutes may not suffice either; three do.
    *killed, fine = by_rule["approx"]
    assert [job["time"] for job in (*killed, fine)] == ["1:00", "2:00", "3:00"][: len(killed) + 1]
    assert {job["state"] for job in killed} == {"TIMEOUT"}
    assert fine["state"] == "COMPLETED"
    assert [job["state"] for job in by_rule["eval_ppl"]] == ["COMPLETED"]
    assert "Exceeded job memory limit" in output
    assert "SLURM status is: 'TIMEOUT'" in output
    # What is killed while it writes cannot take its temporary file away. Nothing reads it.
    for left in project.folder.glob("results/rxx/tiny/short/.*"):
        left.unlink()
    check_same(project, undisturbed)
