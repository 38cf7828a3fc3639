"""What a model loses at every size, of the modes whose ranks are allocated (`evaluate: frontier`)."""

FRONTIER = "{model}/{calibration}/{qk}+{ov}+{mlp}"


rule frontier:
    """Predicted losses at every size, corrected by those of three compressed models."""
    input:
        arch=f"{RESULTS}/models/{{model}}/arch.json",
        rxx=rxx_needed,
        losses=losses_needed,
        text=calibration_text,
    output:
        frontier=f"{RESULTS}/frontiers/{FRONTIER}.json",
        timing=f"{RESULTS}/frontiers/{FRONTIER}.timing.json",
    log:
        f"{LOGS}/frontiers/{FRONTIER}.log",
    benchmark:
        f"{LOGS}/frontiers/{FRONTIER}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    threads: C["threads"]["approx"]
    resources:
        **resources("approx", cost_of_trials),
    params:
        model=subpath(input.arch, parent=True),
        rxx=RXX,
        losses=lambda wildcards, input: ["--losses", *input.losses] if input.losses else [],
        threads=C["threads"]["approx"],
        device=C["device"],
        code=fingerprint("a3.frontier"),
    shell:
        "a3 frontier {params.model:q} --rxx {params.rxx:q} --text {input.text:q} {params.losses:q}"
        " --qk {wildcards.qk:q} --ov {wildcards.ov:q} --mlp {wildcards.mlp:q}"
        " --threads {params.threads} --device {params.device:q} -o {output.frontier:q} &> {log:q}"
