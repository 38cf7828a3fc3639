"""Shared code of evaluation stages: loads the model of a folder and writes a result's record."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import a3.models.quantised  # noqa: F401
from a3.core.files import sha256, write_record
from a3.core.provenance import provenance
from a3.models.checkpoint import Checkpoint, model_source
from a3.models.load import load_model, load_tokenizer


@dataclass
class Evaluated:
    """A dense or compressed folder that is evaluated; raises A3Error if it is damaged."""

    folder: Path
    checkpoint: Checkpoint = field(init=False)
    tokenizer: PreTrainedTokenizerBase = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoint = Checkpoint(self.folder)
        self.tokenizer = load_tokenizer(self.folder)

    def write(
        self, out: Path, stage: str, found: dict[str, Any], spent: dict[str, float], **settings: Any
    ) -> None:
        """Write a result with the hashes of its model, and the seconds beside it.

        `settings` go into the provenance of the `stage`, a module's name.
        """
        made = provenance(stage, model=model_source(self.folder), **settings)
        write_record(out, found | hashes(self.checkpoint) | {"provenance": made})
        write_record(out.with_suffix(".timing.json"), spent)


def load(folder: Path, dtype: str, device: str) -> PreTrainedModel:
    """The model of a folder, ready to run."""
    return load_model(folder, dtype).to(device)


def hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Identifies a result's model: the hashes of its weights and its config."""
    return {
        "checkpoint_sha256": checkpoint.sha256(),
        "config_sha256": sha256(checkpoint.folder / "config.json"),
    }
