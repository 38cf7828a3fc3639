"""Checks a harness task before the model is loaded: examples, prompts, metrics."""

from typing import Any

from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask, Task

from a3.core.errors import A3Error
from a3.stages.evaluate.scores import number

ROLLING = "loglikelihood_rolling"

# A dummy answer of a model to one request, by the task's type.
ANSWERS = {
    "loglikelihood": (-1.0, False),
    "multiple_choice": (-1.0, False),
    ROLLING: -1.0,
    "generate_until": "",
}


def rehearse(
    name: str,
    loaded: dict[str, Any],
    local: bool,
    metric: str | None,
    shots: int | None,
    seed: int,
    options: dict[str, Any],
) -> None:
    """Set the number of examples, and build the prompt of the first item of each task.

    `loaded` is what lm-eval's TaskManager loads; `options` are those of `build_all_requests`. Of a
    `local` task every item's right answer is looked at. Raises A3Error for what a3 does not run,
    examples that there are not, a metric that the task does not have, and an answer that is not
    among the choices; what lm-eval itself raises goes through.
    """
    group = loaded["groups"].get(name)
    if group is not None and not group.aggregate_metric_list:
        raise A3Error(
            f"harness task {name!r} is a group without a score of its own. Name one of its tasks: "
            f"{', '.join(sorted(loaded['tasks'])[:8])} …"
        )
    for each in loaded["tasks"].values():
        check_kind(each, options)
        set_shots(each, shots)
        check_examples(each)
        each.set_fewshot_seed(seed)
        each.build_all_requests(limit=1, rank=0, world_size=1, **options)
        # Drawing examples for that item has advanced the random generator.
        each.set_fewshot_seed(seed)
        check_metric(each, metric if group is None else None)
        if local:
            check_answers(each)


def check_kind(task: Task, options: dict[str, Any]) -> None:
    """Raise A3Error for a task that a3 does not run, or that has no prompt to change."""
    where = f"harness task {task.task_name!r}"
    if getattr(task, "UNSAFE_CODE", False):
        raise A3Error(
            f"{where} runs code that the model writes, which a3 does not do. Choose another task."
        )
    if getattr(task, "MULTIMODAL", False):
        raise A3Error(f"{where} has images or audio; a3 evaluates text only. Choose another task.")
    if task.OUTPUT_TYPE == ROLLING and (
        options["apply_chat_template"] or options["system_instruction"]
    ):
        raise A3Error(
            f"{where} scores documents, without a prompt. Remove apply-chat-template and "
            "system-instruction."
        )


def set_shots(task: Task, shots: int | None) -> None:
    """Set how many examples are shown, by default the task's own number, or none.

    Raises A3Error if the task's own definition allows none.
    """
    own = task.get_config("num_fewshot")
    if shots and own == 0:
        raise A3Error(
            f"harness task {task.task_name!r}: shots is {shots}, but its definition sets "
            "num_fewshot to 0, which lm-eval does not override. Set shots to 0."
        )
    if shots is not None or own is None:
        task.set_config("num_fewshot", shots or 0)


def check_examples(task: Task) -> None:
    """Raise A3Error if the examples are too few, or the item itself would be among them."""
    shots = task.get_config("num_fewshot")
    if not shots or not isinstance(task, ConfigurableTask):
        return
    where, config = f"harness task {task.task_name!r}: shots is {shots}", task.config
    if task.OUTPUT_TYPE == ROLLING:
        raise A3Error(f"{where}, and it scores documents, without a prompt. Set shots to 0.")
    scored = config.test_split or config.validation_split
    shown = task.fewshot_cfg.split
    if shown is None and task.fewshot_cfg.samples is None:
        shown = config.training_split or scored
    # lm-eval leaves the item out only where fewshot_split is test_split.
    if shown == scored and task.fewshot_cfg.split != config.test_split:
        raise A3Error(
            f"{where}, and examples are of the split {scored!r} that is scored: an item would be "
            "shown with its answer. Name another fewshot_split, or set shots to 0."
        )
    there = len(task.sampler.df) - (shown == scored)
    if shots > there:
        raise A3Error(f"{where}, and there are {there} examples to show. Set shots to {there}.")


def check_metric(task: Task, metric: str | None) -> None:
    """Raise A3Error if a task whose scores are lm-eval's own has no such metric.

    `metric` is as lm-eval names it, with a filter or without.
    """
    if not isinstance(task, ConfigurableTask) or callable(task.config.process_results):
        return
    where = f"harness task {task.task_name!r}"
    if unknown := [name for name, of in task.aggregation().items() if of is None]:
        raise A3Error(f"{where}: lm-eval has no such aggregation, of {', '.join(unknown)}.")
    answers = [ANSWERS[task.OUTPUT_TYPE]] * len(task.instances)
    found = task.process_results(task.instances[0].doc, answers)
    for name, value in found.items():
        if task.aggregation().get(name) is mean and number(value) is None:
            raise A3Error(
                f"{where}: {name} of an item is not a number, so it has no mean. Remove it, or "
                "set its aggregation."
            )
    filters = [each.name for each in task._filters]
    known = [name if kind == "none" else f"{name},{kind}" for kind in filters for name in found]
    if not known:
        raise A3Error(
            f"{where}: none of its metrics ({', '.join(task.aggregation())}) is of output_type "
            f"{task.OUTPUT_TYPE}. Correct metric_list."
        )
    if metric not in (None, *known):
        raise A3Error(f"{where}: metric is {metric}, expected {' or '.join(known)}.")


def check_answers(task: Task) -> None:
    """Raise A3Error if an item's right answer is not among its choices (lm-eval scores it wrong).

    The answer is a choice's index or its text; several right answers are indices.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for i, doc in enumerate(task.eval_docs):
        choices = task.doc_to_choice(doc)
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        places = range(len(choices))
        one = gold in choices if isinstance(gold, str) else gold in places
        if not (all(each in places for each in gold) if isinstance(gold, list) else one):
            raise A3Error(
                f"harness task {task.task_name!r}: the answer of item {i} is {gold!r}, and its "
                f"choices are {choices}. Correct doc_to_target, doc_to_choice or the data."
            )
