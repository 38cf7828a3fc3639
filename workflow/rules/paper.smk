"""The paper's tables: ours beside the published figures. `snakemake paper_table1` prints one.

`results/paper/table1/llama-2-7b.csv` is one model's group of rows and can be asked for alone. The
comparison reads every group that is there; those of models that `paper.models` does not name are
taken as they are, and not built again.
"""


include: "../helpers/paper.smk"


PAPER_GROUPS = f"{RESULTS}/paper"
TABLES = PAPER.path.with_suffix("")


rule paper_rows:
    input:
        definition=[f"{TABLES}/{{table}}.yaml", str(PAPER.path)],
        results=lambda wildcards: [
            str(path)
            for path in PAPER.files(PAPER.tables[wildcards.table], wildcards.model, Path(RESULTS))
        ],
    output:
        f"{PAPER_GROUPS}/{{table}}/{{model}}.csv",
    log:
        f"{LOGS}/paper/{{table}}/{{model}}.log",
    wildcard_constraints:
        table=one_of(PAPER.tables),
        model=one_of(PAPER.models),
    localrule: True
    conda:
        "../../environment.yaml"
    params:
        results=lambda wildcards: RESULTS,
        code=fingerprint("a3.report.tables.paper_rows"),
    shell:
        "a3 paper rows {input.definition[0]:q} --model {wildcards.model:q}"
        " --results {params.results:q} -o {output:q} &> {log:q}"


rule paper_comparison:
    input:
        definition=[f"{TABLES}/{{table}}.yaml", str(PAPER.path)],
        published=lambda wildcards: str(PAPER.tables[wildcards.table].source),
        groups=lambda wildcards: paper_groups(wildcards.table),
    output:
        multiext(f"{PAPER_GROUPS}/{{table}}/comparison", ".csv", ".md", ".svg", ".png"),
    log:
        f"{LOGS}/paper/{{table}}/comparison.log",
    wildcard_constraints:
        table=one_of(PAPER.tables),
    localrule: True
    conda:
        "../../environment.yaml"
    params:
        others=lambda wildcards: other_paper_groups(wildcards.table),
        out=subpath(output[0], parent=True),
        code=fingerprint("a3.report.paper"),
    shell:
        "a3 paper compare {input.definition[0]:q} -o {params.out:q} &> {log:q}"


# Without output: whoever asks sees the table, built anew or not.
for name in PAPER.tables:

    rule:
        name:
            f"paper_{name}"
        input:
            f"{PAPER_GROUPS}/{name}/comparison.md",
        log:
            f"{LOGS}/paper/{name}/shown.log",
        localrule: True
        conda:
            "../../environment.yaml"
        shell:
            "cat {input:q} | tee {log:q}"
