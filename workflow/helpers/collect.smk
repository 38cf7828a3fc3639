"""Helpers of rules/collect.smk: what its jobs read and are told."""

from a3.experiments.needed import is_partly_collected


def one_pass():
    """The instances that collect several kinds: name to (kinds, calibrations)."""
    collected = {(row["model"], row["calibration"]) for row in [*ROWS, *PAPER_ROWS]}
    partly = {
        calibration
        for model, calibration in collected
        if is_partly_collected(
            Path(RXX.format(model=model, calibration=calibration)), TOGETHER.get(calibration, ())
        )
    }
    groups = {}
    for calibration, kinds in TOGETHER.items():
        if len(kinds) > 1 and calibration not in partly:
            groups.setdefault(tuple(kinds), []).append(calibration)
    names = ["collect_together", *(f"collect_together_{i + 2}" for i in range(len(groups)))]
    return dict(zip(names, groups.items()))


def experiments_of(model):
    """The rows of one model as JSON, for the command line."""
    return json.dumps([row for row in ROWS if row["model"] == model])


def shards(ending, wildcards):
    """The files of one kind of all shards, in order."""
    folder, count = RXX.format(**wildcards), C["calibrations"][wildcards.calibration]["shards"]
    return [f"{folder}/shards/{i}of{count}/{wildcards.kind}.{ending}" for i in range(count)]


def shard_option(wildcards):
    """What tells `a3 collect` which shard it makes, where it is one."""
    folder = wildcards.shard_folder
    return ["--shard", Path(folder).name] if folder else []
