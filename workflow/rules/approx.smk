"""Stage approx: weights and Rxx to compressed checkpoints."""

CHECKPOINT = f"{RESULTS}/checkpoints/{{model}}/{{calibration}}/{{qk}}+{{ov}}+{{mlp}}/{{ratio}}"


def rxx_needed(wildcards):
    """The statistics that the modes read."""
    try:
        kinds = kinds_needed({part: wildcards[part] for part in PARTS})
    except A3Error as error:
        raise WorkflowError(str(error)) from None
    folder = RXX.format(model=wildcards.model, calibration=wildcards.calibration)
    return [f"{folder}/{kind}.safetensors" for kind in kinds]


rule approx:
    input:
        arch=f"{RESULTS}/models/{{model}}/arch.json",
        rxx=rxx_needed,
    output:
        weights=f"{CHECKPOINT}/model.safetensors",
        config=f"{CHECKPOINT}/config.json",
        approx=f"{CHECKPOINT}/approx.json",
        timing=f"{CHECKPOINT}/timing.json",
    params:
        model=subpath(input.arch, parent=True),
        rxx=RXX,
        out=CHECKPOINT,
        threads=C["threads"]["approx"],
        code=fingerprint("a3.stages.approximate"),
    threads: C["threads"]["approx"]
    log:
        f"{LOGS}/{CHECKPOINT.removeprefix(RESULTS + '/')}.log",
    benchmark:
        f"{LOGS}/{CHECKPOINT.removeprefix(RESULTS + '/')}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    shell:
        "a3 approx {params.model:q} --rxx {params.rxx:q} --qk {wildcards.qk:q} --ov {wildcards.ov:q}"
        " --mlp {wildcards.mlp:q} --ratio {wildcards.ratio:q} --threads {params.threads}"
        " -o {params.out:q} &> {log:q}"
