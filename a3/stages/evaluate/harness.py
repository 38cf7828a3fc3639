"""Stage eval harness: EleutherAI's lm-eval on a dense or compressed folder, one task a file."""

import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.registry import metric_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from a3.core.errors import A3Error
from a3.core.files import sha256
from a3.models.readable import end_tokens
from a3.models.tokenizer import hold_to_rows
from a3.stages.evaluate.evaluated import Evaluated, load
from a3.stages.evaluate.items import task_config
from a3.stages.evaluate.prompting import Prompting, choose_template, stand_in
from a3.stages.evaluate.rehearsal import rehearse
from a3.stages.evaluate.scores import scores
from a3.stages.evaluate.tasks import data_files, read_task

# lm-eval sorts requests by length, so that a batch pads little; larger ones gain nothing on a CPU.
CPU_BATCH = 8

# Resamples for the standard error of a metric that is no mean over items: known to 1%.
BOOTSTRAPS = 10_000


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
    apply_chat_template: bool | str = False,
    fewshot_as_multiturn: bool = False,
    system_instruction: str | None = None,
) -> None:
    """Run one task or group with lm-eval's own `evaluate` and write its scores to `out`.

    With `items` (a local items.jsonl) or `yaml` (a local task) it runs offline and `task` is what
    the result calls it; without, `task` is one of lm-eval's own names, whose data set comes from
    the hub. `metric` is the score reported, by default the task's first. `limit` takes the first
    items only, of each task of a group. The last three are lm-eval's: a chat template (True, or its
    name), examples as turns of the chat, and a system's turn, or text before the prompt. Raises
    A3Error if lm-eval knows no such task or metric, cannot build its prompts, or the tokenizer
    has no such template: before the model is loaded. Nor may a task have `items` and `yaml`.
    """
    if items is not None and yaml is not None:
        raise A3Error(
            f"harness task {task!r}: found items {items} and yaml {yaml}; a local task is made of "
            "one of them. Leave the other out."
        )
    prompting = Prompting(apply_chat_template, fewshot_as_multiturn, system_instruction)
    subject = Evaluated(model_folder)
    tokenizer = subject.tokenizer
    choose_template(tokenizer, prompting, model_folder)
    with tempfile.TemporaryDirectory() as cache:
        chosen, manager, files = find_task(task, items, yaml, shots, cache)
        seed_all(seed)
        with one_line(str(yaml or items or f"harness task {task!r}"), own=not (yaml or items)):
            loaded = manager.load([chosen])
            options = prompting.options(stand_in(tokenizer))
            rehearse(task, loaded, bool(yaml or items), metric, shots, seed, options)
            needs_end = any(t.OUTPUT_TYPE == "generate_until" for t in loaded["tasks"].values())
            require_end(tokenizer, model_folder, needs_end)
        wrapped = wrap(model_folder, tokenizer, dtype, device)
        start = time.perf_counter()
        with one_line(f"harness task {task!r}", own=False):
            found = evaluate(wrapped, loaded, limit, prompting, seed)
        seconds = time.perf_counter() - start
    aggregates = {name: each.aggregation() for name, each in loaded["tasks"].items()}
    record = scores(task, found, aggregates, metric) | {
        **prompting.record,
        "dtype": dtype,
        "items_sha256": None if items is None else sha256(items),
        "task_files": {str(path): sha256(path) for path in files},
    }
    subject.write(out, __name__, record, {"seconds": seconds}, seed=seed)


def evaluate(
    model: HFLM, loaded: dict[str, Any], limit: int | None, prompting: Prompting, seed: int
) -> dict[str, Any]:
    """Run loaded tasks with lm-eval: what it finds."""
    # An option of lm-eval: resample in this process. Its process pool uses every core, and hangs if
    # a worker is terminated while it starts, because workers inherit the command line's SIGTERM
    # handler.
    os.environ["DISABLE_MULTIPROC"] = "1"
    seed_all(seed)
    with torch.inference_mode():
        return lm_eval.evaluate(
            model,
            loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            apply_chat_template=bool(prompting.apply_chat_template),
            fewshot_as_multiturn=prompting.fewshot_as_multiturn,
            system_instruction=prompting.system_instruction,
        )


def require_metrics(config: dict[str, Any], path: Path) -> None:
    """Raise A3Error for a metric of a local task that lm-eval itself does not have.

    lm-eval would look for such a metric on the hub and run its code.
    """
    entries = config.get("metric_list") or []
    for entry in entries if isinstance(entries, list) else [entries]:
        name = entry.get("metric") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in metric_registry or entry.get("hf_evaluate"):
            raise A3Error(
                f"{path}: metric_list has {entry!r}; expected under metric one of lm-eval's own: "
                f"{', '.join(sorted(metric_registry))}."
            )


def seed_all(seed: int) -> None:
    """Seed every generator that a task may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def one_line(where: str, own: bool) -> Iterator[None]:
    """What lm-eval, datasets or a task's template raise, of any type, as an A3Error that says it.

    `own` is a task of lm-eval's own, whose data set is fetched. What a machine lacks goes through.
    """
    try:
        yield
    except (A3Error, RuntimeError, MemoryError):
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        said = " ".join(f"{type(root).__name__}: {root}".split())
        todo = "Correct the task or the options."
        if own:
            todo = (
                "Its data set comes from the hub: the hub has to be reached (HF_ENDPOINT), or the "
                "data set be there (HF_HOME)."
            )
        if isinstance(root, OverflowError):
            todo = (
                "A perplexity is beyond all numbers: of words that are whole paragraphs, say, in "
                "scripts without spaces. Take byte_perplexity or bits_per_byte."
            )
        raise A3Error(
            f"{where}: lm-eval {lm_eval.__version__} cannot run it ({said[:500]}). {todo}"
        ) from error


def require_end(tokenizer: PreTrainedTokenizerBase, folder: Path, needed: bool) -> None:
    """Give a tokenizer without an EOS token the model's, because lm-eval stops at it.

    Raises A3Error if it is `needed` and the folder says none.
    """
    if tokenizer.eos_token_id is not None:
        return
    if ids := end_tokens(folder):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0])
    elif needed:
        raise A3Error(
            f"{folder}: neither its tokenizer nor its configs name the token that ends a text, "
            "which lm-eval needs to stop. Set eos_token in tokenizer_config.json."
        )


def wrap(folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: str, device: str) -> HFLM:
    """The model, wrapped for lm-eval."""
    model = load(folder, dtype, device)
    hold_to_rows(folder, model, tokenizer)
    # HFLM ties weights again by the config alone, which would replace a separately stored head.
    model.tie_weights = lambda *_, **__: None
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        # The model's, whatever the tokenizer's model_max_length says.
        max_length=resolve_max_length(model.config),
        batch_size=CPU_BATCH if device == "cpu" else "auto",
    )


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
        if empty := [str(path) for path in files if not path.stat().st_size]:
            raise A3Error(f"{yaml}: nothing in {', '.join(empty)}. Correct data_files.")
        require_metrics(config, yaml)
        config |= {"task": task, "dataset_kwargs": config["dataset_kwargs"] | {"cache_dir": cache}}
        # If the YAML says 0, lm-eval would not let the caller change it.
        return config | ({} if shots is None else {"num_fewshot": shots}), local, files
    manager = TaskManager()
    if task not in (*manager.all_subtasks, *manager.all_groups):
        raise A3Error(
            f"harness task {task!r}: lm-eval {lm_eval.__version__} has no such task or group. "
            "`lm-eval ls tasks` lists those it has; a local one needs its file (--items, --yaml)."
        )
    return task, manager, []
