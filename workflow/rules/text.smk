"""Stage text: documents; what calibration has seen taken out; splits; harness items."""

SPLITS = ("dev", "test", "harness", "calibration")


include: "../helpers/text.smk"


rule text:
    input:
        sources("texts", "text"),
    output:
        docs=f"{RESULTS}/texts/{{text}}/docs.jsonl",
        said=f"{RESULTS}/texts/{{text}}/docs.json",
    log:
        f"{LOGS}/texts/{{text}}.log",
    conda:
        "../../environment.yaml"
    params:
        spec=spec("texts", "text"),
        content=content("texts", "text"),
        wheels=f"{RESULTS}/wheels",
        members=lambda wildcards, input: (
            input if "mix" in entry("texts", wildcards.text)["source"] else []
        ),
        code=fingerprint("a3.stages.inputs.text"),
    shell:
        "a3 text {params.spec:q} --wheels {params.wheels:q} --members {params.members:q}"
        " -o {output.docs:q} &> {log:q}"


rule split:
    """Drop documents that occur in calibration text; split the rest once, by hash."""
    input:
        docs=f"{RESULTS}/texts/{{text}}/docs.jsonl",
        exclude=lambda wildcards: [
            f"{RESULTS}/texts/{other}/docs.jsonl" for other in excluded_by(wildcards.text)
        ],
    output:
        expand(f"{RESULTS}/texts/{{{{text}}}}/{{split}}.jsonl", split=SPLITS),
        f"{RESULTS}/texts/{{text}}/split.json",
    log:
        f"{LOGS}/texts/{{text}}.split.log",
    conda:
        "../../environment.yaml"
    params:
        shares=lambda wildcards: json.dumps(entry("texts", wildcards.text).get("split", {})),
        out=subpath(output[0], parent=True),
        code=fingerprint("a3.stages.inputs.split"),
    shell:
        "a3 split {input.docs:q} --exclude {input.exclude:q} --shares {params.shares:q}"
        " -o {params.out:q} &> {log:q}"


rule items:
    input:
        lambda wildcards: f"{RESULTS}/texts/{entry('harness', wildcards.task)['text']}/harness.jsonl",
    output:
        f"{RESULTS}/items/{{task}}/items.jsonl",
        f"{RESULTS}/items/{{task}}/items.json",
    log:
        f"{LOGS}/items/{{task}}.log",
    conda:
        "../../environment.yaml"
    params:
        settings=settings("harness", "task", ("items", "seed")),
        out=subpath(output[0], parent=True),
        code=fingerprint("a3.stages.inputs.items"),
    shell:
        "a3 items {input:q} {params.settings:q} -o {params.out:q} &> {log:q}"
