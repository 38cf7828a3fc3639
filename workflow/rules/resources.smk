"""What jobs of the heavy stages ask a cluster for: what the config says, else by the model's size.

On one machine nothing of it limits anything.
"""

import errno
from dataclasses import replace

from a3.core.files import read_record
from a3.models.cost import (
    DECODE_ROWS,
    approx_cost,
    collect_cost,
    gather_cost,
    harness_cost,
    heal_cost,
    merge_cost,
    perplexity_cost,
    shapes,
    speed_cost,
    surgery_cost,
)
from a3.solutions.surgeries import find_surgery
from a3.solutions.target import TRIAL_BLOCKS, TRIALS

# Tokens of a prompt, at least so many are asked for.
PROMPT = 256
# Each job runs a Snakemake of its own around its command, which takes this many MiB.
SNAKEMAKE = 500
# The config's names and the Slurm executor's.
ASKED = {"partition": "slurm_partition", "account": "slurm_account", "gpu": "gpu", "gres": "gres"}


def resources(stage, cost, beside=False, device=C["device"]):
    """Resources of a rule; a job that is tried again asks for a multiple of memory and time.

    A small rule `beside` a stage has its partition and account, and memory and time of its own.
    """
    device = "cpu" if beside else device
    said = C["resources"].get(stage, {})
    if beside:
        said = {key: said[key] for key in ("partition", "account") if key in said}

    def mem_mb(wildcards, input, attempt):
        needed = said.get("mem_mb") or SNAKEMAKE + cost(arch_of(input), wildcards).megabytes()
        return attempt * needed

    def runtime(wildcards, input, attempt):
        needed = said.get("runtime") or cost(arch_of(input), wildcards).minutes(
            C["threads"][stage], device
        )
        return attempt * needed

    asked = {"mem_mb": mem_mb, "runtime": runtime}
    if device != "cpu" and "gres" not in said:
        asked["gpu"] = 1
    return asked | {ASKED[key]: value for key, value in said.items() if key in ASKED}


def arch_of(input):
    """The shapes of the model among a job's input files: arch.json, or the base in approx.json.

    Where the file is yet to be made, Snakemake takes FileNotFoundError for "to be determined" and
    asks again when the job is ready.
    """
    (name,) = [name for name in input if Path(name).name in ("arch.json", "approx.json")]
    if not Path(name).exists():
        raise FileNotFoundError(errno.ENOENT, "yet to be made", name)
    try:
        with correctable():
            record = read_record(Path(name))
            return shapes(record["base"] if Path(name).name == "approx.json" else record)
    except (LookupError, TypeError) as error:
        raise WorkflowError(f"{name}: {error!r}. Delete it; it is made again.") from None


def cost_of_collect(arch, wildcards):
    """Cost of one job of a calibration."""
    chosen = entry("calibrations", wildcards.calibration)
    tokens = chosen["tokens"] // chosen["shards"]
    alone = "kind" in wildcards.keys()
    kinds = [wildcards.kind] if alone else TOGETHER[wildcards.calibration]
    return collect_cost(arch, tokens, chosen["block_length"], chosen["dtype"], kinds)


def cost_of_merge(arch, wildcards):
    """Cost of adding the shards of one kind."""
    shards = entry("calibrations", wildcards.calibration)["shards"]
    return merge_cost(arch, shards, wildcards.kind)


def cost_of_gather(arch, wildcards):
    """Cost of joining the shards of a checkpoint."""
    return gather_cost(arch)


def cost_of_approx(arch, wildcards):
    """Cost of one job of a checkpoint."""
    return approx_cost(arch, C["approx_jobs"], kinds_needed(choices_of(wildcards)))


def cost_of_losses(arch, wildcards):
    """Cost of one job of losses by rank, which may solve several layers at once."""
    cost = cost_of_approx(arch, wildcards)
    return replace(cost, memory=cost.memory + 2**30)


def cost_of_trials(arch, wildcards):
    """Cost of making checkpoints and scoring them, six at most, and the dense model."""
    chosen = entry("calibrations", wildcards.calibration)
    length = chosen["block_length"]
    made = cost_of_losses(arch, wildcards)
    scored = perplexity_cost(arch, (TRIALS + 1) * TRIAL_BLOCKS * length, length, chosen["dtype"])
    memory = max(made.memory, scored.memory)
    return replace(made, memory=memory, flops=TRIALS * made.flops + scored.flops)


def cost_of_collect_compressed(arch, wildcards):
    """Cost of the statistics of a compressed model, as if it were dense."""
    chosen = entry("calibrations", wildcards.calibration)
    return collect_cost(
        arch, chosen["tokens"], chosen["block_length"], chosen["dtype"], QUANTISED_KINDS
    )


def cost_of_quantise(arch, wildcards):
    """Cost of one quantised checkpoint, as if its base were dense."""
    return approx_cost(arch, 1, kinds_to_quantise(place_of(wildcards)))


def cost_of_heal(arch, wildcards):
    """Cost of one training, as if the compressed model were dense."""
    chosen = entry("heal", wildcards.heal)
    return heal_cost(arch, chosen["tokens"], chosen["block_length"], chosen["dtype"])


def cost_of_spectra(arch, wildcards):
    """Cost of the spectra of one calibration: less than that of a checkpoint."""
    return approx_cost(arch)


def cost_of_perplexity(arch, wildcards):
    """Cost of scoring one text."""
    chosen = entry("perplexity", wildcards.text)
    tokens = tokens_scored(wildcards)
    return perplexity_cost(arch, tokens, chosen["block_length"], chosen["dtype"])


def cost_of_fit(arch, wildcards):
    """Cost of scoring a few blocks of two texts with two models."""
    chosen = fit_calibration(wildcards)
    return perplexity_cost(arch, fit_tokens(wildcards), chosen["block_length"], chosen["dtype"])


def cost_of_surgery(arch, wildcards):
    """Cost of one surgery."""
    chosen = find_surgery(wildcards.mode)
    return surgery_cost(arch, chosen.shared == "layers", chosen.kinds)


def cost_of_generation(arch, wildcards):
    """Cost of following a prompt: that of as many tokens scored, with some for the prompt."""
    tokens = PROMPT + DECODE_ROWS * C["surgery"]["new_tokens"]
    return perplexity_cost(arch, tokens, PROMPT + C["surgery"]["new_tokens"], "float32")


def items_of(chosen):
    """Items of a harness entry; of lm-eval's own tasks that have no limit few have more."""
    return chosen.get("limit", chosen.get("items", 10_000))


def cost_of_harness(arch, wildcards):
    """Cost of one task."""
    chosen = entry("harness", wildcards.task)
    return harness_cost(arch, items_of(chosen), chosen["shots"], chosen["dtype"])


def cost_of_speed(arch, wildcards):
    """Cost of timing two models; both count as dense."""
    chosen = dict(entry("speed", wildcards.speed))
    return speed_cost([arch, arch], len(chosen.pop("attention")), **chosen)
