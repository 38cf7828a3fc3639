"""Stage tables: pandas tables, figures and the report."""

from a3.experiments.needed import evaluations, frontiers, spectra_are_free

# Every file that the table is made of.
EVALUATED = evaluations(PLACES, Path(RESULTS), C["evaluate"])
# Of each model and calibration, where the table needs those statistics anyway.
SPECTRA = sorted(
    {str(Place(row["model"], row["calibration"]).spectra(Path(RESULTS))) for row in ROWS}
    if spectra_are_free(ROWS)
    else []
)
# Of each model, calibration and modes whose ranks are allocated, where the config asks for it.
FRONTIERS = frontiers(PLACES, Path(RESULTS), C["evaluate"])
EVERYTHING = (
    "--results {params.results:q} --experiments {params.rows:q} --perplexity {params.perplexity:q}"
    " --harness {params.harness:q}"
)
# Where the losses on calibration and dev text are measured.
FIT = ["--fitted"] if "fit" in C["evaluate"] else []
CSV = ("results.csv", "comparisons.csv", "seeds.csv", "timings.csv")


rule tables:
    input:
        EVALUATED,
    output:
        multiext(f"{TABLE}/", *CSV, "results.md"),
    log:
        f"{LOGS}/tables/{C['table']}.log",
    conda:
        "../../environment.yaml"
    params:
        results=lambda wildcards: RESULTS,
        rows=json.dumps(ROWS),
        perplexity=C["evaluate"]["perplexity"],
        harness=C["evaluate"]["harness"],
        reference=["--reference", C["reference"]] if "reference" in C else [],
        fit=FIT,
        out=subpath(output[0], parent=True),
        code=fingerprint("a3.report.tables.results"),
    shell:
        f"a3 tables {EVERYTHING} {{params.reference:q}} {{params.fit:q}} -o {{params.out:q}} &> {{log:q}}"


rule speed_table:
    input:
        SPEEDS,
        [place.weights(Path(RESULTS)) for place in PLACES],
    output:
        multiext(f"{TABLE}/", "speed.csv", "speed.md"),
    log:
        f"{LOGS}/tables/{C['table']}.speed.log",
    conda:
        "../../environment.yaml"
    params:
        results=lambda wildcards: RESULTS,
        rows=json.dumps(ROWS),
        speed=C["evaluate"]["speed"],
        out=subpath(output[0], parent=True),
        code=fingerprint("a3.report.tables.speed"),
    shell:
        "a3 speed-table --results {params.results:q} --experiments {params.rows:q}"
        " --speed {params.speed:q} -o {params.out:q} &> {log:q}"


rule figures:
    input:
        evaluated=EVALUATED,
        spectra=SPECTRA,
        frontiers=FRONTIERS,
    output:
        directory(f"{TABLE}/figures"),
    log:
        f"{LOGS}/tables/{C['table']}.figures.log",
    conda:
        "../../environment.yaml"
    params:
        results=lambda wildcards: RESULTS,
        rows=json.dumps(ROWS),
        perplexity=C["evaluate"]["perplexity"],
        harness=C["evaluate"]["harness"],
        code=fingerprint("a3.report.figures.build"),
    shell:
        f"a3 figures {EVERYTHING} --spectra {{input.spectra:q}} --frontiers {{input.frontiers:q}}"
        " -o {output:q} &> {log:q}"


rule report:
    input:
        EVALUATED,
        multiext(f"{TABLE}/", *CSV, "figures"),
        SURGERY_TABLES,
        frontiers=FRONTIERS,
    output:
        f"{TABLE}/report.html",
    log:
        f"{LOGS}/tables/{C['table']}.report.log",
    conda:
        "../../environment.yaml"
    params:
        results=lambda wildcards: RESULTS,
        rows=json.dumps(ROWS),
        perplexity=C["evaluate"]["perplexity"],
        harness=C["evaluate"]["harness"],
        reference=["--reference", C["reference"]] if "reference" in C else [],
        fit=FIT,
        tables=subpath(output[0], parent=True),
        config=CONFIGURED,
        code=fingerprint("a3.report.page"),
    shell:
        f"a3 report {EVERYTHING} {{params.reference:q}} {{params.fit:q}} --tables {{params.tables:q}}"
        " --frontiers {input.frontiers:q} --config {params.config:q} -o {output:q} &> {log:q}"
