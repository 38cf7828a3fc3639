"""Stage heal: trains a compressed model towards its dense one, for rows that ask for it."""

HEALED = f"{RESULTS}/healed/{RUN}/{HEALED_BY}{{heal}}"


rule heal:
    input:
        model=base_files,
        teacher=f"{RESULTS}/models/{{model}}/config.json",
        text=lambda wildcards: learned(entry("heal", wildcards.heal)["text"]),
    output:
        # Weights are in as many files as the checkpoint's; approx.json has their hashes.
        config=f"{HEALED}/config.json",
        approx=f"{HEALED}/approx.json",
        timing=f"{HEALED}/timing.json",
    log:
        f"{LOGS}/healed/{RUN}/{HEALED_BY}{{heal}}.log",
    benchmark:
        f"{LOGS}/healed/{RUN}/{HEALED_BY}{{heal}}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    threads: C["threads"]["heal"]
    resources:
        **resources("heal", cost_of_heal),
    params:
        model=lambda wildcards, input: Path(input.model[0]).parent,
        teacher=subpath(input.teacher, parent=True),
        settings=settings(
            "heal",
            "heal",
            ("tokens", "learning_rate", "batch_size", "block_length", "bos", "dtype"),
        ),
        threads=C["threads"]["heal"],
        device=C["device"],
        out=HEALED,
        code=fingerprint("a3.stages.heal.heal", "a3.models.modeling_a3"),
    shell:
        "a3 heal {params.model:q} --teacher {params.teacher:q} --text {input.text:q}"
        " {params.settings:q} --threads {params.threads} --device {params.device:q}"
        " -o {params.out:q} &> {log:q}"
