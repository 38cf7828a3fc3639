"""Stage export: checkpoints for other runtimes, asked for by their paths.

results/exports/<model>/<run>/hf/ is an ordinary checkpoint of a compressed one, and
results/exports/<model>/<run>/model-<type>.gguf a file for llama.cpp, of the dense model too.
"""

from a3.core.dtypes import GGUF_TYPES

EXPORT = f"{RESULTS}/exports/{{model}}/{{run}}"
EXPORT_LOG = f"{LOGS}/exports/{{model}}/{{run}}"


rule export_hf:
    input:
        model_files,
    output:
        # Weights are in as many files as the checkpoint's.
        config=f"{EXPORT}/hf/config.json",
        record=f"{EXPORT}/hf/export.json",
    log:
        f"{EXPORT_LOG}/hf.log",
    benchmark:
        f"{EXPORT_LOG}/hf.benchmark.tsv"
    wildcard_constraints:
        run="[^/]+/[^/]+/[^/]+",
    conda:
        "../../environment.yaml"
    resources:
        **resources("approx", cost_of_gather, beside=True),
    params:
        model=subpath(input[0], parent=True),
        out=subpath(output.config, parent=True),
        code=fingerprint("a3.stages.export.hf", "a3.models.modeling_a3"),
    shell:
        "a3 export hf {params.model:q} -o {params.out:q} &> {log:q}"


rule export_gguf:
    input:
        model_files,
    output:
        f"{EXPORT}/model-{{type}}.gguf",
    log:
        f"{EXPORT_LOG}/model-{{type}}.log",
    benchmark:
        f"{EXPORT_LOG}/model-{{type}}.benchmark.tsv"
    wildcard_constraints:
        type=one_of(GGUF_TYPES),
    conda:
        "../../environment.yaml"
    resources:
        **resources("approx", cost_of_gather, beside=True),
    params:
        model=subpath(input[0], parent=True),
        code=fingerprint("a3.stages.export.gguf"),
    shell:
        "a3 export gguf {params.model:q} --type {wildcards.type:q} -o {output:q} &> {log:q}"
