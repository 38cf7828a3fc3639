"""Names of rows and paths of their files. Only this module writes and parses paths of results.

A row is written as MODEL/dense or MODEL/CALIBRATION/QK+OV+MLP/RATIO, with /QUANTISATION added if it
is quantised and /heal-ENTRY if it is trained, or as MODEL/CALIBRATION/MODE/SIZE for a surgery.
`Place.format` writes it, `Place.parse` reads it back.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

from a3.core.errors import A3Error
from a3.solutions.modes import COMPONENTS, DENSE, NO_RATIO, SHARED, eliminating
from a3.solutions.recipes import PLAIN
from a3.solutions.target import is_target

# Folder for the statistics of shards, inside the folder of a calibration's statistics.
SHARDS = "shards"

# How paths and methods begin that say how a row was trained; no quantisation is written so.
HEALED_BY = "heal-"


@dataclass(frozen=True)
class Place:
    """Names one row: a model and how it was compressed; by default the dense model."""

    model: str
    calibration: str = DENSE
    qk: str = DENSE
    ov: str = DENSE
    mlp: str = DENSE
    ratio: str = "0"
    # How the compressed model was then quantised (a3.solutions.recipes).
    quantise: str = PLAIN
    # The entry of the configuration by which the compressed model was then trained.
    heal: str = PLAIN

    @staticmethod
    def parse(text: str) -> "Place":
        """The row that `format` writes as this text; raises A3Error for any other text."""
        match text.split("/"):
            case [model, how] if how == DENSE:
                return Place(model)
            case [model, calibration, modes, ratio, *then] if "+" in modes:
                if modes.count("+") == len(COMPONENTS) - 1 and len(then) < 2:
                    qk, ov, mlp = modes.split("+")
                    made = Place(model, calibration, qk, ov, mlp, ratio)
                    # A quantisation names its method after a +.
                    if then and then[0].startswith(HEALED_BY) and "+" not in then[0]:
                        return replace(made, heal=then[0].removeprefix(HEALED_BY))
                    return replace(made, quantise=then[0]) if then else made
            case [model, calibration, mode, size]:
                return SurgeryPlace(model, calibration, mode=mode, size=size)
        raise A3Error(
            f"{text}: expected MODEL/{DENSE}, MODEL/CALIBRATION/QK+OV+MLP/RATIO, the same and "
            "/QUANTISATION or /heal-ENTRY, or MODEL/CALIBRATION/MODE/SIZE of a surgery."
        )

    def format(self) -> str:
        """The row as it is written in paths."""
        return "/".join((self.model, *self._how))

    @property
    def _how(self) -> tuple[str, ...]:
        """The rest of the path, after the model."""
        if self.is_dense:
            return (DENSE,)
        own = (self.calibration, self.modes, self.ratio)
        if self.is_healed:
            return (*own, f"{HEALED_BY}{self.heal}")
        return (*own, self.quantise) if self.is_quantised else own

    @property
    def names(self) -> dict[str, str]:
        """The columns that name this row in a table."""
        return {key: getattr(self, key) for key in PLACE}

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
        """Whether the row is quantised."""
        return self.quantise != PLAIN

    @property
    def is_healed(self) -> bool:
        """Whether the compressed model was trained."""
        return self.heal != PLAIN

    @property
    def modes(self) -> str:
        """The modes of QK, OV and MLP as they are written in paths."""
        return f"{self.qk}+{self.ov}+{self.mlp}"

    @property
    def method(self) -> str:
        """The method as shown in tables: the modes, and the training or quantisation after them."""
        done = [] if self.is_whole else [self.modes]
        if self.is_healed:
            done.append(f"{HEALED_BY}{self.heal}")
        return "+".join([*done, self.quantise] if self.is_quantised else done) or DENSE

    @property
    def nominal(self) -> float | None:
        """The one ratio of all compressed components; None if one has its own ratio or rank, or
        targets stand in its place.
        """
        own = "@" in self.modes or self.ratio == NO_RATIO or is_target(self.ratio)
        return None if own else float(self.ratio)

    @property
    def dense(self) -> Self:
        """The row of the unmodified model."""
        return type(self)(self.model)

    @property
    def base(self) -> Self:
        """The row whose weights this one was made from."""
        compressed = (self.is_quantised or self.is_healed) and not self.is_whole
        return replace(self, quantise=PLAIN, heal=PLAIN) if compressed else self.dense

    def weights(self, results: Path) -> Path:
        """The JSON file that describes the weights: arch.json, or approx.json of a checkpoint."""
        if self.is_dense:
            return results / "models" / self.model / "arch.json"
        folder = "quantised" if self.is_quantised else "checkpoints"
        if self.is_healed:
            folder = "healed"
        return results / folder / self.format() / "approx.json"

    def perplexity(self, results: Path, text: str) -> Path:
        """The perplexity result on one text."""
        return results / "eval" / self.format() / "ppl" / f"{text}.json"

    def fit(self, results: Path) -> Path:
        """The loss of a compressed row on calibration and dev text, beside the predicted one."""
        return results / "eval" / self.format() / "fit" / "blocks.json"

    def harness(self, results: Path, task: str) -> Path:
        """The harness result on one task."""
        return results / "eval" / self.format() / "harness" / f"{task}.json"

    def speed(self, results: Path, speed: str) -> Path:
        """The speed of a compressed run, and of the dense model beside it."""
        return results / "eval" / self.format() / "speed" / f"{speed}.json"

    def rxx(self, results: Path, kind: str) -> Path:
        """The statistics of one kind that the solutions read.

        Quantising a compressed model needs statistics of that model, not of the dense one.
        """
        own = self.is_quantised and not self.is_whole
        folder = self.base.format() if own else f"{self.model}/{self.calibration}"
        return results / "rxx" / folder / f"{kind}.safetensors"

    def losses(self, results: Path) -> Path | None:
        """The folder of the losses by rank, of all shards; needed if some mode eliminates."""
        if self.is_quantised or self.is_healed or not (found := eliminating(self.names)):
            return None
        modes = "+".join(found.get(component, DENSE) for component in COMPONENTS)
        return results / "losses" / self.model / self.calibration / modes

    def allocation(self, results: Path) -> Path | None:
        """The ranks of each layer; needed if some mode has an allocated ratio."""
        shared = SHARED in self.modes and not self.is_quantised and not self.is_healed
        return results / "allocations" / f"{self.format()}.json" if shared else None

    def frontier(self, results: Path) -> Path | None:
        """What the model loses at every size by these modes, if ranks of all are allocated."""
        used = [mode for mode in (self.qk, self.ov, self.mlp) if mode != DENSE]
        if not used or not all(mode.endswith(SHARED) for mode in used):
            return None
        return results / "frontiers" / self.model / self.calibration / f"{self.modes}.json"

    def spectra(self, results: Path) -> Path:
        """The spectra of the model's functional matrices on the calibration."""
        return results / "spectra" / self.model / f"{self.calibration}.json"


# The columns that name a row.
PLACE = tuple(field.name for field in fields(Place))


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
    def names(self) -> dict[str, str]:
        """The columns that name this row in a table."""
        return {key: getattr(self, key) for key in SURGERY_PLACE}

    @property
    def _how(self) -> tuple[str, ...]:
        return (DENSE,) if self.is_dense else (self.calibration, self.mode, self.size)

    def generation(self, results: Path) -> Path:
        """The path of the generated text."""
        return results / "eval" / self.format() / "generation" / "prompt.json"


# The columns that name a row of the surgeries.
SURGERY_PLACE = ("model", "calibration", "mode", "size")

# Number of path components after those of the row, for each top-level folder.
AFTER_ROW = {"checkpoints": 1, "quantised": 1, "healed": 1, "exports": 2, "eval": 2}


def place_of(results: Path, path: Path) -> Place:
    """The row of an allocation, checkpoint, export or result, by its path in a results folder.

    Raises A3Error if the path names none.
    """
    top, *names = path.relative_to(results).parts
    if top == "allocations":
        return Place.parse("/".join(names).removesuffix(".json"))
    return Place.parse("/".join(names[: -AFTER_ROW[top]]))


def collected_on(results: Path, statistics: Path) -> Place:
    """The row of the model that statistics were collected on, by their path.

    Raises A3Error if the path names none.
    """
    model, calibration, *own = statistics.relative_to(results / "rxx").parts[:-1]
    if not own or own[0] == SHARDS:
        return Place(model)
    return Place.parse("/".join((model, calibration, *own)))
