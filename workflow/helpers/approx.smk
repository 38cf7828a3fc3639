"""Helpers of rules/approx.smk: what its jobs read and are told."""

from a3.solutions.modes import SHARED


def choices_of(wildcards):
    """The modes of a job and their sizes; losses by rank are for every ratio, so any is taken."""
    with correctable():
        return choose({"ratio": "0"} | dict(wildcards.items()))


def rxx_needed(wildcards):
    """The statistics that the modes read."""
    folder = RXX.format(model=wildcards.model, calibration=wildcards.calibration)
    return [f"{folder}/{kind}.safetensors" for kind in kinds_needed(choices_of(wildcards))]


def allocation_needed(wildcards):
    """The ranks of layers, where some mode has an allocated ratio."""
    shared = SHARED in wildcards.qk + wildcards.ov + wildcards.mlp
    return [f"{RESULTS}/allocations/{RUN}.json".format(**wildcards)] if shared else []


def measured_text(wildcards):
    """The calibration's text, where a largest loss is asked for."""
    return [calibration_text(wildcards)] if NAMES["max_loss"] in wildcards.ratio else []


def losses_needed(wildcards):
    """The losses by rank of modes that eliminate; a shard needs those of its own layers."""
    folder = place_of(wildcards).losses(Path(RESULTS))
    shards = [wildcards.get("shard")] if "shard" in wildcards.keys() else SHARDS
    return [f"{folder}/{shard}.safetensors" for shard in shards] if folder else []


def approx_output(wildcards, output):
    """Where `a3 approx` writes: a folder, or the file of one shard."""
    if "shard" in wildcards.keys():
        return ["--shard", wildcards.shard, "-o", output.weights]
    return ["-o", str(Path(output.config).parent)]
