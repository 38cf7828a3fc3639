"""The paper's tables: what each published number measures, and which of our results match it.

`config/paper.yaml` has what all tables share. `config/paper/<table>.yaml` describes one table or
figure, and `config/paper/published/` has the published numbers. Read by the Snakefile at every
start, so nothing heavy is imported here.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from a3.artifacts.places import Place
from a3.core.errors import A3Error
from a3.core.files import load_yaml
from a3.core.records import timing
from a3.experiments.rows import kinds_of
from a3.solutions.modes import COMPONENTS, DENSE

# Sections of the workflow's configuration that paper.yaml adds to.
SECTIONS = ("models", "texts", "calibrations", "perplexity", "harness", "speed")

# Quantities whose results are read from entries of a config section.
SECTION_OF = {"perplexity": "perplexity", "delta": "perplexity", "accuracy": "harness"}

SPEED = ("prefill", "decode", "memory", "flops")


@dataclass(frozen=True)
class Row:
    """The keys that distinguish rows of one model, in the paper's terms.

    `setting` is the attention implementation of a runtime measurement, or the numbers of prompt and
    generated tokens of a decoding measurement. `baseline` is the dense model's tokens per second,
    with which decoding is compared.
    """

    component: str = "all"
    method: str = "a3"
    calibration: str = "slimpajama"
    ratio: str = "0"
    setting: str = ""
    baseline: str = ""


KEYS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Cell:
    """One number of a table: its model (by the paper's name or ours), row and measure.

    A measure is a quantity and a name: `perplexity wikitext2`, `seconds qk`.
    """

    model: str
    row: Row
    measure: str

    @property
    def quantity(self) -> str:
        """What is measured: perplexity, delta, accuracy, average, error, seconds, flops …"""
        return self.measure.partition(" ")[0]

    @property
    def name(self) -> str:
        """What it is measured on: a text, a task or a component."""
        return self.measure.partition(" ")[2]

    def agrees(self, where: dict[str, str]) -> bool:
        """Whether the model, measure and keys of the row are those given."""
        own = vars(self.row) | {"model": self.model, "measure": self.measure}
        return all(own[key] == value for key, value in where.items())


@dataclass(frozen=True)
class Wanted:
    """One of our numbers: the cell, the row of results, and the entry from which it is read.

    `timed` is the row whose speed record has the number: a compressed row, whose record also has
    the dense model's speed.
    """

    cell: Cell
    place: Place
    entry: str
    timed: Place

    def files(self, results: Path) -> list[Path]:
        """The results from which it is read; each model's dense results are needed as well."""
        quantity, place = self.cell.quantity, self.place
        if quantity in ("perplexity", "delta"):
            return [place.perplexity(results, self.entry)]
        if quantity == "accuracy":
            return [place.harness(results, self.entry)]
        if quantity == "seconds":
            return [timing(place.weights(results))]
        if quantity in SPEED:
            return [self.timed.speed(results, self.entry)]
        return [place.weights(results)]


class Table:
    """One table or figure of the paper: config/paper/<name>.yaml and its published figures."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.spec: dict[str, Any] = load_yaml(path)
        self.source = path.parent / "published" / self.spec["published"]
        self.published = dict(self._published())
        self.not_built: str | None = self.spec.get("not_built")
        self.notes: list[dict[str, Any]] = self.spec.get("notes", [])
        more = self.spec.get("more", {})
        self.measures = [self._measure(key) for key in self.spec["measures"]]
        self.measures += [(measure, {}) for measure in more.get("measures", [])]
        self.more = more.get("rows", {})

    def _measure(self, column: str) -> tuple[str, dict[str, str]]:
        """A measure of the csv, and the keys of rows that it says itself."""
        found = self.spec["measures"].get(column)
        if found is None:
            known = ", ".join(self.spec["measures"])
            raise A3Error(
                f"{self.source}: {column!r} is not a measure of the table {self.name}: {known}."
            )
        own = {"measure": found} if isinstance(found, str) else dict(found)
        return own.pop("measure"), own

    def _published(self) -> Iterator[tuple[Cell, float]]:
        """Every number of the csv; raises A3Error for duplicates."""
        spec, seen = self.spec, set()
        with self.source.open(newline="", encoding="utf-8") as stream:
            for line in csv.DictReader(stream):
                keys = spec.get("same", {}) | {k: line[c] for k, c in spec["columns"].items()}
                if keys.get("method") == "original":
                    keys["ratio"] = "0"
                if isinstance(spec["values"], dict):
                    ((name, value),) = spec["values"].items()
                    found = {line[name]: line[value]}
                else:
                    found = {column: line[column] for column in spec["values"]}
                for column, value in found.items():
                    measure, own = self._measure(column)
                    row = keys | own
                    cell = Cell(row.pop("model"), Row(**row), measure)
                    if cell in seen:
                        raise A3Error(f"{self.source}: {cell} is there twice.")
                    if value:
                        seen.add(cell)
                        yield cell, number(value)

    def rows_of(self, name: str | None) -> list[tuple[Row, list[str]]]:
        """Rows with measures: those published for a model, or for any if it has no name.

        Includes the table's further rows and measures, and the dense model unless its value is 0 or
        1 by definition.
        """
        found: dict[Row, dict[str, None]] = {}
        quantities = {measure.partition(" ")[0] for measure, _ in self.measures}
        cells = [cell for cell in self.published if name in (None, cell.model)]
        if not cells:
            return []
        rows = [cell.row if name else replace(cell.row, baseline="") for cell in cells]
        if quantities & {"perplexity", "accuracy"} and "0" not in {row.ratio for row in rows}:
            calibration = rows[0].calibration
            rows.insert(0, Row("original", "original", calibration))
        for values in product(*self.more.values()) if self.more else ():
            rows.append(replace(rows[-1], **dict(zip(self.more, values, strict=True))))
        for row in rows:
            for measure, own in self.measures:
                if vars(row) == vars(row) | own:
                    found.setdefault(row, {})[measure] = None
        return [(row, list(measures)) for row, measures in found.items()]


def number(text: str) -> float:
    """A number; minutes and seconds (46:55) become seconds."""
    minutes, colon, seconds = text.partition(":")
    return 60 * float(minutes) + float(seconds) if colon else float(text)


class Paper:
    """What all tables share, and the tables; `path` is config/paper.yaml."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec: dict[str, Any] = load_yaml(path)
        self.models: dict[str, dict[str, Any]] = self.spec["models"]
        self.tables = {p.stem: Table(p) for p in sorted(path.with_suffix("").glob("*.yaml"))}

    def join(self, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration with the paper's entries; those of the configuration come first."""
        own = {section: self.spec[section] for section in SECTIONS}
        models = self.models.items()
        own["models"] = {name: {"source": m["source"]} for name, m in models if "source" in m}
        return config | {s: entries | config.get(s, {}) for s, entries in own.items()}

    def model(self, name: str) -> dict[str, Any]:
        """A model's entry; for an unknown model raises A3Error, which lists the known ones."""
        if name not in self.models:
            raise A3Error(
                f"paper: {name!r} is not among the models of {self.path}: "
                f"{', '.join(self.models)}. Correct the name, or add its entry there."
            )
        return self.models[name]

    def protocol(self, model: str) -> dict[str, dict[str, str]]:
        """Entries of the configuration by the paper's names, for a model."""
        return self.spec["protocols"][self.model(model).get("protocol", "paper")]

    def why_not(self, table: Table, model: str | None, row: Row) -> str | None:
        """Why a row of a model (None: a model without an entry) cannot be built; None if it can."""
        if table.not_built or model is None:
            return table.not_built or "no such model in config/paper.yaml"
        entry = self.model(model)
        if "not_built" in entry:
            return entry["not_built"]
        modes = self.spec["methods"].get(row.method, "no such method in config/paper.yaml")
        if isinstance(modes, dict):
            modes = modes.get(entry["attention"], f"{row.method} is not for {entry['attention']}")
        return modes if isinstance(modes, str) else None

    def place(self, model: str, row: Row) -> Place:
        """The row of results that a row of a table is read from."""
        modes = self.spec["methods"][row.method]
        if isinstance(modes, dict):
            modes = modes[self.models[model]["attention"]]
        chosen = self.spec["components"][row.component]
        own = {c: mode if c in chosen else DENSE for c, mode in zip(COMPONENTS, modes, strict=True)}
        calibration = self.protocol(model)["calibrations"][row.calibration]
        place = Place(model, calibration, **own, ratio=row.ratio)
        return Place(model) if place.is_dense or row.ratio == "0" else place

    def wanted(self, table: Table, model: str) -> list[Wanted]:
        """Every number of a table that a model's group of rows can have; [] if there is none."""
        entry, protocol = self.model(model), self.protocol(model)
        found: list[Wanted] = []
        for row, measures in table.rows_of(entry.get("paper")):
            if self.why_not(table, model, row):
                continue
            place = self.place(model, row)
            for measure in own_measures(measures, protocol):
                cell = Cell(entry.get("paper", model), row, measure)
                if cell.quantity == "error" and getattr(place, cell.name) == DENSE:
                    continue
                if cell.quantity in ("delta", "seconds") and place.is_dense:
                    continue
                section = protocol.get(SECTION_OF.get(cell.quantity, ""), {})
                speed = protocol["speed"].get(row.setting, "") if cell.quantity in SPEED else ""
                if "paper" not in entry:
                    own = replace(row, calibration=protocol["calibrations"][row.calibration])
                    cell = replace(cell, row=own)
                found.append(Wanted(cell, place, section.get(cell.name, speed), place))
        compressed = [one for one in found if not one.place.is_dense]
        timed = {one.entry: one.place for one in reversed(compressed)}
        return [
            replace(one, timed=timed[one.entry])
            if one.cell.quantity in SPEED and one.place.is_dense
            else one
            for one in found
        ]

    def files(self, table: Table, model: str, results: Path) -> list[Path]:
        """The results from which a model's group of rows is made, including the dense ones."""
        found = {Place(model).weights(results): None}
        for one in self.wanted(table, model):
            if one.cell.quantity in SECTION_OF:
                found |= dict.fromkeys(replace(one, place=Place(model)).files(results))
            found |= dict.fromkeys((one.place.weights(results), *one.files(results)))
        return list(found)

    def models_of(self, table: Table, chosen: list[str]) -> list[str]:
        """The chosen models that have rows in a table."""
        return [name for name in chosen if self.wanted(table, name)]

    def kinds(self) -> list[str]:
        """Statistics that the paper's modes read, for all attention types."""
        modes = self.spec["methods"]["a3"].values()
        return kinds_of([dict(zip(COMPONENTS, m, strict=True)) | {"ratio": "0"} for m in modes])

    def rows(self, models: list[str]) -> list[dict[str, str]]:
        """The compressed rows of all tables, as experiments."""
        pairs = product(self.tables.values(), models)
        places = dict.fromkeys(w.place for t, model in pairs for w in self.wanted(t, model))
        return [dict(vars(place)) for place in places if not place.is_dense]


def own_measures(measures: list[str], protocol: dict[str, dict[str, str]]) -> list[str]:
    """The measures that a protocol has; for a quantity without any, the protocol's own measures."""
    found: dict[str, None] = {}
    for measure in measures:
        quantity, _, name = measure.partition(" ")
        section = protocol.get(SECTION_OF.get(quantity, ""), {name: ""})
        if name in section:
            found[measure] = None
        elif not any(f"{quantity} {other}" in measures for other in section):
            found |= dict.fromkeys(f"{quantity} {other}" for other in section)
    tasks = [measure for measure in found if measure.startswith("accuracy ")]
    return [m for m in found if not (m.startswith("average ") and len(tasks) < 2)]
