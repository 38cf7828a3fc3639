"""Stage collect: Rxx, one file a kind.

Two rules make the same files by the same command: `collect_together` makes all kinds that the
experiments need in one pass over the text; `collect` makes one kind. The first is preferred where
there is nothing yet or everything is stale. Where some are there and some are missing, the second
is, so that a new or removed kind is built alone. Where some calibrations need fewer kinds than
others, `collect_others` is their `collect_together`; `collect_paper` is that of the paper's tables.

A calibration with several `shards` is collected in as many jobs, each of which sees a run of the
blocks and writes to `shards/0of4` …, and `merge` adds them. How many is fixed in the config, and they
are added in order, so that the scheduler decides nothing about the bytes.

Before it starts, `a3 collect` refuses experiments that do not fit the model.
"""

COLLECT = (
    "a3 collect {params.model:q} --text {input.text:q} {params.settings:q} {params.shard:q}"
    " --experiments {params.experiments:q} --threads {params.threads} --device {params.device:q}"
    " -o {output.rxx:q} &> {log:q}"
)


rule collect:
    input:
        arch=f"{RESULTS}/models/{{model}}/arch.json",
        text=calibration_text,
    output:
        rxx=[f"{RXX}{{shard_folder}}/{{kind}}.safetensors"],
        timing=[f"{RXX}{{shard_folder}}/{{kind}}.timing.json"],
    log:
        f"{LOGS}/rxx/{{model}}/{{calibration}}{{shard_folder}}/{{kind}}.log",
    benchmark:
        f"{LOGS}/rxx/{{model}}/{{calibration}}{{shard_folder}}/{{kind}}.benchmark.tsv"
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
        COLLECT


if len(KINDS) > 1:

    use rule collect as collect_together with:
        output:
            rxx=[f"{RXX}{{shard_folder}}/{kind}.safetensors" for kind in KINDS],
            timing=[f"{RXX}{{shard_folder}}/{kind}.timing.json" for kind in KINDS],
        log:
            f"{LOGS}/rxx/{{model}}/{{calibration}}{{shard_folder}}/together.log",
        benchmark:
            f"{LOGS}/rxx/{{model}}/{{calibration}}{{shard_folder}}/together.benchmark.tsv"
        wildcard_constraints:
            calibration=one_of(set(CALIBRATED) - set(OTHERS)),

    if some_are_missing(set(CALIBRATED) - set(OTHERS)):

        ruleorder: collect > collect_together

    else:

        ruleorder: collect_together > collect


if len(OTHER_KINDS) > 1:

    use rule collect as collect_others with:
        output:
            rxx=[f"{RXX}{{shard_folder}}/{kind}.safetensors" for kind in OTHER_KINDS],
            timing=[f"{RXX}{{shard_folder}}/{kind}.timing.json" for kind in OTHER_KINDS],
        log:
            f"{LOGS}/rxx/{{model}}/{{calibration}}{{shard_folder}}/together.log",
        benchmark:
            f"{LOGS}/rxx/{{model}}/{{calibration}}{{shard_folder}}/together.benchmark.tsv"
        wildcard_constraints:
            calibration=one_of(OTHERS),

    if some_are_missing(OTHERS):

        ruleorder: collect > collect_others

    else:

        ruleorder: collect_others > collect


if PAPER_CALIBRATIONS:

    use rule collect as collect_paper with:
        output:
            rxx=[f"{RXX}{{shard_folder}}/{kind}.safetensors" for kind in PAPER_KINDS],
            timing=[f"{RXX}{{shard_folder}}/{kind}.timing.json" for kind in PAPER_KINDS],
        log:
            f"{LOGS}/rxx/{{model}}/{{calibration}}{{shard_folder}}/together.log",
        benchmark:
            f"{LOGS}/rxx/{{model}}/{{calibration}}{{shard_folder}}/together.benchmark.tsv"
        wildcard_constraints:
            calibration=one_of(PAPER_CALIBRATIONS),

    if some_are_missing(PAPER_CALIBRATIONS):

        ruleorder: collect > collect_paper

    else:

        ruleorder: collect_paper > collect


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

    ruleorder: merge > collect

    if len(KINDS) > 1:

        ruleorder: merge > collect_together

    if len(OTHER_KINDS) > 1:

        ruleorder: merge > collect_others

    if PAPER_CALIBRATIONS:

        ruleorder: merge > collect_paper
