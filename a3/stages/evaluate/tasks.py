"""A local task of lm-eval: its YAML, read as data, and the data files that it names.

Read by the Snakefile at every start, so nothing heavy is imported here.
"""

from pathlib import Path
from typing import Any

from a3.core.errors import A3Error
from a3.core.files import load_yaml

# Local file types that `datasets` reads; it would look for anything else on the hub.
READERS = ("csv", "json", "parquet")

# Keys under which lm-eval and `datasets` look for other files than the data files.
ELSEWHERE = ("include", "use_prompt", "data_dir")

# Keys without which lm-eval cannot build a prompt.
NEEDED = ("doc_to_text", "doc_to_target")


def read_task(path: Path) -> dict[str, Any]:
    """The YAML of a local task; all of the task is in it and in its data files.

    Raises A3Error if it cannot be read, has Python in it (`!function`) or runs some, reads
    another file, has no local data, or does not say what is asked.
    """
    task = load_yaml(path)
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise A3Error(f"{path}: expected a task of lm-eval with its name under task. Correct it.")
    for key in ELSEWHERE:
        if key in task or key in (task.get("dataset_kwargs") or {}):
            raise A3Error(f"{path}: {key} is not supported. Write all of the task in this file.")
    entries = task.get("metric_list")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and (
            entry.get("hf_evaluate") or "/" in str(entry.get("metric"))
        ):
            raise A3Error(
                f"{path}: the metric {entry.get('metric')!r} is a script, which a3 does not run. "
                "Choose one of lm-eval's own."
            )
    if task.get("dataset_path") not in READERS or not data_files(task):
        raise A3Error(
            f"{path}: dataset_path is {task.get('dataset_path')!r}, with files {data_files(task)}; "
            f"expected one of {', '.join(READERS)}, and dataset_kwargs.data_files."
        )
    choice = ["doc_to_choice"] if task.get("output_type") == "multiple_choice" else []
    if missing := [key for key in (*NEEDED, *choice) if task.get(key) is None]:
        raise A3Error(f"{path}: no {', '.join(missing)}. Add it.")
    return task


def data_files(task: dict[str, Any]) -> list[str]:
    """The data files of a task: of one name, a list, or {split: one or several}; else none."""
    options = task.get("dataset_kwargs")
    found = options.get("data_files") if isinstance(options, dict) else None
    groups = list(found.values()) if isinstance(found, dict) else [found]
    names: list[Any] = []
    for group in groups:
        names += group if isinstance(group, list) else [group]
    return names if all(isinstance(name, str) for name in names) else []
