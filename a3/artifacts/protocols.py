"""Which settings two results must share to appear in one table."""

from collections.abc import Sequence

from a3.core.errors import A3Error
from a3.core.records import Record

# Prefix of a metric's name if the items' values average to the logarithm of the result.
LOG = "log_"

# Two results of one model may appear in one table only if they agree on all of these.
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


def texts_scored(result: Record) -> list[Record]:
    """The record of each text of a perplexity, with the hashes of the model; of one text, itself.

    A result of a set has its texts' records under `texts`.
    """
    if "texts" not in result.data:
        return [result]
    shared = {key: result[key] for key in ("checkpoint_sha256", "config_sha256", "provenance")}
    return [Record(result.path, text | shared) for text in result["texts"]]


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
