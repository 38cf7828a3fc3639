"""The settings that the estimate of each stage needs; the command line checks jobs for them."""

# Settings of every job.
COMMON = ("threads", "device")

# `row` has qk, ov, mlp and ratio; {} is the dense model. `jobs` is how many share a checkpoint.
SETTINGS = {
    "collect": ("kinds", "tokens", "block_length", "dtype"),
    "allocate": ("row",),
    "approx": ("row", "jobs"),
    "quantise": ("row",),
    "ppl": ("row", "tokens", "block_length", "dtype"),
    "harness": ("row", "items", "shots", "dtype"),
    "speed": ("row", "attention", "batch", "prompt", "new_tokens", "repeats", "dtype"),
}


def settings_of(stage: str) -> tuple[str, ...]:
    """The exact set of keys in the settings of a stage's jobs."""
    return (*COMMON, *SETTINGS[stage])
