"""Stage collect: Rxx, one file a kind.

Two rules make the same files by the same command: `collect_together` makes all kinds that the
experiments need in one pass over the text; `collect` makes one kind. The first is preferred where
there is nothing yet or everything is stale. Where some are there and some are missing, the second
is, so that a new or removed kind is built alone.
"""

KINDS = kinds_of(ROWS)
RXX = f"{RESULTS}/rxx/{{model}}/{{calibration}}"
COLLECT = (
    "a3 collect {params.model:q} --text {input.text:q} {params.settings:q}"
    " --threads {params.threads} --device {params.device} -o {output.rxx:q} &> {log:q}"
)


def some_are_missing():
    """Whether, for some model and calibration, one kind is there and another one is not."""
    for model, calibration in {(row["model"], row["calibration"]) for row in ROWS}:
        folder = Path(RXX.format(model=model, calibration=calibration))
        there = {kind for kind in KINDS if (folder / f"{kind}.safetensors").exists()}
        if there and there != set(KINDS):
            return True
    return False


if some_are_missing():

    ruleorder: collect > collect_together

else:

    ruleorder: collect_together > collect


rule collect:
    input:
        arch=f"{RESULTS}/models/{{model}}/arch.json",
        text=lambda wildcards: calibration_text(wildcards),
    output:
        rxx=[f"{RXX}/{{kind}}.safetensors"],
        timing=[f"{RXX}/{{kind}}.timing.json"],
    params:
        model=subpath(input.arch, parent=True),
        settings=settings(
            "calibrations", "calibration", ("tokens", "block_length", "seed", "bos", "dtype")
        ),
        threads=C["threads"]["collect"],
        device=C["device"],
        code=fingerprint("a3.stages.collect"),
    threads: C["threads"]["collect"]
    log:
        f"{LOGS}/rxx/{{model}}/{{calibration}}/{{kind}}.log",
    benchmark:
        f"{LOGS}/rxx/{{model}}/{{calibration}}/{{kind}}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    shell:
        COLLECT


use rule collect as collect_together with:
    output:
        rxx=[f"{RXX}/{kind}.safetensors" for kind in KINDS],
        timing=[f"{RXX}/{kind}.timing.json" for kind in KINDS],
    log:
        f"{LOGS}/rxx/{{model}}/{{calibration}}/together.log",
    benchmark:
        f"{LOGS}/rxx/{{model}}/{{calibration}}/together.benchmark.tsv"


def calibration_text(wildcards):
    """Documents that a calibration reads."""
    text = entry("calibrations", wildcards.calibration)["text"]
    return f"{RESULTS}/texts/{text}/docs.jsonl"
