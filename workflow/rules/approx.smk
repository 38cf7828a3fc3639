"""Stage approx: weights and Rxx to compressed checkpoints."""


rule approx:
    input:
        arch=f"{RESULTS}/models/{{model}}/arch.json",
        rxx=rxx_needed,
    output:
        weights=f"{CHECKPOINT}/model.safetensors",
        config=f"{CHECKPOINT}/config.json",
        approx=f"{CHECKPOINT}/approx.json",
        timing=f"{CHECKPOINT}/timing.json",
    log:
        f"{LOGS}/checkpoints/{RUN}.log",
    benchmark:
        f"{LOGS}/checkpoints/{RUN}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    threads: C["threads"]["approx"]
    resources:
        **resources("approx", cost_of_approx),
    params:
        model=subpath(input.arch, parent=True),
        rxx=RXX,
        out=CHECKPOINT,
        threads=C["threads"]["approx"],
        code=fingerprint("a3.stages.approximate"),
    shell:
        "a3 approx {params.model:q} --rxx {params.rxx:q} --qk {wildcards.qk:q} --ov {wildcards.ov:q}"
        " --mlp {wildcards.mlp:q} --ratio {wildcards.ratio:q} --threads {params.threads}"
        " -o {params.out:q} &> {log:q}"
