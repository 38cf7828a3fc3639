"""Where runs leave their results, and reading them back: one `Run` is one row of a table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from a3.dtypes import WIDTHS
from a3.errors import A3Error
from a3.files import read_record
from a3.recipes import PLAIN
from a3.sizes import projection_weights
from a3.solutions.modes import DENSE, NO_RATIO, SHARED

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
# Before the name of a metric: the items' values of a result are the mean of its logarithm.
LOG = "log_"
# Statistics that spectra are made of.
SPECTRA_KINDS = ("q_blocks", "k_blocks", "v_blocks", "down_diagonal")
# Both models are scored by the same code.
CODE = "provenance.code"


@dataclass(frozen=True)
class Record:
    """A JSON file and its content; `record["size.dense"]` looks a nested key up."""

    path: Path
    data: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        """The value at a dotted key; raises A3Error that names the file and the key."""
        value: Any = self.data
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise A3Error(
                    f"{self.path}: expected the key {key}, found none. "
                    "Delete the file and build it again."
                )
            value = value[part]
        return value

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read a sealed record; A3Error, with the file, when it is missing, broken or changed."""
        return cls(path, read_record(path))


@dataclass(frozen=True)
class Place:
    """Names one row: a model and how it was compressed; by default not at all."""

    model: str
    calibration: str = DENSE
    qk: str = DENSE
    ov: str = DENSE
    mlp: str = DENSE
    ratio: str = "0"
    # What it was quantised by then (a3.recipes).
    quantise: str = PLAIN

    @property
    def is_dense(self) -> bool:
        """Whether this is the model as it came."""
        return self.is_whole and not self.is_quantised

    @property
    def is_whole(self) -> bool:
        """Whether no part was made smaller."""
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
        """The one ratio of all compressed parts; None where some part has a size of its own."""
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
        kind = "quantised" if self.is_quantised else "checkpoints"
        return results / kind / self._tail / "approx.json"

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
        """The ranks of each layer, where some mode shares out a ratio."""
        shared = SHARED in self.modes and not self.is_quantised
        return results / "allocations" / f"{self._tail}.json" if shared else None

    def spectra(self, results: Path) -> Path:
        """The spectra of the model's functional matrices on the calibration."""
        return results / "spectra" / self.model / f"{self.calibration}.json"


@dataclass(frozen=True)
class SurgeryPlace(Place):
    """Names one row of the surgeries; `size` is as a3.surgery.parse_size reads it."""

    mode: str = DENSE
    size: str = ""

    @property
    def is_dense(self) -> bool:
        """Whether this is the model as it came."""
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
        """What the model says to the prompt."""
        return results / "eval" / self._tail / "generation" / "prompt.json"


def weights_of(results: Path, evaluation: Path) -> Path:
    """The JSON file that describes the weights of a result, by the result's path."""
    model, *method = evaluation.relative_to(results / "eval").parts[:-2]
    if method == [DENSE]:
        return results / "models" / model / "arch.json"
    kind = "checkpoints" if len(method) == 3 else "quantised"
    return results.joinpath(kind, model, *method, "approx.json")


@dataclass(frozen=True)
class Run:
    """A row with its files: weights (arch.json or approx.json) and one result per text and task."""

    place: Place
    weights: Record
    perplexity: dict[str, Record]
    harness: dict[str, Record]

    @property
    def size(self) -> dict[str, int]:
        """Parameters, KV bytes per token and FLOPs per token of this row's own weights."""
        return self.weights["size" if self.place.is_dense else "size.compressed"]

    def bits_per_weight(self, dense: "Run") -> float:
        """Bits of the layers' matrices for each weight that the `dense` run has in them."""
        if self.place.is_quantised:
            return self.weights["size.compressed.bits_per_weight"]
        weights = projection_weights(dense.weights.data)
        gone = dense.size["parameters"] - self.size["parameters"]
        return 8 * WIDTHS[dense.weights["dtype"]] * (1 - gone / weights)

    @property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """The record of each kind of Rxx that the solutions read; none for the dense model."""
        return {} if self.place.is_dense else self.weights["provenance.statistics"]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """What approx.json says of each layer; none for the dense model."""
        return [] if self.place.is_dense else self.weights["layers"]


def timing(path: Path) -> Path:
    """The seconds beside a result: X.json has X.timing.json, approx.json has timing.json."""
    if path.name == "approx.json":
        return path.with_name("timing.json")
    return path.with_name(f"{path.stem}.timing.json")


def read_runs(
    results: Path,
    experiments: Iterable[Mapping[str, str]],
    perplexity: Sequence[str],
    harness: Sequence[str],
) -> list[tuple[Run, list[Run]]]:
    """Read each model's dense run and its compressed runs, in the order of `experiments`.

    Raises A3Error that names both files when a result was taken from other weights than the ones
    that now lie beside it, or when two results of one model were taken by different protocols.
    """
    places = [Place(**{key: str(value) for key, value in row.items()}) for row in experiments]
    return read_places(results, places, perplexity, harness)


def read_places(
    results: Path, all_places: Iterable[Place], perplexity: Sequence[str], harness: Sequence[str]
) -> list[tuple[Run, list[Run]]]:
    """As `read_runs`, of places."""
    models: dict[str, dict[Place, None]] = {}
    for place in all_places:
        models.setdefault(place.model, {})
        if not place.is_dense:
            models[place.model][place] = None
    groups = []
    for model, places in models.items():
        dense = _read_run(results, Place(model), perplexity, harness)
        runs = [_read_run(results, place, perplexity, harness) for place in places]
        for run in runs:
            _same_base(dense, run)
            for text in perplexity:
                same_protocol(
                    dense.perplexity[text], run.perplexity[text], (*PERPLEXITY_PROTOCOL, CODE)
                )
            for task in harness:
                same_protocol(dense.harness[task], run.harness[task], (*HARNESS_PROTOCOL, CODE))
        groups.append((dense, runs))
    return groups


def read_speeds(
    results: Path, experiments: Iterable[Mapping[str, str]], speed: Sequence[str]
) -> list[tuple[Place, str, Record]]:
    """The compressed rows' records of each entry `speed`, in order: place, entry's name, record.

    Raises A3Error where one was taken from other weights than those that now lie beside it, dense
    or compressed, or two of one model and entry were taken by different protocols.
    """
    places = [Place(**{key: str(value) for key, value in row.items()}) for row in experiments]
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
    results: Path, place: Place, perplexity: Sequence[str], harness: Sequence[str]
) -> Run:
    """Read one row's files and hold each result to the weights it was taken from."""
    run = Run(
        place,
        Record.read(place.weights(results)),
        {text: Record.read(place.perplexity(results, text)) for text in perplexity},
        {task: Record.read(place.harness(results, task)) for task in harness},
    )
    expected = run.weights["weights_sha256"]
    for record in (*run.perplexity.values(), *run.harness.values()):
        if record["checkpoint_sha256"] != expected:
            raise A3Error(
                f"{record.path}: checkpoint_sha256 is {record['checkpoint_sha256']}, but "
                f"{run.weights.path} says weights_sha256 is {expected}: the result was taken from "
                "other weights. Delete the result and build it again."
            )
    return run


def _same_base(dense: Run, run: Run) -> None:
    """Refuse a checkpoint that was made from other dense weights than the ones in its table."""
    found, expected = run.weights["base.weights_sha256"], dense.weights["weights_sha256"]
    if found != expected:
        raise A3Error(
            f"{run.weights.path}: base.weights_sha256 is {found}, but {dense.weights.path} says "
            f"weights_sha256 is {expected}: the checkpoint was made from another model. "
            "Delete the checkpoint's folder and build it again."
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
