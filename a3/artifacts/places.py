"""Where runs leave their results, and reading them back: one `Run` is one row of a table."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from a3.solutions.modes import DENSE, NO_RATIO, SHARED
from a3.solutions.recipes import PLAIN

# Before the name of a metric: the items' values of a result are the mean of its logarithm.
LOG = "log_"


@dataclass(frozen=True)
class Place:
    """Names one row: a model and how it was compressed; by default not at all."""

    model: str
    calibration: str = DENSE
    qk: str = DENSE
    ov: str = DENSE
    mlp: str = DENSE
    ratio: str = "0"
    # What it was quantised by then (a3.solutions.recipes).
    quantise: str = PLAIN

    @property
    def is_dense(self) -> bool:
        """Whether this is the unmodified dense model."""
        return self.is_whole and not self.is_quantised

    @property
    def is_whole(self) -> bool:
        """Whether no component was made smaller."""
        return {self.qk, self.ov, self.mlp} == {DENSE}

    @property
    def is_quantised(self) -> bool:
        """Whether it is of low precision."""
        return self.quantise != PLAIN

    @property
    def modes(self) -> str:
        """The modes of QK, OV and MLP as paths spell them."""
        return f"{self.qk}+{self.ov}+{self.mlp}"

    @property
    def method(self) -> str:
        """What was done, as tables say it: the modes, and what it was quantised by."""
        done = [] if self.is_whole else [self.modes]
        return "+".join([*done, self.quantise] if self.is_quantised else done) or DENSE

    @property
    def nominal(self) -> float | None:
        """The one ratio of all compressed components; None where one has its own ratio or rank."""
        return None if "@" in self.modes or self.ratio == NO_RATIO else float(self.ratio)

    @property
    def base(self) -> "Place":
        """The row that a quantised one was made of."""
        return Place(self.model) if self.is_whole else replace(self, quantise=PLAIN)

    @property
    def _tail(self) -> Path:
        own = [self.calibration, self.modes, self.ratio]
        own += [self.quantise] if self.is_quantised else []
        return Path(self.model, *([DENSE] if self.is_dense else own))

    def weights(self, results: Path) -> Path:
        """The JSON file that describes the weights: arch.json, or approx.json of a checkpoint."""
        if self.is_dense:
            return results / "models" / self.model / "arch.json"
        folder = "quantised" if self.is_quantised else "checkpoints"
        return results / folder / self._tail / "approx.json"

    def perplexity(self, results: Path, text: str) -> Path:
        """The perplexity result on one text."""
        return results / "eval" / self._tail / "ppl" / f"{text}.json"

    def harness(self, results: Path, task: str) -> Path:
        """The harness result on one task."""
        return results / "eval" / self._tail / "harness" / f"{task}.json"

    def speed(self, results: Path, speed: str) -> Path:
        """The speed of a compressed run, and of the dense model beside it."""
        return results / "eval" / self._tail / "speed" / f"{speed}.json"

    def rxx(self, results: Path, kind: str) -> Path:
        """The statistics of one kind that the solutions read.

        A compressed model is quantised by its own.
        """
        folder = results / "rxx" / self.model / self.calibration
        if self.is_quantised and not self.is_whole:
            folder = folder / self.modes / self.ratio
        return folder / f"{kind}.safetensors"

    def allocation(self, results: Path) -> Path | None:
        """The ranks of each layer, where some mode has an allocated ratio."""
        shared = SHARED in self.modes and not self.is_quantised
        return results / "allocations" / f"{self._tail}.json" if shared else None

    def spectra(self, results: Path) -> Path:
        """The spectra of the model's functional matrices on the calibration."""
        return results / "spectra" / self.model / f"{self.calibration}.json"


@dataclass(frozen=True)
class SurgeryPlace(Place):
    """Names one row of the surgeries; `size` is as a3.solutions.surgeries.parse_size reads it."""

    mode: str = DENSE
    size: str = ""

    @property
    def is_dense(self) -> bool:
        """Whether this is the unmodified dense model."""
        return self.mode == DENSE

    @property
    def method(self) -> str:
        """The mode."""
        return self.mode

    @property
    def _tail(self) -> Path:
        own = (DENSE,) if self.is_dense else (self.calibration, self.mode, self.size)
        return Path(self.model, *own)

    def generation(self, results: Path) -> Path:
        """The path of the generated text."""
        return results / "eval" / self._tail / "generation" / "prompt.json"


def weights_of(results: Path, evaluation: Path) -> Path:
    """The JSON file that describes the weights of a result, by the result's path."""
    model, *method = evaluation.relative_to(results / "eval").parts[:-2]
    if method == [DENSE]:
        return results / "models" / model / "arch.json"
    folder = "checkpoints" if len(method) == 3 else "quantised"
    return results.joinpath(folder, model, *method, "approx.json")


# The columns that name a row.
PLACE = tuple(field.name for field in fields(Place))
