"""Stage spectra: weights and Rxx to the energy that each rank keeps."""

from a3.rxx.kinds import SPECTRA_KINDS


rule spectra:
    input:
        arch=f"{RESULTS}/models/{{model}}/arch.json",
        rxx=[f"{RXX}/{kind}.safetensors" for kind in SPECTRA_KINDS],
    output:
        f"{RESULTS}/spectra/{{model}}/{{calibration}}.json",
    log:
        f"{LOGS}/spectra/{{model}}/{{calibration}}.log",
    benchmark:
        f"{LOGS}/spectra/{{model}}/{{calibration}}.benchmark.tsv"
    conda:
        "../../environment.yaml"
    threads: C["threads"]["approx"]
    resources:
        **resources("approx", cost_of_spectra, device="cpu"),
    params:
        model=subpath(input.arch, parent=True),
        rxx=lambda wildcards, input: Path(input.rxx[0]).parent,
        threads=C["threads"]["approx"],
        code=fingerprint("a3.stages.approx.spectra"),
    shell:
        "a3 spectra {params.model:q} --rxx {params.rxx:q} --threads {params.threads}"
        " -o {output:q} &> {log:q}"
