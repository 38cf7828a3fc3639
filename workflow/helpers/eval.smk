"""Helpers of rules/eval.smk: what its jobs read and are told."""

from a3.experiments.config import texts_of
from a3.models.cost import BYTES_PER_TOKEN, WHOLE_TEXT
from a3.stages.evaluate.tasks import data_files, read_task


def scored_texts(wildcards):
    """The split of each text that a perplexity entry scores."""
    chosen = entry("perplexity", wildcards.text)
    split = "docs" if chosen["split"] == "all" else chosen["split"]
    return [f"{RESULTS}/texts/{text}/{split}.jsonl" for text in texts_of(chosen)]


def scored_sources(wildcards):
    """What says where each text of a perplexity entry is from."""
    texts = texts_of(entry("perplexity", wildcards.text))
    return [f"{RESULTS}/texts/{text}/docs.json" for text in texts]


def scored_names(wildcards):
    """What the result calls its texts: one has the name of the entry."""
    return entry("perplexity", wildcards.text).get("texts", wildcards.text)


def tokens_scored(wildcards):
    """How many tokens a perplexity entry scores; of a whole text a guess, by its size if it is there."""
    chosen, paths = entry("perplexity", wildcards.text), map(Path, scored_texts(wildcards))
    if chosen["tokens"] != "all":
        return len(texts_of(chosen)) * chosen["tokens"]
    return sum(
        path.stat().st_size // BYTES_PER_TOKEN if path.exists() else WHOLE_TEXT for path in paths
    )


def fit_calibration(wildcards):
    """The calibration of a row whose loss is measured on calibration and dev text."""
    return entry("calibrations", place_of(wildcards).calibration)


def fitted_text(wildcards):
    """Documents that a row's calibration reads."""
    return learned(fit_calibration(wildcards)["text"])


def fit_dev(wildcards):
    """The dev split of the text that the configuration names, if it names one."""
    dev = C["evaluate"].get("fit", {}).get("dev")
    return [f"{RESULTS}/texts/{dev}/dev.jsonl"] if dev else []


def fit_allocation(wildcards):
    """What predicts a row's loss, if its ranks are allocated."""
    path = place_of(wildcards).allocation(Path(RESULTS))
    return [str(path)] if path else []


def fit_blocks():
    """Number of blocks of each text."""
    return C["evaluate"].get("fit", {}).get("blocks", 4)


def fit_tokens(wildcards):
    """How many tokens the two models score, of one text or two."""
    texts = 1 + len(fit_dev(wildcards))
    return 2 * texts * fit_blocks() * fit_calibration(wildcards)["block_length"]


def fit_settings(wildcards):
    """Options: the calibration's own, and the number of blocks."""
    chosen = fit_calibration(wildcards) | {"blocks": fit_blocks()}
    return option_words(chosen, ("blocks", "tokens", "block_length", "seed", "bos", "dtype"))


def task_files(wildcards):
    """The items or the YAML and data files of a local task; nothing for one of lm-eval's own."""
    chosen = entry("harness", wildcards.task)
    if "text" in chosen:
        return [f"{RESULTS}/items/{wildcards.task}/items.jsonl"]
    if "yaml" not in chosen:
        return []
    with correctable():
        return [chosen["yaml"], *data_files(read_task(Path(chosen["yaml"])))]


def task_content(wildcards):
    """What tells whether the files of a local task have changed."""
    chosen = entry("harness", wildcards.task)
    return marks(map(Path, task_files(wildcards))) if "yaml" in chosen else {}


def task_options(wildcards, input):
    """Which task, and where its items or its YAML are."""
    chosen = entry("harness", wildcards.task)
    if "text" in chosen:
        return ["--task", wildcards.task, "--items", *input.local]
    if "yaml" in chosen:
        return ["--task", wildcards.task, "--yaml", chosen["yaml"]]
    return ["--task", chosen["task"]]
