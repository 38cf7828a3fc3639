"""Stages eval ppl, fit, harness and speed, of dense and compressed models alike."""


include: "../helpers/eval.smk"


HARNESS_SETTINGS = (
    *("metric", "shots", "limit", "seed", "dtype"),
    *("apply_chat_template", "fewshot_as_multiturn", "system_instruction"),
)


rule eval_ppl:
    input:
        model=model_files,
        text=scored_texts,
        source=scored_sources,
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
        names=scored_names,
        settings=settings(
            "perplexity",
            "text",
            ("split", "tokens", "seed", "block_length", "bos", "join", "dtype"),
        ),
        threads=C["threads"]["eval"],
        device=C["device"],
        code=fingerprint("a3.stages.evaluate.perplexity"),
    shell:
        "a3 eval ppl {params.model:q} --text {input.text:q} --name {params.names:q}"
        " --source {input.source:q}"
        " {params.settings:q} --threads {params.threads} --device {params.device:q}"
        " -o {output.result:q} &> {log:q}"


rule eval_fit:
    """Loss of a compressed model on a few blocks of its calibration and of a dev text."""
    input:
        dense=f"{RESULTS}/models/{{model}}/config.json",
        model=model_files,
        text=fitted_text,
        dev=fit_dev,
        allocation=fit_allocation,
    output:
        result=f"{RESULTS}/eval/{{model}}/{{run}}/fit/blocks.json",
        timing=f"{RESULTS}/eval/{{model}}/{{run}}/fit/blocks.timing.json",
    log:
        f"{LOGS}/eval/{{model}}/{{run}}/fit/blocks.log",
    benchmark:
        f"{LOGS}/eval/{{model}}/{{run}}/fit/blocks.benchmark.tsv"
    wildcard_constraints:
        run="[^/]+/[^/]+/[^/]+(/[^/]+)?",
    conda:
        "../../environment.yaml"
    threads: C["threads"]["eval"]
    resources:
        **resources("eval", cost_of_fit),
    params:
        models=lambda wildcards, input: [Path(p).parent for p in (input.dense, input.model[0])],
        settings=fit_settings,
        dev=lambda wildcards, input: ["--dev-text", input.dev] if input.dev else [],
        allocation=lambda wildcards, input: (
            ["--allocation", input.allocation] if input.allocation else []
        ),
        threads=C["threads"]["eval"],
        device=C["device"],
        code=fingerprint("a3.stages.evaluate.fit"),
    shell:
        "a3 eval fit {params.models:q} --text {input.text:q} {params.dev:q}"
        " {params.allocation:q} {params.settings:q} --threads {params.threads}"
        " --device {params.device:q} -o {output.result:q} &> {log:q}"


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
    # On one machine all cores, so that no other job slows it down; it runs on those of the config. On
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
