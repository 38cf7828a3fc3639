"""How well a compressed model fits text: records of its loss on calibration and dev text.

Such a record has the loss over the dense model's, in nats a token: under `predicted` what the
allocation expects, under `calibration` and `dev` what a3.stages.evaluate.fit measured on a few
blocks of these texts. Each is None if it is not known, as is the standard error of one block. Under
`held_out`, if ranks were chosen by a largest loss, is the loss by which they were (a3.promise).
"""

from collections.abc import Mapping
from typing import Any

# A model is called overfitted if unseen text loses more than so many times the predicted loss, and
# more than so many of its standard errors.
FAR, SURE = 2.0, 2.0

Loss = Mapping[str, Any]


def is_overfitted(loss: Loss) -> bool:
    """Whether the dev text loses more than FAR times what was predicted, if both are known."""
    dev = loss["dev"]
    if loss["predicted"] is None or dev is None or dev["stderr"] is None:
        return False
    return bool(dev["increase"] > max(FAR * loss["predicted"], SURE * dev["stderr"]))


def said_of(loss: Loss) -> str:
    """The losses in a line: "predicted 0.160, calibration 0.172 ± 0.010 (4 blocks), dev text …"."""
    found = [] if loss["predicted"] is None else [f"predicted {loss['predicted']:.3f}"]
    names = {"calibration": "calibration", "held_out": "held-out text", "dev": "dev text"}
    for key, name in names.items():
        if said := loss.get(key):
            blocks = f"{said['blocks']} block{'s' if said['blocks'] > 1 else ''}"
            error = "" if said["stderr"] is None else f" ± {said['stderr']:.3f}"
            found.append(f"{name} {said['increase']:.3f}{error} ({blocks})")
    return ", ".join(found)


def warning_of(loss: Loss) -> str | None:
    """What to say if a model is overfitted; else None."""
    if not is_overfitted(loss):
        return None
    return (
        f"the dev text loses {loss['dev']['increase']:.3f} nats a token, more than twice the "
        f"predicted {loss['predicted']:.3f}: the model is overfitted to its calibration. "
        "Calibrate on more tokens, or on text of more kinds."
    )
