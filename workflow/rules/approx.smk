"""Stage approx: weights and Rxx to compressed checkpoints.

With several `approx_jobs`, each solves a run of layers, and `gather` makes one folder of them, with
as many files of weights, and one more for what is in no layer.
"""


include: "../helpers/approx.smk"


JOBS = C["approx_jobs"]
SHARDS = [f"{i}of{JOBS}" for i in range(JOBS)]
SHARDS_OF_CHECKPOINT = f"{RESULTS}/shards/{RUN}"
LOSSES = f"{RESULTS}/losses/{{model}}/{{calibration}}/{{qk}}+{{ov}}+{{mlp}}/{{shard}}"


rule losses:
    """What modes that eliminate drop first, and the loss at each rank; for all ratios."""
    input:
        arch=f"{RESULTS}/models/{{model}}/arch.json",
        rxx=rxx_needed,
    output:
        losses=f"{LOSSES}.safetensors",
        timing=f"{LOSSES}.timing.json",
    log:
        LOSSES.replace(RESULTS, LOGS) + ".log",
    benchmark:
        LOSSES.replace(RESULTS, LOGS) + ".benchmark.tsv"
    conda:
        "../../environment.yaml"
    threads: C["threads"]["approx"]
    resources:
        **resources("approx", cost_of_losses),
    params:
        model=subpath(input.arch, parent=True),
        rxx=RXX,
        threads=C["threads"]["approx"],
        device=C["device"],
        code=fingerprint("a3.stages.approx.losses"),
    shell:
        "a3 losses {params.model:q} --rxx {params.rxx:q}"
        " --qk {wildcards.qk:q} --ov {wildcards.ov:q} --mlp {wildcards.mlp:q}"
        " --shard {wildcards.shard:q} --threads {params.threads} --device {params.device:q}"
        " -o {output.losses:q} &> {log:q}"


rule allocate:
    """Ranks of each layer, for modes with an allocated ratio (`obs~`)."""
    input:
        arch=f"{RESULTS}/models/{{model}}/arch.json",
        rxx=rxx_needed,
        losses=losses_needed,
    output:
        ranks=f"{RESULTS}/allocations/{RUN}.json",
        timing=f"{RESULTS}/allocations/{RUN}.timing.json",
    log:
        f"{LOGS}/allocations/{RUN}.log",
    benchmark:
        f"{LOGS}/allocations/{RUN}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    resources:
        **resources("approx", cost_of_gather, beside=True),
    params:
        model=subpath(input.arch, parent=True),
        rxx=RXX,
        text=[],
        threads=1,
        device="cpu",
        code=fingerprint("a3.stages.approx.allocate"),
    shell:
        "a3 allocate {params.model:q} --rxx {params.rxx:q} --losses {input.losses:q}"
        " --qk {wildcards.qk:q} --ov {wildcards.ov:q} --mlp {wildcards.mlp:q}"
        " --ratio {wildcards.ratio:q} {params.text:q} --threads {params.threads}"
        " --device {params.device:q} -o {output.ranks:q} &> {log:q}"


use rule allocate as allocate_target with:
    # A largest loss is measured on text that the calibration left, at several ranks.
    input:
        arch=f"{RESULTS}/models/{{model}}/arch.json",
        rxx=rxx_needed,
        losses=losses_needed,
        text=measured_text,
    wildcard_constraints:
        ratio=TARGETS,
    threads: C["threads"]["approx"]
    resources:
        **resources("approx", cost_of_trials),
    params:
        model=subpath(input.arch, parent=True),
        rxx=RXX,
        text=lambda wildcards, input: ["--text", *input.text] if input.text else [],
        threads=C["threads"]["approx"],
        device=C["device"],
        code=fingerprint("a3.promise"),


ruleorder: allocate_target > allocate


rule approx:
    input:
        arch=f"{RESULTS}/models/{{model}}/arch.json",
        rxx=rxx_needed,
        losses=losses_needed,
        allocation=allocation_needed,
    output:
        # Weights are in as many files as their size asks for; approx.json has their hashes.
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
        allocation=lambda wildcards, input: [f"--allocation={path}" for path in input.allocation],
        losses=lambda wildcards, input: ["--losses", *input.losses] if input.losses else [],
        out=approx_output,
        threads=C["threads"]["approx"],
        device=C["device"],
        code=fingerprint("a3.stages.approx.approximate"),
    shell:
        "a3 approx {params.model:q} --rxx {params.rxx:q}"
        " --qk {wildcards.qk:q} --ov {wildcards.ov:q} --mlp {wildcards.mlp:q}"
        " --ratio {wildcards.ratio:q} {params.allocation:q} {params.losses:q}"
        " --threads {params.threads} --device {params.device:q} {params.out:q} &> {log:q}"


if JOBS > 1:

    use rule approx as approx_shard with:
        output:
            weights=temp(f"{SHARDS_OF_CHECKPOINT}/{{shard}}.safetensors"),
            said=temp(f"{SHARDS_OF_CHECKPOINT}/{{shard}}.json"),
        log:
            f"{LOGS}/checkpoints/{RUN}.{{shard}}.log",
        benchmark:
            f"{LOGS}/checkpoints/{RUN}.{{shard}}.benchmark.tsv"

    rule gather:
        input:
            arch=f"{RESULTS}/models/{{model}}/arch.json",
            weights=[f"{SHARDS_OF_CHECKPOINT}/{shard}.safetensors" for shard in SHARDS],
            said=[f"{SHARDS_OF_CHECKPOINT}/{shard}.json" for shard in SHARDS],
        output:
            config=f"{CHECKPOINT}/config.json",
            approx=f"{CHECKPOINT}/approx.json",
            timing=f"{CHECKPOINT}/timing.json",
        log:
            f"{LOGS}/checkpoints/{RUN}.gather.log",
        conda:
            "../../environment.yaml"
        resources:
            **resources("approx", cost_of_gather, beside=True),
        params:
            model=subpath(input.arch, parent=True),
            out=CHECKPOINT,
            code=fingerprint("a3.stages.approx.assemble"),
        shell:
            "a3 gather {params.model:q} {input.weights:q}" " -o {params.out:q} &> {log:q}"

    ruleorder: gather > approx
