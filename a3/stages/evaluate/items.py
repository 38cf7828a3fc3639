"""The task that lm-evaluation-harness runs on items of `a3 items`, entirely from local files."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from a3.core.errors import A3Error
from a3.texts.reading import read_text


def load_items(path: str, **_: Any) -> DatasetDict:
    """Items of an items.jsonl as the test split; lm-eval calls it, with the task's metadata too.

    Items are held in memory, so no data set cache is written that could become stale.
    Raises A3Error when the file is missing, empty, or a line is not an item.
    """
    lines = read_text(Path(path)).split("\n")
    items = [item(line, f"{path}: line {i}") for i, line in enumerate(lines, 1) if line]
    return DatasetDict(test=Dataset.from_list(items))


def item(line: str, where: str) -> dict[str, Any]:
    """One line of items.jsonl: query, choices and gold (the place of the right choice)."""
    try:
        fields = json.loads(line)
        query, choices, gold = (fields[key] for key in ("query", "choices", "gold"))
        texts = [query, *choices]
        whole = all(isinstance(text, str) and text.encode() for text in texts)
        if whole and isinstance(choices, list) and isinstance(gold, int) and choices[gold]:
            return {"choices": choices, "gold": range(len(choices))[gold], "query": query}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise A3Error(f"{where}: not an item ({error!r}). Build the items again.") from error
    raise A3Error(f"{where}: expected query, choices and gold. Build the items again.")


def task_config(items_path: Path, name: str) -> dict[str, Any]:
    """What `simple_evaluate(tasks=[...])` takes in place of a task's name.

    Examples shown are other items of the file.
    """
    return {
        "task": name,
        "custom_dataset": load_items,
        "dataset_kwargs": {"path": str(items_path)},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1},
    }
