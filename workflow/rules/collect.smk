"""Stage collect: Rxx, one file a kind.

One rule, of which there are as many instances as there are sets of kinds, since the outputs of a rule
are the same for all wildcards. `collect` makes one kind. `collect_together` makes all kinds that the
table needs of a calibration in one pass over the text; where calibrations need other kinds, they have
an instance of their own (`collect_together_2` …). One pass is preferred where there is nothing yet or
everything is stale. A calibration of which some kinds are there and some are missing is left out of
it, so that a new or removed kind is built alone.

A calibration with several `shards` is collected in as many jobs, each of which sees a run of the
blocks and writes to `shards/0of4` …, and `merge` adds them. How many is fixed in the config, and they
are added in order, so that the scheduler decides nothing about the bytes.

Before it starts, `a3 collect` refuses experiments that do not fit the model.
"""


include: "../helpers/collect.smk"


SHARDED = [name for name, entry in C["calibrations"].items() if entry["shards"] > 1]
ONE_PASS = one_pass()

# (name, kinds, name of the log, calibrations)
COLLECT = [("collect", ["{kind}"], "{kind}", "[^/]+")] + [
    (name, kinds, "together", one_of(calibrations))
    for name, (kinds, calibrations) in ONE_PASS.items()
]

for name, kinds, log_name, calibrations in COLLECT:

    rule:
        name:
            name
        input:
            arch=f"{RESULTS}/models/{{model}}/arch.json",
            text=calibration_text,
        output:
            rxx=[f"{RXX}{{shard_folder}}/{kind}.safetensors" for kind in kinds],
            timing=[f"{RXX}{{shard_folder}}/{kind}.timing.json" for kind in kinds],
        log:
            f"{LOGS}/rxx/{{model}}/{{calibration}}{{shard_folder}}/{log_name}.log",
        benchmark:
            f"{LOGS}/rxx/{{model}}/{{calibration}}{{shard_folder}}/{log_name}.benchmark.tsv"
        wildcard_constraints:
            calibration=calibrations,
        conda:
            "../../environment.yaml"
        threads: C["threads"]["collect"]
        resources:
            **resources("collect", cost_of_collect),
        params:
            model=subpath(input.arch, parent=True),
            settings=settings(
                "calibrations", "calibration", ("tokens", "block_length", "seed", "bos", "dtype")
            ),
            shard=shard_option,
            # A parameter that takes the input makes nothing stale when it changes (Snakemake looks at
            # the input instead): a new row is checked, and leaves the statistics as they are.
            experiments=lambda wildcards, input: experiments_of(wildcards.model),
            threads=C["threads"]["collect"],
            device=C["device"],
            code=fingerprint("a3.stages.collect.collect"),
        shell:
            "a3 collect {params.model:q} --text {input.text:q} {params.settings:q} {params.shard:q}"
            " --experiments {params.experiments:q} --threads {params.threads} --device {params.device:q}"
            " -o {output.rxx:q} &> {log:q}"


if SHARDED:

    rule merge:
        input:
            arch=f"{RESULTS}/models/{{model}}/arch.json",
            rxx=lambda wildcards: shards("safetensors", wildcards),
            timing=lambda wildcards: shards("timing.json", wildcards),
        output:
            rxx=f"{RXX}/{{kind}}.safetensors",
            timing=f"{RXX}/{{kind}}.timing.json",
        log:
            f"{LOGS}/rxx/{{model}}/{{calibration}}/{{kind}}.merge.log",
        wildcard_constraints:
            calibration=one_of(SHARDED),
        conda:
            "../../environment.yaml"
        resources:
            **resources("approx", cost_of_merge, beside=True),
        params:
            code=fingerprint("a3.stages.collect.merge"),
        shell:
            "a3 merge {input.rxx:q} -o {output.rxx:q} &> {log:q}"


# As `ruleorder:` does, whose names cannot be computed.
workflow.ruleorder(*(["merge"] if SHARDED else []), *ONE_PASS, "collect")
