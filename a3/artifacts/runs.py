"""Rows with their files. Weights and results are checked against each other."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from a3.artifacts.places import SURGERY_PLACE, Place, SurgeryPlace
from a3.artifacts.protocols import (
    HARNESS_PROTOCOL,
    PERPLEXITY_PROTOCOL,
    SPEED_PROTOCOL,
    same_protocol,
    texts_scored,
)
from a3.core.dtypes import WIDTHS
from a3.core.errors import A3Error
from a3.core.records import Record
from a3.models.sizes import projection_weights

# Both models are scored by the same code.
CODE = "provenance.code"


@dataclass(frozen=True)
class Run:
    """A row with its files: weights (arch.json or approx.json) and one result per entry and task.

    A perplexity entry is a text, or a set of texts, whose result has the mean over them.
    """

    place: Place
    weights: Record
    perplexity: dict[str, Record]
    harness: dict[str, Record]
    # The loss on calibration and dev text, where it is measured and the row is compressed.
    fit: Record | None = None

    @property
    def records(self) -> list[Record]:
        """Every JSON file that the row was made from."""
        fit = [] if self.fit is None else [self.fit]
        return [self.weights, *self.perplexity.values(), *self.harness.values(), *fit]

    @cached_property
    def texts(self) -> dict[str, Record]:
        """The record of each text, by the names of entries; `kinds.web` is a text of a set."""
        return {
            name: one
            for entry, result in self.perplexity.items()
            for name, one in zip(self.texts_of(entry), texts_scored(result), strict=True)
        }

    def texts_of(self, entry: str) -> list[str]:
        """The names that `texts` has for an entry's texts: its own, or one for each of a set."""
        if not self.is_set(entry):
            return [entry]
        return [f"{entry}.{text['text']}" for text in self.perplexity[entry]["texts"]]

    def is_set(self, entry: str) -> bool:
        """Whether a perplexity entry is a set of texts."""
        return "texts" in self.perplexity[entry].data

    @property
    def size(self) -> dict[str, int]:
        """Parameters, KV bytes per token and FLOPs per token of this row's own weights."""
        return self.weights["size" if self.place.is_dense else "size.compressed"]

    def bits_per_weight(self, dense: "Run") -> float:
        """Bits of the layers' matrices, divided by their number of weights in the `dense` run."""
        if self.place.is_quantised:
            return self.weights["size.compressed.bits_per_weight"]
        weights = projection_weights(dense.weights.data)
        gone = dense.size["parameters"] - self.size["parameters"]
        dtype = self.weights.data.get("dtype", dense.weights["dtype"])
        return 8 * WIDTHS[dtype] * (1 - gone / weights)

    @property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """The record of each kind of Rxx that the solutions read; none for the dense model."""
        return {} if self.place.is_dense else self.weights["provenance.statistics"]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The entries of approx.json for each layer; none for the dense model."""
        return [] if self.place.is_dense else self.weights["layers"]


@dataclass(frozen=True)
class SurgeryRun(Run):
    """A row of the surgeries with its files."""

    place: SurgeryPlace


# The dense run of each model, and its compressed runs.
Groups: TypeAlias = list[tuple[Run, list[Run]]]
SurgeryGroups: TypeAlias = list[tuple[SurgeryRun, list[SurgeryRun]]]

R = TypeVar("R", bound=Run)


def read_runs(
    results: Path,
    experiments: Iterable[Mapping[str, str]],
    perplexity: Sequence[str],
    harness: Sequence[str],
    fit: bool = False,
) -> Groups:
    """Read each model's dense run and its compressed runs, in the order of `experiments`.

    With `fit` also the compressed rows' losses on calibration and dev text. Raises A3Error that
    names both files when a result was taken from other weights than the ones that now lie beside
    it, or when two results of one model were taken by different protocols.
    """
    places = [Place(**{key: str(value) for key, value in row.items()}) for row in experiments]
    return _read_places(Run, results, places, perplexity, harness, fit)


def read_surgeries(
    results: Path,
    surgeries: Iterable[Mapping[str, str]],
    perplexity: Sequence[str],
    harness: Sequence[str],
) -> SurgeryGroups:
    """Each model's dense run and its surgeries, as `read_runs` reads experiments."""
    places = [SurgeryPlace(**{key: row[key] for key in SURGERY_PLACE}) for row in surgeries]
    return _read_places(SurgeryRun, results, places, perplexity, harness)


def _read_places(
    sort: type[R],
    results: Path,
    all_places: Iterable[Place],
    perplexity: Sequence[str],
    harness: Sequence[str],
    fit: bool = False,
) -> list[tuple[R, list[R]]]:
    """Like `read_runs`, for a list of places and a class of runs."""
    models: dict[Place, dict[Place, None]] = {}
    for place in all_places:
        rows = models.setdefault(place.dense, {})
        if not place.is_dense:
            rows[place] = None
    groups = []
    for model, rows in models.items():
        dense = _read_run(sort, results, model, perplexity, harness)
        runs = [_read_run(sort, results, place, perplexity, harness, fit) for place in rows]
        for run in runs:
            _same_base(dense, run)
            for entry in perplexity:
                _same_texts(dense, run, entry)
            for text in dense.texts:
                same_protocol(dense.texts[text], run.texts[text], (*PERPLEXITY_PROTOCOL, CODE))
            for task in harness:
                same_protocol(dense.harness[task], run.harness[task], (*HARNESS_PROTOCOL, CODE))
        groups.append((dense, runs))
    return groups


def read_speeds(
    results: Path, experiments: Iterable[Mapping[str, str]], speed: Sequence[str]
) -> list[tuple[Place, str, Record]]:
    """The compressed rows' records of each entry `speed`, in order: place, entry's name, record.

    Raises A3Error if one was taken from other weights than those that now lie beside it, dense
    or compressed, two of one model and entry were taken by different protocols, or no row is of a
    compressed model.
    """
    places = [Place(**{key: str(value) for key, value in row.items()}) for row in experiments]
    if all(place.is_dense for place in places):
        raise A3Error(
            f"{results}: no compressed row among the experiments ("
            f"{', '.join(dict.fromkeys(place.model for place in places)) or 'none'}), but "
            "a speed table compares compressed models with their dense one. Add such a row."
        )
    found: list[tuple[Place, str, Record]] = []
    first: dict[tuple[str, str], Record] = {}
    for place in dict.fromkeys(place for place in places if not place.is_dense):
        for name in speed:
            record = Record.read(place.speed(results, name))
            check_speed(record, Record.read(place.weights(results)))
            same_protocol(first.setdefault((place.model, name), record), record, SPEED_PROTOCOL)
            found.append((place, name, record))
    return found


def check_speed(record: Record, weights: Record) -> None:
    """Raise A3Error unless a speed is of the weights in approx.json and of their dense model's."""
    found = [model["checkpoint_sha256"] for model in record["models"]]
    expected = [weights["base.weights_sha256"], weights["weights_sha256"]]
    if found != expected:
        raise A3Error(
            f"{record.path}: checkpoint_sha256 of its models is {found}, but {weights.path} says "
            f"{expected}: the speed is of other weights. Delete it and build it again."
        )


def _read_run(
    sort: type[R],
    results: Path,
    place: Place,
    perplexity: Sequence[str],
    harness: Sequence[str],
    fit: bool = False,
) -> R:
    """Read one row's files and check that each result belongs to the row's weights."""
    run = sort(
        place,
        Record.read(place.weights(results)),
        {text: Record.read(place.perplexity(results, text)) for text in perplexity},
        {task: Record.read(place.harness(results, task)) for task in harness},
        Record.read(place.fit(results)) if fit and not place.is_dense else None,
    )
    expected = run.weights["weights_sha256"]
    for record in run.records[1:]:
        if record["checkpoint_sha256"] != expected:
            raise A3Error(
                f"{record.path}: checkpoint_sha256 is {record['checkpoint_sha256']}, but "
                f"{run.weights.path} says weights_sha256 is {expected}: the result was taken from "
                "other weights. Delete the result and build it again."
            )
    return run


def _same_texts(dense: Run, run: Run, entry: str) -> None:
    """Refuse two results of one entry that are of other texts."""
    before, after = dense.texts_of(entry), run.texts_of(entry)
    if before != after:
        raise A3Error(
            f"{run.perplexity[entry].path} is of {', '.join(after)}, but "
            f"{dense.perplexity[entry].path} of {', '.join(before)}. Delete the stale one and "
            "build it again."
        )


def _same_base(dense: Run, run: Run) -> None:
    """Refuse a checkpoint that was made from other dense weights than the ones in its table."""
    found, expected = run.weights["base.weights_sha256"], dense.weights["weights_sha256"]
    if found != expected:
        raise A3Error(
            f"{run.weights.path}: base.weights_sha256 is {found}, but {dense.weights.path} says "
            f"weights_sha256 is {expected}: the checkpoint was made from another model. "
            "Delete the checkpoint's folder and build it again."
        )
