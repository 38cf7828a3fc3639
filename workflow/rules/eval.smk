"""Stages eval ppl, harness and speed, of dense and compressed models alike."""

from a3.models.cost import BYTES_PER_TOKEN, WHOLE_TEXT
from a3.stages.evaluate.tasks import data_files, read_task

HARNESS_SETTINGS = (
    *("metric", "shots", "limit", "seed", "dtype"),
    *("apply_chat_template", "fewshot_as_multiturn", "system_instruction"),
)


def scored_text(wildcards):
    """The split of a text that a perplexity entry scores."""
    chosen = entry("perplexity", wildcards.text)
    split = "docs" if chosen["split"] == "all" else chosen["split"]
    return f"{RESULTS}/texts/{chosen['text']}/{split}.jsonl"


def scored_source(wildcards):
    """What says where the text of a perplexity entry is from."""
    return f"{RESULTS}/texts/{entry('perplexity', wildcards.text)['text']}/docs.json"


def tokens_scored(wildcards):
    """How many tokens a perplexity entry scores; of a whole text a guess, by its size if it is there."""
    chosen, path = entry("perplexity", wildcards.text), Path(scored_text(wildcards))
    if chosen["tokens"] != "all":
        return chosen["tokens"]
    return path.stat().st_size // BYTES_PER_TOKEN if path.exists() else WHOLE_TEXT


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


rule eval_ppl:
    input:
        model=model_files,
        text=scored_text,
        source=scored_source,
    output:
        result=f"{RESULTS}/eval/{{model}}/{{run}}/ppl/{{text}}.json",
        timing=f"{RESULTS}/eval/{{model}}/{{run}}/ppl/{{text}}.timing.json",
    log:
        f"{LOGS}/eval/{{model}}/{{run}}/ppl/{{text}}.log",
    benchmark:
        f"{LOGS}/eval/{{model}}/{{run}}/ppl/{{text}}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    threads: C["threads"]["eval"]
    resources:
        **resources("eval", cost_of_perplexity),
    params:
        model=lambda wildcards, input: Path(input.model[0]).parent,
        settings=settings(
            "perplexity", "text", ("split", "tokens", "block_length", "bos", "join", "dtype")
        ),
        threads=C["threads"]["eval"],
        device=C["device"],
        code=fingerprint("a3.stages.evaluate.perplexity"),
    shell:
        "a3 eval ppl {params.model:q} --text {input.text:q} --name {wildcards.text:q}"
        " --source {input.source:q}"
        " {params.settings:q} --threads {params.threads} --device {params.device:q}"
        " -o {output.result:q} &> {log:q}"


rule eval_harness:
    input:
        model=model_files,
        local=task_files,
    output:
        result=f"{RESULTS}/eval/{{model}}/{{run}}/harness/{{task}}.json",
        timing=f"{RESULTS}/eval/{{model}}/{{run}}/harness/{{task}}.timing.json",
    log:
        f"{LOGS}/eval/{{model}}/{{run}}/harness/{{task}}.log",
    benchmark:
        f"{LOGS}/eval/{{model}}/{{run}}/harness/{{task}}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    threads: C["threads"]["eval"]
    resources:
        **resources("eval", cost_of_harness),
    params:
        model=lambda wildcards, input: Path(input.model[0]).parent,
        task=task_options,
        content=task_content,
        settings=settings("harness", "task", HARNESS_SETTINGS),
        threads=C["threads"]["eval"],
        device=C["device"],
        code=fingerprint("a3.stages.evaluate.harness"),
    shell:
        "a3 eval harness {params.model:q} {params.task:q} {params.settings:q}"
        " --threads {params.threads} --device {params.device:q} -o {output.result:q} &> {log:q}"


rule eval_speed:
    """Time a compressed model and the dense one beside it, with nothing else on the machine."""
    input:
        dense=f"{RESULTS}/models/{{model}}/config.json",
        model=model_files,
    output:
        f"{RESULTS}/eval/{{model}}/{{run}}/speed/{{speed}}.json",
    log:
        f"{LOGS}/eval/{{model}}/{{run}}/speed/{{speed}}.log",
    benchmark:
        f"{LOGS}/eval/{{model}}/{{run}}/speed/{{speed}}.benchmark.tsv"
    wildcard_constraints:
        run="[^/]+/[^/]+/[^/]+(/[^/]+)?",
    conda:
        "../../environment.yaml"
    # On one machine all cores, so that no other job disturbs it; it runs on those of the config. On
    # a cluster Snakemake has no number of cores.
    threads: workflow.resource_settings.cores or C["threads"]["eval"]
    resources:
        **resources("eval", cost_of_speed),
    params:
        models=lambda wildcards, input: [Path(p).parent for p in (input.dense, input.model[0])],
        settings=settings(
            "speed", "speed", ("batch", "prompt", "new_tokens", "repeats", "dtype", "attention")
        ),
        threads=C["threads"]["eval"],
        device=C["device"],
        code=fingerprint("a3.stages.evaluate.speed"),
    shell:
        "a3 eval speed {params.models:q} {params.settings:q} --threads {params.threads}"
        " --device {params.device:q} -o {output:q} &> {log:q}"
