"""Our results beside the paper's published figures."""

from pathlib import Path

from a3.core.files import whole_file
from a3.experiments.paper import Row, Table
from a3.report.figures.drawing import FORMATS, save_figure, styled
from a3.report.figures.paper import drawn
from a3.report.tables.columns import Column, markdown_table, words
from a3.report.tables.frames import frame_of, write_csv, write_text
from a3.report.tables.paper_comparison import (
    Compared,
    as_line,
    compared,
    measures_of,
    read_definition,
    telling,
)
from a3.report.tables.rounding import plus_minus, rounded

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
    paper, table = read_definition(path)
    found = compared(paper, table, out)
    write_csv(out / "comparison.csv", frame_of([as_line(table, one) for one in found]))
    write_text(out / "comparison.md", markdown(table, found))
    with styled():
        figure = drawn(table, found)
        for kind in FORMATS:
            with whole_file(out / f"comparison.{kind}") as temporary:
                save_figure(figure, temporary, kind)


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
    cells = list(rows.values())
    found = [words(key, [row[key] for row in cells]) for key in keys]
    for measure in measures_of(table, group):
        texts = [row.get(measure, "–") for row in cells]
        found.append(Column(measure, texts, texts))
    return markdown_table(found)


def cell_text(one: Compared) -> str:
    """`7.31 (7.22, +0.09)`, `not built (7.22)` or `7.31`, with the marks of footnotes."""
    quantity = one.cell.quantity
    ours = NOT_BUILT if one.ours is None else plus_minus(shown(one.ours, quantity), one.stderr)
    if one.published is None:
        return ours
    published = shown(one.published, quantity) + " ".join(mark(i) for i in one.notes)
    if one.difference is None:
        return f"{ours} ({published})"
    return f"{ours} ({published}, {shown(one.difference, quantity, '+')})"


def shown(value: float, quantity: str, sign: str = "") -> str:
    """A figure with the decimals of its quantity."""
    if quantity in ("perplexity", "delta"):
        return rounded(value, sign=sign)
    return f"{value:{sign},.{DECIMALS.get(quantity, 2)}f}"


def mark(number: int) -> str:
    """A footnote's mark."""
    return str(number).translate(SUPERSCRIPT)
