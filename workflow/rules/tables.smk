"""Stage tables: pandas tables, figures and the report."""

EVALUATED = [
    str(path)
    for place in PLACES
    for path in (
        place.weights(Path(RESULTS)),
        *(place.perplexity(Path(RESULTS), name) for name in C["evaluate"]["perplexity"]),
        *(place.harness(Path(RESULTS), name) for name in C["evaluate"]["harness"]),
    )
]
EVERYTHING = (
    "--results {params.results:q} --experiments {params.rows:q} --perplexity {params.perplexity:q}"
    " --harness {params.harness:q}"
)


rule tables:
    input:
        EVALUATED,
    output:
        multiext(f"{TABLE}/", "results.csv", "results.md", "seconds.csv"),
    params:
        results=RESULTS,
        rows=json.dumps(ROWS),
        perplexity=C["evaluate"]["perplexity"],
        harness=C["evaluate"]["harness"],
        out=TABLE,
        code=fingerprint("a3.stages.tables"),
    log:
        f"{LOGS}/tables/{C['table']}.log",
    conda:
        "../../environment.yaml"
    shell:
        f"a3 tables {EVERYTHING} -o {{params.out:q}} &> {{log:q}}"


rule figures:
    input:
        EVALUATED,
    output:
        directory(f"{TABLE}/figures"),
    params:
        results=RESULTS,
        rows=json.dumps(ROWS),
        perplexity=C["evaluate"]["perplexity"],
        harness=C["evaluate"]["harness"],
        code=fingerprint("a3.stages.figures"),
    log:
        f"{LOGS}/tables/{C['table']}.figures.log",
    conda:
        "../../environment.yaml"
    shell:
        f"a3 figures {EVERYTHING} -o {{output:q}} &> {{log:q}}"


rule report:
    input:
        f"{TABLE}/results.csv",
        f"{TABLE}/seconds.csv",
        f"{TABLE}/figures",
    output:
        f"{TABLE}/report.html",
    params:
        results=RESULTS,
        tables=TABLE,
        config=json.dumps(C, sort_keys=True),
        code=fingerprint("a3.stages.report"),
    log:
        f"{LOGS}/tables/{C['table']}.report.log",
    conda:
        "../../environment.yaml"
    shell:
        "a3 report --results {params.results:q} --tables {params.tables:q}"
        " --config {params.config:q} -o {output:q} &> {log:q}"
