"""Stage surgery: Q, K and V rebuilt from principal components; its table and figures.

Checkpoints lie beside those of approx and are evaluated by the same rules: calibration/mode/size in
place of calibration/modes/ratio.
"""

from a3.artifacts.places import SurgeryPlace
from a3.experiments.needed import evaluations
from a3.solutions.surgeries import SURGERIES, find_surgery

# Every file that the table of surgeries is made of, each model's dense row included.
OPERATIONS_EVALUATED = evaluations(
    dict.fromkeys(
        [
            *(SurgeryPlace(row["model"]) for row in OPERATIONS),
            *(SurgeryPlace(**row) for row in OPERATIONS),
        ]
    ),
    Path(RESULTS),
    C["evaluate"],
)
OPERATED = SurgeryPlace("{model}", "{calibration}", mode="{mode}", size="{size}").format()
SURGERY_CHECKPOINT = f"{RESULTS}/checkpoints/{OPERATED}"
SURGERY_INPUTS = (
    " --results {params.results:q} --surgeries {params.rows:q} --perplexity {params.perplexity:q}"
    " --harness {params.harness:q}"
)


rule surgery:
    input:
        arch=f"{RESULTS}/models/{{model}}/arch.json",
        rxx=lambda wildcards: [
            f"{RXX.format(**wildcards)}/{kind}.safetensors"
            for kind in find_surgery(wildcards.mode).kinds
        ],
    output:
        config=f"{SURGERY_CHECKPOINT}/config.json",
        approx=f"{SURGERY_CHECKPOINT}/approx.json",
        timing=f"{SURGERY_CHECKPOINT}/timing.json",
    log:
        f"{LOGS}/checkpoints/{OPERATED}.log",
    benchmark:
        f"{LOGS}/checkpoints/{OPERATED}.benchmark.tsv"
    wildcard_constraints:
        mode=one_of(SURGERIES),
        size=r"\w+@[\d.]+",
    conda:
        "../../environment.yaml"
    threads: C["threads"]["approx"]
    resources:
        **resources("approx", cost_of_surgery, device="cpu"),
    params:
        model=subpath(input.arch, parent=True),
        rxx=lambda wildcards, input: ["--rxx", Path(input.rxx[0]).parent] if input.rxx else [],
        out=subpath(output.config, parent=True),
        threads=C["threads"]["approx"],
        code=fingerprint("a3.stages.approx.surgery"),
    shell:
        "a3 surgery {params.model:q} {params.rxx:q}"
        " --mode {wildcards.mode:q} --size {wildcards.size:q} --threads {params.threads} -o {params.out:q} &> {log:q}"


rule eval_generation:
    input:
        model=model_files,
    output:
        result=f"{RESULTS}/eval/{{model}}/{{run}}/generation/prompt.json",
        timing=f"{RESULTS}/eval/{{model}}/{{run}}/generation/prompt.timing.json",
    log:
        f"{LOGS}/eval/{{model}}/{{run}}/generation/prompt.log",
    conda:
        "../../environment.yaml"
    threads: C["threads"]["eval"]
    resources:
        **resources("eval", cost_of_generation),
    params:
        model=lambda wildcards, input: Path(input.model[0]).parent,
        prompt=C["surgery"]["prompt"],
        new_tokens=C["surgery"]["new_tokens"],
        threads=C["threads"]["eval"],
        device=C["device"],
        code=fingerprint("a3.stages.evaluate.generation"),
    shell:
        "a3 eval generation {params.model:q} --prompt {params.prompt:q}"
        " --new-tokens {params.new_tokens:q} --threads {params.threads}"
        " --device {params.device:q} -o {output.result:q} &> {log:q}"


rule surgery_table:
    input:
        OPERATIONS_EVALUATED,
    output:
        multiext(f"{TABLE}/", "surgery.csv", "surgery_layers.csv", "surgery.md"),
    log:
        f"{LOGS}/tables/{C['table']}.surgery.log",
    localrule: True
    conda:
        "../../environment.yaml"
    params:
        results=lambda wildcards: RESULTS,
        rows=json.dumps(OPERATIONS),
        perplexity=C["evaluate"]["perplexity"],
        harness=C["evaluate"]["harness"],
        out=subpath(output[0], parent=True),
        code=fingerprint("a3.report.tables.surgery"),
    shell:
        f"a3 surgery-table{SURGERY_INPUTS} -o {{params.out:q}} &> {{log:q}}"


rule surgery_figures:
    input:
        OPERATIONS_EVALUATED,
    output:
        directory(f"{TABLE}/surgery_figures"),
    log:
        f"{LOGS}/tables/{C['table']}.surgery_figures.log",
    localrule: True
    conda:
        "../../environment.yaml"
    params:
        results=lambda wildcards: RESULTS,
        rows=json.dumps(OPERATIONS),
        perplexity=C["evaluate"]["perplexity"],
        harness=C["evaluate"]["harness"],
        code=fingerprint("a3.report.figures.surgery"),
    shell:
        f"a3 surgery-figures{SURGERY_INPUTS} -o {{output:q}} &> {{log:q}}"
