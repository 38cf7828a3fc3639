"""Before anything runs: what the jobs will cost on this machine, and a refusal of what cannot be.

Models that are neither built yet nor a local folder have no shapes; their jobs are planned at the
next start, and each job looks at its own memory when it begins.
"""

import subprocess
import sys
from collections import Counter

from a3.artifacts.places import SurgeryPlace
from a3.jobs.settings import settings_of
from a3.solutions.modes import SHARED, eliminating

# Rules of the heavy stages.
STAGES = {
    "collect": "collect",
    **dict.fromkeys(ONE_PASS, "collect"),
    "collect_compressed": "collect",
    "losses": "allocate",
    "allocate_target": "ppl",
    "approx": "approx",
    "approx_shard": "approx",
    "frontier": "ppl",
    "quantise": "quantise",
    "eval_ppl": "ppl",
    "eval_fit": "ppl",
    "eval_harness": "harness",
    "eval_speed": "speed",
}


onstart:
    if workflow.exec_mode == ExecMode.DEFAULT:
        announce()


def announce():
    """Print `a3 plan` of the jobs that will run; raises WorkflowError where it refuses."""
    heavy = [job for job in workflow.dag.needrun_jobs() if job.rule.name in STAGES]
    there = [job for job in heavy if model_of(job)]
    for model in sorted({job.wildcards.model for job in heavy if not model_of(job)}):
        print(f"{model} is not built yet: its jobs are not in the plan", file=sys.stderr)
    if not there:
        return
    there.sort(key=lambda job: (model_of(job), list(STAGES).index(job.rule.name)))
    counts = Counter(json.dumps(planned(job), sort_keys=True) for job in there)
    jobs = [json.loads(job) | {"count": count} for job, count in counts.items()]
    at_once = workflow.cores if workflow.local_exec else workflow.nodes
    where = [] if workflow.local_exec else ["--elsewhere"]
    command = ["a3", "plan", "--jobs", json.dumps(jobs), "--results", RESULTS, *where]
    try:
        done = subprocess.run([*command, "--cores", str(at_once)], stdout=sys.stderr)
    except KeyboardInterrupt:
        raise WorkflowError("interrupted; nothing was run.") from None
    if done.returncode:
        raise WorkflowError("these jobs cannot run here (a3 plan, above).")


def model_of(job):
    """The folder of the dense model of a job, or the local one that it will be made from; or None."""
    built = f"{RESULTS}/models/{job.wildcards.model}"
    local = entry("models", job.wildcards.model)["source"].get("path")
    folders = [
        folder for folder in (built, local) if folder and Path(folder, "config.json").exists()
    ]
    return folders[0] if folders else None


def planned(job):
    """A job as `a3 plan` reads it."""
    stage, wildcards = STAGES[job.rule.name], job.wildcards
    solves = stage in ("allocate", "approx", "quantise")
    group = "approx" if solves else stage if stage in C["threads"] else "eval"
    settings = {"threads": C["threads"][group], "device": C["device"]}
    if stage == "collect":
        settings |= entry("calibrations", wildcards.calibration)
        kind = wildcards.get("kind")
        if job.rule.name == "collect_compressed":  # in one job, whatever the shards
            settings |= {"kinds": QUANTISED_KINDS}
        else:
            settings |= {"kinds": [kind] if kind else TOGETHER[wildcards.calibration]}
            settings["tokens"] //= settings["shards"]
    elif solves:
        row = {key: wildcards.get(key) for key in ("qk", "ov", "mlp", "ratio")}
        if stage == "allocate":  # losses by rank: for modes whose ratio is allocated, at any ratio
            row |= {key: mode + SHARED for key, mode in eliminating(row).items()} | {"ratio": "0"}
        settings |= {"row": row, "jobs": JOBS, "device": "cpu"}
    else:
        settings |= {"row": row_of(place_of(wildcards))}
        if job.rule.name == "allocate_target":  # scores blocks where a loss is to be kept
            settings |= entry("calibrations", wildcards.calibration)
            scored = (TRIALS + 1) * TRIAL_BLOCKS * settings["block_length"]
            settings["tokens"] = scored if measured_text(wildcards) else 0
        elif job.rule.name == "eval_fit":
            settings |= fit_calibration(wildcards) | {"tokens": fit_tokens(wildcards)}
        elif job.rule.name == "frontier":  # its scores, which take most of its time
            settings |= fit_calibration(wildcards)
            settings["tokens"] = 4 * TRIAL_BLOCKS * settings["block_length"]
        elif stage == "ppl":
            settings |= entry("perplexity", wildcards.text)
            settings["tokens"] = tokens_scored(wildcards)
        elif stage == "speed":
            settings |= entry("speed", wildcards.speed)
        else:
            chosen = entry("harness", wildcards.task)
            settings |= chosen | {"items": items_of(chosen)}
    known = {key: settings[key] for key in settings_of(stage)}
    return {"model": model_of(job), "stage": stage, "settings": known}


def row_of(place):
    """The modes and ratio of a row; {} of the dense model and where shapes stay dense."""
    if place.is_dense or isinstance(place, SurgeryPlace):
        return {}
    return {key: getattr(place, key) for key in ("qk", "ov", "mlp", "ratio")}
