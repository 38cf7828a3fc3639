"""Stage quantise: a dense or compressed model to low precision, with its low-rank repair.

A dense model is quantised by the statistics that other rows share; a compressed one by its own,
which are collected on it in one pass, of all kinds that some row needs.
"""


include: "../helpers/quantise.smk"


QUANTISED = f"{RESULTS}/quantised/{RUN}/{{quantise}}"


rule quantise:
    input:
        model=base_files,
        rxx=rxx_to_quantise,
    output:
        # Weights are in as many files as their size asks for; approx.json has their hashes.
        config=f"{QUANTISED}/config.json",
        approx=f"{QUANTISED}/approx.json",
        timing=f"{QUANTISED}/timing.json",
    log:
        f"{LOGS}/quantised/{RUN}/{{quantise}}.log",
    benchmark:
        f"{LOGS}/quantised/{RUN}/{{quantise}}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    threads: C["threads"]["approx"]
    resources:
        **resources("approx", cost_of_quantise, device="cpu"),
    params:
        model=lambda wildcards, input: Path(input.model[0]).parent,
        rxx=lambda wildcards, input: Path(input.rxx[0]).parent,
        recipe=quantise_options,
        threads=C["threads"]["approx"],
        out=QUANTISED,
        code=fingerprint("a3.stages.approx.quantise"),
    shell:
        "a3 quantise {params.model:q} --rxx {params.rxx:q}"
        " {params.recipe:q} --threads {params.threads} -o {params.out:q} &> {log:q}"


if QUANTISED_KINDS:

    rule collect_compressed:
        input:
            model=checkpoint_files(CHECKPOINT),
            text=calibration_text,
        output:
            rxx=[f"{RESULTS}/rxx/{RUN}/{kind}.safetensors" for kind in QUANTISED_KINDS],
            timing=[f"{RESULTS}/rxx/{RUN}/{kind}.timing.json" for kind in QUANTISED_KINDS],
        log:
            f"{LOGS}/rxx/{RUN}.log",
        benchmark:
            f"{LOGS}/rxx/{RUN}.benchmark.tsv"
        conda:
            "../../environment.yaml"
        threads: C["threads"]["collect"]
        resources:
            **resources("collect", cost_of_collect_compressed),
        params:
            model=CHECKPOINT,
            settings=settings(
                "calibrations", "calibration", ("tokens", "block_length", "seed", "bos", "dtype")
            ),
            threads=C["threads"]["collect"],
            device=C["device"],
            code=fingerprint("a3.stages.collect.collect", "a3.models.modeling_a3"),
        shell:
            "a3 collect {params.model:q} --text {input.text:q} {params.settings:q}"
            " --threads {params.threads} --device {params.device:q} -o {output.rxx:q} &> {log:q}"
