"""a3: from a model's name to a checked table. Plain `snakemake` builds the report."""

from snakemake.utils import min_version
from snakemake_interface_executor_plugins.settings import ExecMode

min_version("9.0")


configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/resources.smk"
include: "workflow/rules/model.smk"
include: "workflow/rules/text.smk"
include: "workflow/rules/collect.smk"
include: "workflow/rules/approx.smk"
include: "workflow/rules/quantise.smk"
include: "workflow/rules/heal.smk"
include: "workflow/rules/eval.smk"
include: "workflow/rules/export.smk"
include: "workflow/rules/spectra.smk"
include: "workflow/rules/frontier.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/plan.smk"


if PAPER:

    include: "workflow/rules/paper.smk"


if OPERATIONS:

    include: "workflow/rules/surgery.smk"


# On a cluster these stay on the machine that Snakemake runs on: nodes are often offline.
localrules:
    wheel,
    model,
    text,
    split,
    items,
    tables,
    speed_table,
    figures,
    report,


# Snakemake records a failed job like a finished one. Where results that depend on it are there from
# an earlier run, the next run would find nothing to do; so they are marked as unfinished.
onerror:
    if workflow.exec_mode == ExecMode.DEFAULT:
        for job in workflow.scheduler.failed:
            for dependent in workflow.dag.bfs(workflow.dag.depending, job):
                workflow.persistence.started(dependent)


rule all:
    default_target: True
    input:
        f"{TABLE}/report.html",
        f"{TABLE}/results.md",
        f"{TABLE}/speed.md" if SPEEDS else [],
        SURGERY_TABLES,
