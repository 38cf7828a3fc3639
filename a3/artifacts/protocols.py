"""Which settings two results must share to stand in one table."""

from collections.abc import Sequence

from a3.core.errors import A3Error
from a3.core.records import Record

# Before the name of a metric: the items' values of a result are the mean of its logarithm.
LOG = "log_"

# Two results of one model stand in one table only when they agree on all of these.
PERPLEXITY_PROTOCOL = (
    "source",
    "text_sha256",
    "split",
    "join",
    "block_length",
    "stride",
    "bos",
    "dtype",
    "blocks",
    "tokens_scored",
    "token_ids_sha256",
)

SPEED_PROTOCOL = ("batch", "prompt", "new_tokens", "repeats", "attention", "dtype", "threads")

HARNESS_PROTOCOL = (
    "metric",
    "items",
    "shots",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "system_instruction",
    "task_hash",
    "prompts_sha256",
    "lm_eval",
)


def same_protocol(dense: Record, other: Record, keys: Sequence[str]) -> None:
    """Refuse two results whose protocols differ, naming both files and what differs."""
    differences = [
        f"{key} is {other[key]!r} here and {dense[key]!r} there"
        for key in keys
        if other[key] != dense[key]
    ]
    if differences:
        raise A3Error(
            f"{other.path} and {dense.path} were taken by different protocols: "
            f"{'; '.join(differences)}. A table never mixes protocols: "
            "delete the stale one and build it again."
        )
