"""What one sees of a frontier (a3 frontier): a panel in the report, and a page of its own."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a3.artifacts.runs import Run
from a3.core.errors import A3Error
from a3.core.records import Record
from a3.report.labels import named
from a3.report.tables.frames import write_text
from a3.report.templates import template
from a3.solutions.modes import COMPONENTS, DENSE, PRESETS

# The quantities of a frontier, as they are called beside it.
QUANTITIES = {
    "parameters": "parameters",
    "cached_numbers": "KV cache",
    "flops": "FLOPs a token",
    "bytes": "file",
}

# Where the slider stands at first.
FIRST = 0.2

# Digits of losses in a page.
DIGITS = 4


@dataclass(frozen=True)
class Frontier:
    """A file of `a3 frontier`, and what it is of.

    `text` is what `a3 compress --text` takes for the calibration.
    """

    record: Record
    model: str
    calibration: str = ""
    text: str = "TEXT"

    @classmethod
    def read(cls, path: Path, texts: Mapping[str, str] | None = None) -> "Frontier":
        """That of MODEL/CALIBRATION/MODES.json; `texts` are those of the calibrations.

        Raises A3Error for a file that is missing or was changed.
        """
        model, calibration = path.parent.parent.name, path.parent.name
        return cls(Record.read(path), model, calibration, (texts or {}).get(calibration, "TEXT"))

    @property
    def modes(self) -> dict[str, str]:
        """The mode of each component."""
        return {one: self.record["modes"].get(one, DENSE) for one in COMPONENTS}

    @property
    def method(self) -> str:
        """The preset of its modes, or the modes."""
        return named("+".join(self.modes.values()))

    @property
    def title(self) -> str:
        """What it is of, in a line."""
        return ", ".join(filter(None, (self.model, self.calibration, self.method)))

    def check(self, dense: Run) -> None:
        """Raise A3Error if it was made of other weights than the dense model's."""
        found, expected = self.record["weights_sha256"], dense.weights["weights_sha256"]
        if found != expected:
            raise A3Error(
                f"{self.record.path}: made of weights whose hash is {found}, but "
                f"{dense.weights.path} says {expected}. Delete it and build it again."
            )

    def command(self, ratio: float) -> str:
        """The command that makes the model of a ratio; "" for the dense one."""
        if not ratio:
            return ""
        words = ["a3", "compress", self.model]
        if self.method in PRESETS:
            words += ["--preset", self.method]
        else:
            words += [word for one, mode in self.modes.items() for word in (f"--{one}", mode)]
        words += ["--ratio", f"{ratio:g}", "--text", self.text]
        made = [one for one in self.record["provenance.statistics"].values() if "tokens" in one]
        if made:
            # Gradients are of some of the blocks only.
            used = max(made, key=lambda one: one["tokens"])
            words += ["--tokens", str(used["tokens"]), "--block-length", str(used["block_length"])]
            words += ["--seed", str(used["seed"])] if used["seed"] else []
        return shlex.join([*words, "-o", "small"])

    def panel(self) -> dict[str, Any]:
        """What the panel shows, for its template and its script."""
        points = self.record["points"]
        first = min(range(len(points)), key=lambda i: abs(points[i]["ratio"] - FIRST))
        return {
            "title": self.title,
            "first": first,
            "ratio": points[first]["ratio"],
            "last": len(points) - 1,
            "blocks": self.record["blocks"],
            "data": {
                "dense": self.record["dense"],
                "quantities": list(QUANTITIES.items()),
                "components": [one for one in COMPONENTS if one in self.record["dense.ranks"]],
                "points": [self.point(point) for point in points],
                "measured": [self.measured(one) for one in self.record["measured"]],
                "checks": [self.measured(one) for one in self.record["checks"]],
            },
        }

    def point(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """One ratio: as in the record, rounded, and its command.

        The parts are those of the corrected loss, shared out as the predicted one.
        """
        factor = point["corrected"] / point["predicted"] if point["predicted"] else 1.0
        parts = {
            one: [short(factor * loss) for loss in losses] for one, losses in point["parts"].items()
        }
        ranks = {one: [round(rank, 1) for rank in own] for one, own in point["ranks"].items()}
        losses = {key: short(point[key]) for key in ("predicted", "corrected")}
        kept = {key: point[key] for key in ("ratio", "amounts")}
        return {**kept, **losses, "ranks": ranks, "parts": parts} | {
            "command": self.command(point["ratio"])
        }

    def measured(self, one: Mapping[str, Any]) -> dict[str, Any]:
        """One measured ratio: its sizes, loss and standard error."""
        (amounts,) = (x["amounts"] for x in self.record["points"] if x["ratio"] == one["ratio"])
        said = {"increase": short(one["increase"]), "stderr": short(one["stderr"] or 0.0)}
        return {"ratio": one["ratio"], "amounts": amounts} | said


def short(loss: float) -> float:
    """A loss with the digits that a page needs."""
    return float(f"{loss:.{DIGITS}g}")


def read_frontiers(
    paths: Sequence[Path], dense: Sequence[Run], config: Mapping[str, Any]
) -> list[Frontier]:
    """The frontiers of the files MODEL/CALIBRATION/MODES.json of these models, in their order.

    `config` names the calibrations' texts. Raises A3Error as `read` and `check` do.
    """
    texts = {name: entry["text"] for name, entry in config.get("calibrations", {}).items()}
    found = []
    for one in dense:
        for path in paths:
            if path.parent.parent.name == one.place.model:
                found.append(Frontier.read(path, texts))
                found[-1].check(one)
    return found


def frontier_page(path: Path, model: str, text: str, out: Path) -> None:
    """Write a self-contained page of the frontier in a file.

    `model` and `text` are what `a3 compress` takes. Raises A3Error as Frontier.read does.
    """
    found = Frontier(Record.read(path), model, text=text)
    page = template("frontiers.page.html.jinja").render(frontier=found.panel())
    write_text(out, page)
