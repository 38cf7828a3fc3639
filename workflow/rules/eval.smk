"""Stages eval ppl and eval harness, of dense and compressed models alike."""


wildcard_constraints:
    # The dense model, or calibration/modes/ratio of a compressed one.
    run=f"{DENSE}|[^/]+/[^/]+/[^/]+",
    task=r"[\w.-]+",


def model_files(wildcards):
    """The files that say a model folder is there; the first lies in the folder itself."""
    if wildcards.run == DENSE:
        return [f"{RESULTS}/models/{wildcards.model}/{name}" for name in ("arch.json", "config.json")]
    folder = f"{RESULTS}/checkpoints/{wildcards.model}/{wildcards.run}"
    return [f"{folder}/{name}" for name in ("model.safetensors", "config.json", "approx.json")]


def scored_text(wildcards):
    """The part of a text that a perplexity entry scores."""
    chosen = entry("perplexity", wildcards.text)
    return f"{RESULTS}/texts/{chosen['text']}/{chosen['split']}.jsonl"


def task_items(wildcards):
    """The items of a local task; nothing for one of lm-eval's own."""
    local = "text" in entry("harness", wildcards.task)
    return [f"{RESULTS}/items/{wildcards.task}/items.jsonl"] if local else []


def task_options(wildcards, input):
    """Which task, and where its items are."""
    if input.local:
        return ["--task", wildcards.task, "--items", *input.local]
    return ["--task", entry("harness", wildcards.task)["task"]]


rule eval_ppl:
    input:
        model=model_files,
        text=scored_text,
    output:
        result=f"{RESULTS}/eval/{{model}}/{{run}}/ppl/{{text}}.json",
        timing=f"{RESULTS}/eval/{{model}}/{{run}}/ppl/{{text}}.timing.json",
    params:
        model=lambda wildcards, input: Path(input.model[0]).parent,
        settings=settings(
            "perplexity", "text", ("split", "tokens", "block_length", "bos", "dtype")
        ),
        threads=C["threads"]["eval"],
        device=C["device"],
        code=fingerprint("a3.stages.perplexity"),
    threads: C["threads"]["eval"]
    log:
        f"{LOGS}/eval/{{model}}/{{run}}/ppl/{{text}}.log",
    benchmark:
        f"{LOGS}/eval/{{model}}/{{run}}/ppl/{{text}}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    shell:
        "a3 eval ppl {params.model:q} --text {input.text:q} --name {wildcards.text:q}"
        " {params.settings:q} --threads {params.threads} --device {params.device}"
        " -o {output.result:q} &> {log:q}"


rule eval_harness:
    input:
        model=model_files,
        local=task_items,
    output:
        result=f"{RESULTS}/eval/{{model}}/{{run}}/harness/{{task}}.json",
        timing=f"{RESULTS}/eval/{{model}}/{{run}}/harness/{{task}}.timing.json",
    params:
        model=lambda wildcards, input: Path(input.model[0]).parent,
        task=task_options,
        settings=settings("harness", "task", ("shots", "limit", "seed", "dtype")),
        threads=C["threads"]["eval"],
        device=C["device"],
        code=fingerprint("a3.stages.harness"),
    threads: C["threads"]["eval"]
    log:
        f"{LOGS}/eval/{{model}}/{{run}}/harness/{{task}}.log",
    benchmark:
        f"{LOGS}/eval/{{model}}/{{run}}/harness/{{task}}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    shell:
        "a3 eval harness {params.model:q} {params.task:q} {params.settings:q}"
        " --threads {params.threads} --device {params.device} -o {output.result:q} &> {log:q}"
