"""a3 verify: checks every artifact of a results folder against its record and its inputs.

Each kind of artifact has its own seal or hashes. This module reads them again and compares
statistics with their model and text, checkpoints with their model and statistics, and results with
their weights and texts.
"""

import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from a3.artifacts.eliminations import EliminationFile
from a3.artifacts.places import Place, collected_on, place_of
from a3.artifacts.protocols import texts_scored
from a3.artifacts.runs import check_speed
from a3.core.errors import A3Error
from a3.core.files import HIDDEN_SEAL, RECORDS, SEAL, sha256
from a3.core.progress import LOG, Bar
from a3.core.provenance import LIBRARIES, fingerprint
from a3.core.records import Record
from a3.models.checkpoint import check_file, recorded_files, refuse_added
from a3.models.inputs import hash_inputs, wheel_name, wheels_in
from a3.rxx.container import Rxx

AGAIN = "Delete it and build it again."

# Folders of compressed models.
CHECKPOINTS = ("checkpoints", "quantised", "healed")


class Verifier:
    """Checks one results folder and fills `problems`, `checked`, `missing` and `old`."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.problems: list[str] = []
        # Number of artifacts of each sort, and how many of them have no input left to compare with.
        self.checked: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        # Number of artifacts that were made by other code or library versions than the present
        # ones.
        self.old: Counter[str] = Counter()
        self.texts = self.hashes("texts/*/*.jsonl")
        self.items = self.hashes("items/*/items.jsonl")

    def run(self) -> None:
        """Check everything; raises A3Error if there is nothing to check."""
        jobs = list(self.artifacts())
        if not jobs:
            raise A3Error(f"{self.results}: no artifact of a3 in it. Name a folder of results.")
        with Bar(jobs, unit="file", desc="verify") as bar:
            for sort, path, check in bar:
                bar.set_postfix_str(str(path.relative_to(self.results)), refresh=False)
                self.checked[sort] += 1
                try:
                    check(path)
                except A3Error as error:
                    self.problems.append(str(error))

    def artifacts(self) -> Iterator[tuple[str, Path, Callable[[Path], object]]]:
        """Each artifact: its sort, its path and what checks it."""
        found = {
            "texts": ("texts/*/docs.json", self.text),
            "splits": ("texts/*/split.json", self.split),
            "items": ("items/*/items.json", self.item),
            "trained models": ("trained/*/train.json", self.trained),
            "models": ("models/*/arch.json", self.model),
            "statistics": ("rxx/**/*.safetensors", self.rxx),
            "losses by rank": ("losses/**/*.safetensors", self.losses),
            "allocations": ("allocations/**/*.json", self.allocation),
            "shards": ("shards/**/*.json", self.shard),
            "checkpoints": ("checkpoints/**/approx.json", self.checkpoint),
            "quantised checkpoints": ("quantised/**/approx.json", self.quantised),
            "trained checkpoints": ("healed/**/approx.json", self.healed),
            "exports": ("exports/**/export.json", self.export),
            "spectra": ("spectra/*/*.json", self.spectra),
            "frontiers": ("frontiers/*/*/*.json", self.frontier),
            "perplexities": ("eval/**/ppl/*.json", self.perplexity),
            "losses on calibration and dev text": ("eval/**/fit/*.json", self.fit),
            "harness results": ("eval/**/harness/*.json", self.harness),
            "generations": ("eval/**/generation/*.json", self.result),
            "speeds": ("eval/**/speed/*.json", self.speed),
        }
        seconds = ("rxx", "losses", "allocations", "frontiers", "eval", *CHECKPOINTS)
        timings = [path for top in seconds for path in self.paths(f"{top}/**/*timing.json")]
        for sort, (pattern, check) in found.items():
            for path in self.paths(pattern):
                if path not in timings:
                    yield sort, path, check
        for path in timings:
            yield "seconds", path, Record.read
        for top in ("models/*", *(f"{folder}/**" for folder in CHECKPOINTS)):
            folders = [path.parent for path in self.paths(f"{top}/config.json")]
            bare = [f for f in folders if not any((f / name).exists() for name in RECORDS)]
            self.missing["record of a model's folder"] += len(bare)

    def paths(self, pattern: str) -> list[Path]:
        """Files that match, except those that are still being written."""
        found = (path for path in self.results.glob(pattern) if path.is_file())
        return sorted(p for p in found if not any(name.startswith(".") for name in p.parts))

    def hashes(self, pattern: str) -> dict[str, Path]:
        """Files that match by their content hash."""
        return {sha256(path): path for path in self.paths(pattern)}

    # --- one artifact each ---

    def files(self, path: Path) -> Record:
        """A record that names files beside it; returns it."""
        record = self.record(path)
        for name, expected in record["files"].items():
            check_file(path.parent / name, expected, AGAIN)
        refuse_added(path.parent, record["files"])
        again = path.parent / HIDDEN_SEAL
        if again.exists() and Record.read(again)["files"] != record["files"]:
            raise A3Error(f"{again}: names other files than {path}. {AGAIN}")
        return record

    def record(self, path: Path) -> Record:
        """A sealed record; counts it if it is old."""
        record = Record.read(path)
        self.age(record["provenance"])
        return record

    def text(self, path: Path) -> None:
        """The documents of a text, and the files, the wheel or the texts that they came from."""
        record = self.files(path)
        self.source(record, "texts", record["provenance.text.source"])
        for name, expected in record["provenance"].get("inputs", {}).items():
            self.same(path, f"inputs {name}", expected, self.results / "texts" / name)

    def model(self, path: Path) -> None:
        """A dense model, and the files, the wheel or the model that it was made from."""
        record = self.files(path)
        source = record["provenance.source"]
        self.source(record, "models", source)
        if "train" in source:
            self.base(record, self.results / "trained" / path.parent.name)
        if "repeat_kv" in source:
            self.base(record, self.results / "models" / source["repeat_kv"])

    def base(self, record: Record, folder: Path) -> None:
        """The folder that a model was made from."""
        if not folder.exists():
            self.missing["model that a model was made from"] += 1
        elif recorded_files(folder) != record["provenance.base"]:
            raise A3Error(f"{record.path}: made from {folder}, which changed since. {AGAIN}")

    def source(self, record: Record, section: str, source: dict[str, Any]) -> None:
        """The wheels or the local files of a source, including files that were added later."""
        for wheel in wheels_in(source):
            name = wheel_name(wheel)
            self.same(record.path, f"wheel {name}", wheel["sha256"], self.results / "wheels" / name)
        if "path" not in source:
            return
        if not Path(source["path"]).exists():
            self.missing["local source"] += 1
            return
        expected, found = record["source_files"], hash_inputs(section, source)
        changed = [f"{name} is gone" for name in expected.keys() - found.keys()]
        changed += [f"{name} is new" for name in found.keys() - expected.keys()]
        both = expected.keys() & found.keys()
        changed += [f"{name} changed" for name in both if found[name] != expected[name]]
        if changed:
            raise A3Error(
                f"{record.path}: made from {source['path']}, where since then "
                f"{', '.join(sorted(changed))}. {AGAIN}"
            )

    def split(self, path: Path) -> None:
        """The splits of a text, and the documents that they were made of."""
        for name, expected in self.files(path)["inputs"].items():
            self.same(path, f"inputs {name}", expected, self.results / "texts" / name)

    def item(self, path: Path) -> None:
        """Items of the harness, and the text that they were made of."""
        self.known(self.files(path), "provenance.text_sha256", self.texts)

    def trained(self, path: Path) -> None:
        """A model that the workflow trained, and its training text."""
        self.known(self.files(path), "provenance.text_sha256", self.texts)

    def rxx(self, path: Path) -> None:
        """Statistics: every sum, and the model and text that they are of."""
        rxx = Rxx(path, path.stem)
        for key in rxx.names():
            rxx.sums(key)
        record = Record(path, rxx.record)
        self.age(rxx.record)
        self.made_of(record, "weights_sha256", collected_on(self.results, path))
        self.known(record, "text_sha256", self.texts)

    def losses(self, path: Path) -> None:
        """Losses by rank: every tensor, and the model and statistics that they are for."""
        found = EliminationFile(path)
        for key in found.tensors():
            found.tensor(key)
        record = Record(path, found.record)
        self.age(record["provenance"])
        model, calibration, _, _ = path.relative_to(self.results / "losses").parts
        self.made_of(record, "weights_sha256", Place(model))
        self.statistics(record, Place(model, calibration, **found.components))

    def allocation(self, path: Path) -> None:
        """Allocated ranks, and the model and statistics that they are for."""
        record, place = self.record(path), place_of(self.results, path)
        self.made_of(record, "weights_sha256", place.base)
        self.statistics(record, place)

    def shard(self, path: Path) -> None:
        """A shard of a checkpoint that a job left."""
        expected = Record.read(path)["content_sha256"]
        check_file(path.with_suffix(".safetensors"), expected, AGAIN)

    def checkpoint(self, path: Path) -> None:
        """A compressed model, and the model, statistics and ranks that it was made of."""
        record, place = self.files(path), place_of(self.results, path)
        self.made_of(record, "base.weights_sha256", place.base)
        self.statistics(record, place)
        allocation = place.allocation(self.results)
        if allocation and allocation.exists():
            for component, ranks in Record.read(allocation)["ranks"].items():
                if record["ranks"][component] != ranks:
                    raise A3Error(
                        f"{path}: ranks of {component} are {record['ranks'][component]}, but "
                        f"{allocation} has {ranks}. {AGAIN}"
                    )

    def quantised(self, path: Path) -> None:
        """A quantised model, and the model and statistics that it was made of."""
        record, place = self.files(path), place_of(self.results, path)
        self.made_of(record, "provenance.weights_sha256", place.base)
        self.statistics(record, place)

    def healed(self, path: Path) -> None:
        """A trained model, and the compressed model, the dense one and the text it was made of."""
        record, place = self.files(path), place_of(self.results, path)
        self.made_of(record, "provenance.weights_sha256", place.base)
        self.made_of(record, "provenance.teacher_sha256", place.dense)
        self.known(record, "provenance.text_sha256", self.texts)

    def export(self, path: Path) -> None:
        """An ordinary checkpoint, and the compressed one that it was made of."""
        record = self.files(path)
        self.made_of(record, "provenance.checkpoint_sha256", place_of(self.results, path))

    def spectra(self, path: Path) -> None:
        """Spectra, and the model and statistics that they were made of."""
        record = self.record(path)
        place = Place(path.parent.name, path.stem)
        self.made_of(record, "provenance.weights_sha256", place)
        self.statistics(record, place)

    def frontier(self, path: Path) -> None:
        """A frontier, and the model and statistics that it was made of."""
        record = self.record(path)
        place = Place(path.parent.parent.name, path.parent.name)
        self.made_of(record, "weights_sha256", place)
        self.statistics(record, place)

    def perplexity(self, path: Path) -> None:
        """A perplexity, and the weights and texts that it is of."""
        for record in texts_scored(self.result(path)):
            self.known(record, "text_sha256", self.texts)

    def fit(self, path: Path) -> None:
        """The loss on a few blocks, and the weights and texts that it is of."""
        record = self.result(path)
        for name in ("calibration", "dev"):
            if record[name] is not None:
                self.known(record, f"{name}.text_sha256", self.texts)

    def harness(self, path: Path) -> None:
        """A harness result, and the weights, items or files of a local task that it is of."""
        record = self.result(path)
        if record["items_sha256"] is not None:
            self.known(record, "items_sha256", self.items)
        for name, expected in record["task_files"].items():
            self.same(path, f"task_files {name}", expected, Path(name))

    def speed(self, path: Path) -> None:
        """A speed, and the weights, compressed and dense, that it is of."""
        record, weights = self.record(path), place_of(self.results, path).weights(self.results)
        if not weights.exists():
            self.missing["model or checkpoint"] += 1
            return
        check_speed(record, Record.read(weights))

    def result(self, path: Path) -> Record:
        """A result of evaluation, and the weights that it is of."""
        record = self.record(path)
        self.made_of(record, "checkpoint_sha256", place_of(self.results, path))
        return record

    # --- counterparts ---

    def made_of(self, record: Record, key: str, place: Place) -> None:
        """Raise A3Error if an artifact was made of other weights than those of a row."""
        base = place.weights(self.results)
        if not base.exists():
            self.missing["model or checkpoint"] += 1
            return
        expected = Record.read(base)["weights_sha256"]
        if record[key] != expected:
            raise A3Error(
                f"{record.path}: {key} is {record[key]}, but {base} says weights_sha256 is "
                f"{expected}. {AGAIN}"
            )

    def statistics(self, record: Record, place: Place) -> None:
        """Raise A3Error if an artifact was made of other statistics than those of its row."""
        for kind, said in record["provenance.statistics"].items():
            found = place.rxx(self.results, kind)
            if not found.exists():
                self.missing["statistics of a checkpoint or spectra"] += 1
            elif (seal := Rxx(found, kind).record[SEAL]) != said[SEAL]:
                raise A3Error(
                    f"{record.path}: made of {kind} whose {SEAL} is {said[SEAL]}, but that of "
                    f"{found} is {seal}. {AGAIN}"
                )

    def known(self, record: Record, key: str, known: dict[str, Path]) -> None:
        """Raise A3Error if the content that an artifact was made from is no longer there."""
        if not known:
            self.missing["text or items"] += 1
        elif record[key] not in known:
            raise A3Error(
                f"{record.path}: {key} is {record[key]}, expected that of one of the {len(known)} "
                f"files of texts and items in {self.results}: the text changed. {AGAIN}"
            )

    def same(self, path: Path, key: str, expected: str, other: Path) -> None:
        """Raise A3Error if a file that an artifact was made of has changed."""
        if not other.exists():
            self.missing["text or items"] += 1
        elif (found := sha256(other)) != expected:
            raise A3Error(f"{path}: {key} is {expected}, but that of {other} is {found}. {AGAIN}")

    def age(self, made: dict[str, Any]) -> None:
        """Count the artifact if other code or other library versions made it."""
        if "code" not in made:
            return
        if made["code"] != code_now(made["modules"]):
            self.old[f"code of {made['stage']}"] += 1
        for name in LIBRARIES:
            if made["libraries"].get(name) != importlib.metadata.version(name):
                self.old[f"{name} {made['libraries'].get(name)}"] += 1


def code_now(modules: list[str]) -> str | None:
    """The fingerprint of modules; None if one of them no longer exists."""
    try:
        return fingerprint(*modules)
    except ValueError:
        return None


def verify(results: Path) -> None:
    """Check all artifacts of a results folder, and print what was checked.

    Raises A3Error if anything is wrong, with one line for each problem.
    """
    verifier = Verifier(results)
    verifier.run()
    counts = ", ".join(f"{count} {sort}" for sort, count in verifier.checked.items())
    LOG.info(f"verify: {results}: checked {counts}")
    for what, count in (+verifier.missing).items():
        LOG.info(f"verify: not checked, since missing: {what} of {count} artifacts")
    for what, count in verifier.old.items():
        LOG.info(f"verify: note: {count} artifacts were made by other {what}")
    if verifier.problems:
        lines = "\n".join(verifier.problems)
        raise A3Error(f"{results}: {len(verifier.problems)} problems:\n{lines}")
    LOG.info("verify: no problems found")
