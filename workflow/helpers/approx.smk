"""Helpers of rules/approx.smk: what its jobs read and are told."""

from a3.solutions.modes import SHARED


def rxx_needed(wildcards):
    """The statistics that the modes read."""
    with correctable():
        kinds = kinds_needed(choose(wildcards))
    folder = RXX.format(model=wildcards.model, calibration=wildcards.calibration)
    return [f"{folder}/{kind}.safetensors" for kind in kinds]


def allocation_needed(wildcards):
    """The ranks of layers, where some mode has an allocated ratio."""
    shared = SHARED in wildcards.qk + wildcards.ov + wildcards.mlp
    return [f"{RESULTS}/allocations/{RUN}.json".format(**wildcards)] if shared else []


def approx_output(wildcards, output):
    """Where `a3 approx` writes: a folder, or the file of one shard."""
    if "shard" in wildcards.keys():
        return ["--shard", wildcards.shard, "-o", output.weights]
    return ["-o", str(Path(output.config).parent)]
