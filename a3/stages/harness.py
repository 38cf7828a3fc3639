"""Stage eval harness: EleutherAI's lm-eval on a dense or compressed folder, one task a file."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import hash_string

# Named here so that a change of the compressed model makes evaluations stale.
import a3.models.modeling_a3  # noqa: F401
from a3.errors import A3Error
from a3.files import sha256, write_record
from a3.harness import task_config
from a3.models.checkpoint import Checkpoint, model_source
from a3.models.load import load_model, load_tokenizer
from a3.provenance import provenance
from a3.stages.sources import OFFLINE
from a3.tasks import data_files, read_task

# lm-eval sorts requests by length, so that a batch pads little; larger ones gain nothing on a CPU.
CPU_BATCH = 8
# It asks git for the commit of the folder that it is started in, which a3 does not record, and git
# says "fatal" to the user where that is no repository.
lm_eval.evaluator.get_git_commit_hash = lambda: None


def harness(
    model_folder: Path,
    task: str,
    out: Path,
    *,
    items: Path | None,
    yaml: Path | None,
    metric: str | None,
    shots: int | None,
    limit: int | None,
    dtype: str,
    device: str,
    seed: int,
) -> None:
    """Run one task or group with lm-eval's own `simple_evaluate` and write its scores to `out`.

    With `items` (a local items.jsonl) or `yaml` (a local task) it runs offline and `task` is what
    the result calls it; without, `task` is one of lm-eval's own names, whose data set comes from
    the hub. `metric` is the score reported, by default the task's first. `limit` takes the first
    items only, of each task of a group. Raises A3Error where lm-eval knows no such task or metric.
    """
    checkpoint = Checkpoint(model_folder)
    with tempfile.TemporaryDirectory() as cache:
        chosen, manager, files = find_task(task, items, yaml, shots, cache)
        wrapped = HFLM(
            pretrained=load_model(model_folder, dtype).to(device),
            tokenizer=load_tokenizer(model_folder),
            batch_size=CPU_BATCH if device == "cpu" else "auto",
        )
        start = time.perf_counter()
        with torch.inference_mode(), hub_of(task):
            found = lm_eval.simple_evaluate(
                model=wrapped,
                tasks=[chosen],
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                log_samples=True,
            )
        seconds = time.perf_counter() - start
    record = scores(task, found, metric) | {
        "dtype": dtype,
        "checkpoint_sha256": checkpoint.sha256(),
        "config_sha256": sha256(model_folder / "config.json"),
        "items_sha256": None if items is None else sha256(items),
        "task_files": {path.name: sha256(path) for path in files},
        "provenance": provenance(__name__, model=model_source(model_folder), seed=seed),
    }
    write_record(out, record)
    write_record(out.with_suffix(".timing.json"), {"seconds": seconds})


@contextmanager
def hub_of(task: str) -> Iterator[None]:
    """Raise A3Error where the hub, which has the data of lm-eval's own tasks, is out of reach."""
    try:
        yield
    except OFFLINE as error:
        raise A3Error(
            f"harness task {task}: its data set is at the hub, which cannot be reached, or "
            "HF_HUB_OFFLINE is set, and the cache does not hold it. Run it once where there is a "
            "network, with the same HF_HOME, or name a local task (--items, --yaml)."
        ) from error


def find_task(
    task: str, items: Path | None, yaml: Path | None, shots: int | None, cache: str
) -> tuple[Any, TaskManager, list[Path]]:
    """What `simple_evaluate` takes for a task, the manager that knows it, and files it is made of.

    `cache` is a folder for the rows of a local task, so that none are stale.
    """
    local = TaskManager(include_defaults=False)
    if items is not None:
        return task_config(items, task), local, []
    if yaml is not None:
        config = read_task(yaml)
        files = [yaml, *map(Path, data_files(config))]
        if missing := [str(path) for path in files if not path.is_file()]:
            raise A3Error(f"{yaml}: no file {', '.join(missing)}. Correct data_files.")
        config |= {"task": task, "dataset_kwargs": config["dataset_kwargs"] | {"cache_dir": cache}}
        # Where the YAML says 0, lm-eval would take it for the last word.
        return config | ({} if shots is None else {"num_fewshot": shots}), local, files
    manager = TaskManager()
    if task not in (*manager.all_subtasks, *manager.all_groups):
        raise A3Error(
            f"harness task {task!r}: lm-eval {lm_eval.__version__} has no such task or group. "
            "`lm-eval ls tasks` lists those it has; a local one needs its file (--items, --yaml)."
        )
    return task, manager, []


def scores(task: str, found: dict[str, Any], metric: str | None = None) -> dict[str, Any]:
    """The lasting part of lm-eval's results: no dates, machine or timings.

    Of a group, `value` and `stderr` are lm-eval's aggregate over its tasks, and items are theirs,
    task after task. `item_scores` are the items' values of the metric, in the documents' order;
    null where it has none. Raises A3Error where the task has no such metric.
    """
    # lm-eval calls a score "metric,filter"; the first is the task's main one.
    results, samples = found["results"][task], found["samples"]
    metrics = {key.removesuffix(",none"): v for key, v in results.items() if "," in key}
    known = [key for key in metrics if "_stderr" not in key]
    if metric not in (None, *known):
        raise A3Error(f"harness task {task}: metric is {metric}, expected {' or '.join(known)}.")
    main = metric or known[0]
    name, _, kind = main.partition(",")
    shots = sorted({found["n-shot"][leaf] for leaf in samples})
    return {
        "kind": "harness",
        "task": task,
        "metric": main,
        "value": metrics[main],
        "stderr": metrics[f"{name}_stderr{main.removeprefix(name)}"],
        "metrics": metrics,
        "items": sum(found["n-samples"][leaf]["effective"] for leaf in samples),
        "item_scores": [
            score for leaf in sorted(samples) for score in item_scores(samples[leaf], name, kind)
        ],
        "shots": shots[0] if len(shots) == 1 else shots,
        "version": found["versions"].get(task),
        "task_hash": task_hash([each for leaf in sorted(samples) for each in samples[leaf]]),
        "lm_eval": lm_eval.__version__,
    }


def item_scores(samples: list[dict[str, Any]], metric: str, kind: str) -> list[float | None]:
    """Each document's value of a metric, by the filter `kind`, in the documents' order."""
    chosen = [sample for sample in samples if sample["filter"] == (kind or "none")]
    values = [sample.get(metric) for sample in sorted(chosen, key=lambda s: s["doc_id"])]
    return [float(value) if isinstance(value, Real) else None for value in values]


def task_hash(samples: list[dict[str, Any]]) -> str:
    """What lm-eval's own tracker calls the task's hash: of every document, prompt and target."""
    keys = ("doc_hash", "prompt_hash", "target_hash")
    return hash_string("".join(sample[key] for sample in samples for key in keys))
