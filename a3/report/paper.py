"""Our results beside the paper's published figures."""

from pathlib import Path

import matplotlib
import pandas as pd

from a3.core.files import whole_file
from a3.experiments.paper import Row, Table
from a3.report.figures.drawing import STYLE
from a3.report.figures.paper import drawn
from a3.report.tables.paper_comparison import (
    Compared,
    as_line,
    compared,
    measures_of,
    read_table,
    telling,
    write_csv,
)

# Decimals of each quantity; the rest have two.
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


# --- for reading ---
def markdown(table: Table, found: list[Compared]) -> str:
    """The comparison as GitHub Markdown: one table a model, what builds it, and footnotes."""
    paragraphs = [f"# {table.spec['title']}", f"Ours (published, difference); {table.source.name}."]
    for model in dict.fromkeys(one.cell.model for one in found):
        group = [one for one in found if one.cell.model == model]
        paragraphs += [f"## {model}", model_table(table, group)]
        missing = [one for one in group if one.ours is None]
        targets = dict.fromkeys(one.target for one in missing if one.target)
        reasons = dict.fromkeys(one.why_not for one in missing if one.why_not)
        paragraphs += [f"{NOT_BUILT}: `snakemake {target}` builds it" for target in targets]
        paragraphs += [f"{NOT_BUILT}: {reason}" for reason in reasons]
    marks = {i for one in found for i in one.notes}
    for i, note in enumerate(table.notes, 1):
        if i in marks or not note["where"]:
            paragraphs.append(f"{mark(i) if note['where'] else 'Note:'} {note['says']}.")
    return "\n\n".join(paragraphs) + "\n"


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


def cell_text(one: Compared) -> str:
    """`7.31 (7.22, +0.09)`, `not built (7.22)` or `7.31`, with the marks of footnotes."""
    quantity = one.cell.quantity
    ours = NOT_BUILT if one.ours is None else plus_minus(one)
    if one.published is None:
        return ours
    published = short(one.published, quantity) + " ".join(mark(i) for i in one.notes)
    if one.difference is None:
        return f"{ours} ({published})"
    sign = "+" if one.difference >= 0 else ""
    return f"{ours} ({published}, {sign}{short(one.difference, quantity)})"


def plus_minus(one: Compared) -> str:
    """Ours with its standard error."""
    text = short(one.ours, one.cell.quantity)
    return text if one.stderr is None else f"{text} ± {short(one.stderr, one.cell.quantity)}"


def short(value: float, quantity: str) -> str:
    """A figure with the decimals of its quantity."""
    large = abs(value) >= 1000 and quantity in ("perplexity", "delta")
    return f"{value:.4g}" if large else f"{value:,.{DECIMALS.get(quantity, 2)}f}"


def mark(number: int) -> str:
    """A footnote's mark."""
    return str(number).translate(SUPERSCRIPT)
