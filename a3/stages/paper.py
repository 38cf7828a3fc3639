"""Stage paper: one model's group of rows from its results, and ours beside the published figures.

A group of rows (`<model>.csv`) has one figure a line. The comparison takes every group that is
there, so that a table of the paper grows as models are built.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from a3.errors import A3Error
from a3.files import whole_file
from a3.paper import KEYS, SPEED, Cell, Paper, Row, Table, Wanted
from a3.results import (
    HARNESS_PROTOCOL,
    PERPLEXITY_PROTOCOL,
    SPEED_PROTOCOL,
    Place,
    Record,
    Run,
    check_speed,
    read_runs,
    timing,
)
from a3.stages.figures import COLOURS, GREY, STYLE

# Decimals of each kind of figure; the rest have two.
DECIMALS = {
    "accuracy": 3,
    "average": 3,
    "error": 4,
    "seconds": 1,
    "prefill": 0,
    "decode": 1,
    "memory": 0,
}
NOT_BUILT = "not built"
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
PROTOCOL = {
    "perplexity": PERPLEXITY_PROTOCOL,
    "delta": PERPLEXITY_PROTOCOL,
    "accuracy": HARNESS_PROTOCOL,
} | dict.fromkeys(SPEED, (*SPEED_PROTOCOL, "device_name"))


def read_table(path: Path) -> tuple[Paper, Table]:
    """A table of the paper by config/paper/<table>.yaml; raises A3Error where there is none."""
    paper = Paper(path.resolve().parent.with_suffix(".yaml"))
    if path.stem not in paper.tables:
        raise A3Error(f"{path}: no such table. Tables: {', '.join(paper.tables)}.")
    return paper, paper.tables[path.stem]


# --- one model's rows ---


def build_rows(path: Path, model: str, results: Path, out: Path) -> None:
    """Write a model's figures for a table of the paper to `out`, a .csv file, one a line.

    With what they were read from and by what protocol. Raises A3Error as `read_runs` does, and
    where the model has no rows in this table.
    """
    paper, table = read_table(path)
    wanted = paper.wanted(table, model)
    if not wanted:
        raise A3Error(f"{path}: has no rows that can be built of {model!r}. Name another model.")
    runs = runs_of(wanted, results)
    dense = runs[Place(model)]
    lines = [line(dense, runs[one.place], one, results) for one in wanted]
    for one in wanted:
        if one.cell.kind == "average":
            own = [x for x in lines if x["measure"].startswith("accuracy ")]
            for average in (x for x in lines if x["measure"] == one.cell.measure):
                same = [x["ours"] for x in own if all(x[key] == average[key] for key in KEYS)]
                average["ours"] = None if None in same else sum(same) / len(same)
    write_csv(out, lines)


def runs_of(wanted: list[Wanted], results: Path) -> dict[Place, Run]:
    """The results of every row, held to their weights and to one protocol, the dense ones too."""
    texts = {one.entry: None for one in wanted if one.cell.kind in ("perplexity", "delta")}
    tasks = {one.entry: None for one in wanted if one.cell.kind == "accuracy"}
    rows = [vars(one.place) for one in wanted]
    groups = read_runs(results, rows, list(texts), list(tasks))
    return {run.place: run for dense, runs in groups for run in (dense, *runs)}


def line(dense: Run, run: Run, one: Wanted, results: Path) -> dict[str, Any]:
    """One figure of ours: names, value, standard error, source and protocol."""
    value, error = measured(dense, run, one, results)
    source = one.files(results)[0]
    protocol = [f"{k} {Record.read(source)[k]}" for k in PROTOCOL.get(one.cell.kind, ())]
    return {
        "model": one.cell.model,
        **vars(one.cell.row),
        "measure": one.cell.measure,
        "ours": value,
        "stderr": error,
        "method_of_ours": run.place.method,
        "source": str(source),
        "protocol": ", ".join(protocol),
        "weights_sha256": run.weights["weights_sha256"],
    }


def measured(dense: Run, run: Run, one: Wanted, results: Path) -> tuple[float | None, float | None]:
    """A figure of ours and its standard error, where it has one.

    The average of accuracies is None here.
    """
    kind, name = one.cell.kind, one.cell.name
    if kind == "perplexity":
        record = run.perplexity[one.entry]
        return record["perplexity"], record["perplexity_stderr"]
    if kind == "delta":
        return delta(dense.perplexity[one.entry], run.perplexity[one.entry])
    if kind == "accuracy":
        return run.harness[one.entry]["value"], run.harness[one.entry]["stderr"]
    if kind == "error":
        errors = [layer[name]["relative_error"] for layer in run.layers]
        return sum(errors) / len(errors), None
    if kind == "seconds":
        spent = Record.read(timing(run.weights.path))["layers"]
        return sum(layer[name] for layer in spent), None
    if kind in SPEED:
        return speed(run, one, results), None
    return None, None


def delta(dense: Record, run: Record) -> tuple[float, float]:
    """Perplexity less the dense model's, and its standard error.

    To first order a block adds perplexity × its loss to each, and blocks are the same in both.
    """
    p, q = run["perplexity"], dense["perplexity"]
    pairs = zip(run["block_nll"], dense["block_nll"], strict=True)
    return p - q, float(pd.Series([p * a - q * b for a, b in pairs]).sem())


def speed(run: Run, one: Wanted, results: Path) -> float | None:
    """A figure of a speed record; None where the device does not measure it.

    Of a row whose setting is an attention implementation, that one's. Raises A3Error where the
    record is of other weights.
    """
    record = Record.read(one.files(results)[0])
    check_speed(record, Record.read(one.timed.weights(results)))
    dense, own = record["models"] if not run.place.is_dense else record["models"][:1] * 2
    setting = one.cell.row.setting
    attention = setting if setting in record["attention"] else record["attention"][-1]
    rates, dense_rates = own["attention"][attention], dense["attention"][attention]
    if one.cell.kind == "flops":
        return own["flops_per_token_paper"] / dense["flops_per_token_paper"]
    if one.cell.kind == "prefill":
        return rates["prefill"]["median"]
    if one.cell.kind == "memory":
        return rates["peak_memory_bytes"] and rates["peak_memory_bytes"] / 1e6
    return rates["decode"]["median"] - dense_rates["decode"]["median"]


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


def compare(path: Path, out: Path) -> None:
    """Write comparison.csv, .md, .svg and .png of a table into the folder `out` of its groups.

    Every published figure stands there once, with ours where it is built, and else what builds it.
    """
    paper, table = read_table(path)
    found = compared(paper, table, out)
    write_csv(out / "comparison.csv", [as_line(table, one) for one in found])
    with whole_file(out / "comparison.md") as temporary:
        temporary.write_text(markdown(table, found), encoding="utf-8")
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = drawn(table, found)
        # Without dates or versions, so that equal figures are equal files.
        with whole_file(out / "comparison.svg") as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
        with whole_file(out / "comparison.png") as temporary:
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})


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
        lines = pd.read_csv(path, dtype=dict.fromkeys(("model", "measure", *KEYS), str))
        if missing := {"model", "measure", "ours", "stderr", *KEYS} - set(lines):
            raise A3Error(f"{path}: no column {min(missing)}. Delete it and build it again.")
        lines[["model", "measure", *KEYS]] = lines[["model", "measure", *KEYS]].fillna("")
        for _, line in lines.iterrows():
            cell = Cell(line["model"], Row(**{key: line[key] for key in KEYS}), line["measure"])
            found[cell] = tuple(None if pd.isna(line[k]) else line[k] for k in ("ours", "stderr"))
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


# --- for reading ---


def markdown(table: Table, found: list[Compared]) -> str:
    """The comparison as GitHub Markdown: one table a model, what builds it, and footnotes."""
    parts = [f"# {table.spec['title']}", f"Ours (published, difference); {table.source.name}."]
    for model in dict.fromkeys(one.cell.model for one in found):
        group = [one for one in found if one.cell.model == model]
        parts += [f"## {model}", model_table(table, group)]
        missing = [one for one in group if one.ours is None]
        targets = dict.fromkeys(one.target for one in missing if one.target)
        reasons = dict.fromkeys(one.why_not for one in missing if one.why_not)
        parts += [f"{NOT_BUILT}: `snakemake {target}` builds it" for target in targets]
        parts += [f"{NOT_BUILT}: {reason}" for reason in reasons]
    marks = {i for one in found for i in one.notes}
    for i, note in enumerate(table.notes, 1):
        if i in marks or not note["where"]:
            parts.append(f"{mark(i) if note['where'] else 'Note:'} {note['says']}.")
    return "\n\n".join(parts) + "\n"


def measures_of(table: Table, group: list[Compared]) -> list[str]:
    """The measures of a model's figures, in the order of the table."""
    order = [measure for measure, _ in table.measures]
    found = dict.fromkeys(one.cell.measure for one in group)
    return sorted(found, key=lambda m: order.index(m) if m in order else -1)


def model_table(table: Table, group: list[Compared]) -> str:
    """One model's rows: the keys that differ between them, and a column for each measure."""
    keys = telling(group)
    rows: dict[Row, dict[str, str]] = {}
    for one in group:
        names = {key: getattr(one.cell.row, key) for key in keys}
        rows.setdefault(one.cell.row, names)[one.cell.measure] = cell_text(one)
    measures = measures_of(table, group)
    frame = pd.DataFrame(list(rows.values()), columns=[*keys, *measures]).fillna("–")
    align = ["left"] * len(keys) + ["right"] * len(measures)
    return str(
        frame.to_markdown(index=False, tablefmt="github", disable_numparse=True, colalign=align)
    )


def telling(group: list[Compared]) -> list[str]:
    """The keys that tell rows apart; the method where nothing does, or one of them is dense."""
    rows = [one.cell.row for one in group]
    own = [row for row in rows if row.method != "original"]
    found = [key for key in KEYS if len({getattr(row, key) for row in own}) > 1]
    method = not found or len(own) < len(rows)
    return [key for key in KEYS if key in found or (key == "method" and method)]


def cell_text(one: Compared) -> str:
    """`7.31 (7.22, +0.09)`, `not built (7.22)` or `7.31`, with the marks of footnotes."""
    kind = one.cell.kind
    ours = NOT_BUILT if one.ours is None else plus_minus(one)
    if one.published is None:
        return ours
    published = short(one.published, kind) + " ".join(mark(i) for i in one.notes)
    if one.difference is None:
        return f"{ours} ({published})"
    sign = "+" if one.difference >= 0 else ""
    return f"{ours} ({published}, {sign}{short(one.difference, kind)})"


def plus_minus(one: Compared) -> str:
    """Ours with its standard error."""
    text = short(one.ours, one.cell.kind)
    return text if one.stderr is None else f"{text} ± {short(one.stderr, one.cell.kind)}"


def short(value: float, kind: str) -> str:
    """A figure with the decimals of its kind."""
    large = abs(value) >= 1000 and kind in ("perplexity", "delta")
    return f"{value:.4g}" if large else f"{value:,.{DECIMALS.get(kind, 2)}f}"


def mark(number: int) -> str:
    """A footnote's mark."""
    return str(number).translate(SUPERSCRIPT)


# --- figure ---

HOLLOW = {"facecolors": "white", "edgecolors": GREY, "linewidths": 1.3, "zorder": 3}
FILLED = {"facecolors": COLOURS[0], "edgecolors": COLOURS[0], "zorder": 4}
LOG = 10  # A wider range than this is drawn on a logarithmic scale.


def drawn(table: Table, found: list[Compared]) -> Figure:
    """Ours and published figures as dots: a band for each model, axes in it for each measure."""
    groups = [
        [one for one in found if one.cell.model == model]
        for model in dict.fromkeys(one.cell.model for one in found)
    ]
    measures = [measures_of(table, group) for group in groups]
    heights = [0.9 + 0.19 * len({one.cell.row for one in group}) for group in groups]
    wide = max(map(len, measures))
    figure = Figure(figsize=(max(2.2 + 2.6 * wide, 7), 0.5 + sum(heights)), layout="constrained")
    figure.suptitle(f"{table.spec['title']}: ours (filled), published (hollow)", fontsize=11)
    bands = figure.subfigures(len(groups), height_ratios=heights, squeeze=False)[:, 0]
    for group, names, band in zip(groups, measures, bands, strict=True):
        band.suptitle(group[0].cell.model, fontweight="bold", fontsize=10, x=0.01, ha="left")
        rows, keys = list(dict.fromkeys(one.cell.row for one in group)), telling(group)
        line = band.subplots(1, wide, squeeze=False)[0]
        for axes, measure in zip(line, names, strict=False):
            dots(axes, [one for one in group if one.cell.measure == measure], rows)
            axes.set_title(measure, fontsize=9)
            axes.set_yticks(range(len(rows)), [])
        labels = [" ".join(getattr(row, key) for key in keys) for row in rows]
        line[0].set_yticks(range(len(rows)), labels)
        for axes in line[len(names) :]:
            axes.set_axis_off()
    return figure


def dots(axes: Axes, cells: list[Compared], rows: list[Row]) -> None:
    """One measure of one model: filled ours, hollow published, a line between the two."""
    values = []
    for one in cells:
        y = rows.index(one.cell.row)
        both = [value for value in (one.published, one.ours) if value is not None]
        values += both
        if one.published is not None:
            axes.scatter([one.published], [y], s=44, **HOLLOW)
        if one.ours is not None:
            axes.scatter([one.ours], [y], s=22, **FILLED)
        if len(both) == 2:
            axes.hlines(y, min(both), max(both), color=GREY, linewidth=1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="both", color="#e4e4e4", linewidth=0.7)
    axes.tick_params(labelsize=8, length=0)
    perplexity = cells[0].cell.kind in ("perplexity", "delta")
    if perplexity and values and min(values) > 0 and max(values) > LOG * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        wide = max(values) > 300 * min(values)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    """Lines with numbers exactly as they are: object columns keep integers beside empty cells."""
    with whole_file(path) as temporary:
        pd.DataFrame(lines, dtype=object).to_csv(temporary, index=False, lineterminator="\n")
