"""The loss on calibration and dev text in result tables."""

from typing import Any

import pandas as pd

from a3.artifacts.fit import is_overfitted
from a3.core.records import Record
from a3.report.tables.frames import named


def fit_values(record: Record | None) -> dict[str, Any]:
    """The cells of a row of results.csv; none where nothing was measured.

    Increases of the loss over the dense model's in nats a token, the standard errors of those that
    were measured, and whether the model is overfitted.
    """
    if record is None:
        return {}
    found: dict[str, Any] = {"predicted": record["predicted"]}
    for text in ("calibration", "dev"):
        said = record[text] or {}
        found |= {text: said.get("increase"), f"{text}_stderr": said.get("stderr")}
    return named("fit", found | {"overfitted": is_overfitted(record.data)})


def fit_note(frame: pd.DataFrame) -> list[str]:
    """What these columns show, in a few sentences; nothing if there are none."""
    if "fit.calibration" not in frame:
        return []
    return [
        "Predicted Δ nll is the loss that the allocation of ranks expects; calibration Δ nll and "
        "dev Δ nll are what a few blocks of the calibration and of a dev text really lose. A "
        "model that loses more on the dev text than on its calibration is overfitted; ! marks a "
        "dev loss of more than twice the predicted one, and of more than two standard errors. Only "
        "an allocation of all components (a3-plus) predicts a loss."
    ]
