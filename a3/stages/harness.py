"""Stage eval harness: EleutherAI's lm-eval on a dense or compressed folder, one task a file."""

import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import hash_string

# Named here so that a change of the compressed model makes evaluations stale.
import a3.models.compressed  # noqa: F401
from a3.errors import A3Error
from a3.files import sha256, write_record
from a3.harness import task_config
from a3.models.checkpoint import Checkpoint, model_source
from a3.models.load import load_model, load_tokenizer
from a3.provenance import provenance

# lm-eval sorts requests by length, so that a batch pads little; larger ones gain nothing on a CPU.
CPU_BATCH = 8


def harness(
    model_folder: Path,
    task: str,
    out: Path,
    *,
    items: Path | None,
    shots: int | None,
    limit: int | None,
    dtype: str,
    device: str,
    seed: int,
) -> None:
    """Run one task with lm-eval's own `simple_evaluate` and write its scores to `out` (JSON).

    With `items` (a local items.jsonl) the task is built from that file and runs offline; without,
    `task` is one of lm-eval's own names, whose data set comes from the hub. `limit` takes the first
    items only. Raises A3Error where lm-eval knows no such task or its data cannot be had.
    """
    chosen, manager = find_task(task, items)
    checkpoint = Checkpoint(model_folder)
    model = load_model(model_folder, dtype).to(device)
    wrapped = HFLM(
        pretrained=model,
        tokenizer=load_tokenizer(model_folder),
        batch_size=CPU_BATCH if device == "cpu" else "auto",
    )
    start = time.perf_counter()
    with torch.inference_mode():
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
    record = scores(task, found) | {
        "dtype": dtype,
        "checkpoint_sha256": checkpoint.sha256(),
        "config_sha256": sha256(model_folder / "config.json"),
        "items_sha256": None if items is None else sha256(items),
        "provenance": provenance(__name__, model=model_source(model_folder), seed=seed),
    }
    write_record(out, record)
    write_record(out.with_suffix(".timing.json"), {"seconds": seconds})


def find_task(task: str, items: Path | None) -> tuple[Any, TaskManager]:
    """What `simple_evaluate` takes for a task, and the manager that knows it."""
    if items is not None:
        return task_config(items, task), TaskManager(include_defaults=False)
    manager = TaskManager()
    if task not in manager.all_tasks:
        raise A3Error(
            f"harness task {task!r}: lm-eval {lm_eval.__version__} has no such task. "
            "`lm-eval ls tasks` lists those it has; a local one needs its items file (--items)."
        )
    return task, manager


def scores(task: str, found: dict[str, Any]) -> dict[str, Any]:
    """The lasting part of lm-eval's results: no dates, machine or timings."""
    # lm-eval calls a score "metric,filter"; the first is the task's main one.
    results = found["results"][task]
    metrics = {key.removesuffix(",none"): v for key, v in results.items() if "," in key}
    main = next(key for key in results if "," in key and "_stderr," not in key)
    return {
        "kind": "harness",
        "task": task,
        "metric": main.removesuffix(",none"),
        "value": results[main],
        "stderr": results[main.replace(",", "_stderr,", 1)],
        "metrics": metrics,
        "items": found["n-samples"][task]["effective"],
        "shots": found["n-shot"][task],
        "version": found["versions"][task],
        "task_hash": task_hash(found["samples"][task]),
        "lm_eval": lm_eval.__version__,
    }


def task_hash(samples: list[dict[str, Any]]) -> str:
    """What lm-eval's own tracker calls the task's hash: of every document, prompt and target."""
    keys = ("doc_hash", "prompt_hash", "target_hash")
    return hash_string("".join(sample[key] for sample in samples for key in keys))
