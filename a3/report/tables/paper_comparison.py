"""Stage paper: compares our results with the published numbers.

A group of rows (`<model>.csv`) has one number per line. The comparison uses every existing group,
so a table of the paper grows as models are built.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from a3.core.errors import A3Error
from a3.experiments.paper import KEYS, Cell, Paper, Row, Table
from a3.report.tables.frames import read_csv


def read_definition(path: Path) -> tuple[Paper, Table]:
    """A table of the paper by config/paper/<table>.yaml; raises A3Error if there is none."""
    shared = path.resolve().parent / f"../{path.resolve().parent.name}.yaml"
    if not path.is_file() or not shared.is_file():
        raise A3Error(
            f"{path}: no such file, or no {shared.name} beside its folder, which defines what all "
            "tables share. Name a file such as config/paper/table1.yaml."
        )
    paper = Paper(shared.resolve())
    if path.stem not in paper.tables:
        raise A3Error(f"{path}: no such table. Tables: {', '.join(paper.tables)}.")
    return paper, paper.tables[path.stem]


# --- ours beside the published figures ---
@dataclass(frozen=True)
class Compared:
    """One figure of the comparison."""

    cell: Cell
    published: float | None
    ours: float | None
    stderr: float | None
    # Numbers of the footnotes, and whether a difference means anything.
    notes: tuple[int, ...]
    differs: bool
    # Why it is not there, or the target that builds it.
    why_not: str | None
    target: str | None

    @property
    def difference(self) -> float | None:
        """Ours less the published figure."""
        if self.ours is None or self.published is None or not self.differs:
            return None
        return self.ours - self.published


def compared(paper: Paper, table: Table, out: Path) -> list[Compared]:
    """Every published figure and every one of ours, by model: the paper's models first."""
    names = {entry.get("paper", name): name for name, entry in paper.models.items()}
    ours = read_groups(paper, out)
    models = dict.fromkeys(cell.model for cell in (*table.published, *ours))
    found = []
    for model in models:
        cells = dict.fromkeys(c for c in (*ours, *table.published) if c.model == model)
        for cell in cells:
            published = table.published.get(cell)
            notes = () if published is None else notes_of(table, cell)
            value, error = ours.get(cell, (None, None))
            why_not = paper.why_not(table, names.get(model), cell.row)
            if cell in ours and value is None:
                why_not = "not measured on this device"
            target = None if why_not else str(out / f"{names[model]}.csv")
            differs = all(table.notes[i - 1].get("differs", True) for i in notes)
            found.append(Compared(cell, published, value, error, notes, differs, why_not, target))
    return found


def notes_of(table: Table, cell: Cell) -> tuple[int, ...]:
    """Numbers, from 1 on, of the footnotes of one published figure."""
    notes = enumerate(table.notes, 1)
    return tuple(i for i, note in notes if note["where"] and cell.agrees(note["where"]))


def read_groups(paper: Paper, folder: Path) -> dict[Cell, tuple[float | None, float | None]]:
    """Our figures and their standard errors in every group of rows of a folder.

    Raises A3Error for a file that is not one.
    """
    found = {}
    for path in (folder / f"{name}.csv" for name in paper.models):
        if not path.exists():
            continue
        lines = read_csv(path, ("model", "measure", *KEYS))
        if missing := {"model", "measure", "ours", "stderr", *KEYS} - set(lines):
            raise A3Error(f"{path}: no column {min(missing)}. Delete it and build it again.")
        lines[["model", "measure", *KEYS]] = lines[["model", "measure", *KEYS]].fillna("")
        for _, line in lines.iterrows():
            cell = Cell(line["model"], Row(**{key: line[key] for key in KEYS}), line["measure"])
            ours, error = (None if pd.isna(line[k]) else line[k] for k in ("ours", "stderr"))
            found[cell] = ours, error
    return found


def as_line(table: Table, one: Compared) -> dict[str, Any]:
    """One line of comparison.csv."""
    return {
        "model": one.cell.model,
        **vars(one.cell.row),
        "measure": one.cell.measure,
        "published": one.published,
        "ours": one.ours,
        "stderr": one.stderr,
        "difference": one.difference,
        "not_built": one.why_not if one.ours is None else None,
        "target": one.target if one.ours is None else None,
        "notes": " ".join(table.notes[i - 1]["says"] for i in one.notes),
    }


def measures_of(table: Table, group: list[Compared]) -> list[str]:
    """The measures of a model's figures, in the order of the table."""
    order = [measure for measure, _ in table.measures]
    found = dict.fromkeys(one.cell.measure for one in group)
    return sorted(found, key=lambda m: order.index(m) if m in order else -1)


def telling(group: list[Compared]) -> list[str]:
    """The keys that tell rows apart; the method where nothing does, or one of them is dense."""
    rows = [one.cell.row for one in group]
    own = [row for row in rows if row.method != "original"]
    found = [key for key in KEYS if len({getattr(row, key) for row in own}) > 1]
    method = not found or len(own) < len(rows)
    return [key for key in KEYS if key in found or (key == "method" and method)]
