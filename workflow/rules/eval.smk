"""Stages eval ppl and eval harness, of dense and compressed models alike."""


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
        code=fingerprint("a3.stages.perplexity"),
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
        settings=settings("harness", "task", ("metric", "shots", "limit", "seed", "dtype")),
        threads=C["threads"]["eval"],
        device=C["device"],
        code=fingerprint("a3.stages.harness"),
    shell:
        "a3 eval harness {params.model:q} {params.task:q} {params.settings:q}"
        " --threads {params.threads} --device {params.device:q} -o {output.result:q} &> {log:q}"
