"""What the estimate of a job depends on, by its stage; the command line holds jobs to it."""

# Of every job.
COMMON = ("threads", "device")

# `row` has qk, ov, mlp and ratio, and is {} of the dense model; `jobs` share one checkpoint.
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
    """The keys of the settings of a stage's jobs: no more, and no fewer."""
    return (*COMMON, *SETTINGS[stage])
