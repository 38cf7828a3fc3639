"""Commands for tables, figures, reports and model cards."""

from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli import options as values
from a3.cli.arguments import EXPERIMENTS, SURGERIES, add, add_out, folder

# Where the paper's tables are defined.
TABLE = "config/paper/TABLE.yaml, with config/paper.yaml beside its folder"


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    add_card(commands)
    add_tables(commands)
    add_speed_table(commands)
    add_surgery_tables(commands)
    add_report(commands)
    paper = commands.add_parser("paper", help="the paper's tables", description="Paper's tables.")
    kinds = paper.add_subparsers(metavar="KIND", required=True)
    add_paper_rows(kinds)
    add_paper_compare(kinds)
    add_show(commands)


def card(model: Path, dense: list[Path], compressed: list[Path]) -> None:
    """Write perplexities into a model card."""
    from a3.report.card import add_perplexity

    add_perplexity(folder(model), dense, compressed)


def add_card(commands: Any) -> None:
    """Arguments of a3 card."""
    one = add(commands, "card", card, "perplexity before and after into a compressed model's card")
    one.add_argument("model", type=Path, help="compressed Hugging Face folder")
    text_ = "results of a3 eval ppl on each text: of the dense model"
    one.add_argument("--dense", type=Path, nargs="+", required=True, help=text_)
    text_ = "of the compressed model, in the same order"
    one.add_argument("--compressed", type=Path, nargs="+", required=True, help=text_)


def tables(**inputs: Any) -> None:
    """Build tables."""
    from a3.report.tables.results import build_tables

    build_tables(**inputs)


def figures(**inputs: Any) -> None:
    """Build figures."""
    from a3.report.figures.build import build_figures

    build_figures(**inputs)


def add_tables(commands: Any) -> None:
    """Arguments of a3 tables and a3 figures."""
    said = "results, comparisons, seeds and seconds as .csv, and results.md"
    for name, command, writes, text_ in (
        ("tables", tables, targets.TABLES, said),
        ("figures", figures, targets.NEW, "SVG and PNG figures"),
    ):
        one = add(commands, name, command, text_)
        one.add_argument("--results", type=Path, required=True)
        one.add_argument("--experiments", type=EXPERIMENTS, required=True, help="JSON: rows")
        one.add_argument("--perplexity", nargs="*", default=[])
        one.add_argument("--harness", nargs="*", default=[])
        if command is tables:
            one.add_argument("--reference", help="method that the others are compared to")
        else:
            text_ = "spectra.json, each in a folder of the model, named by the calibration"
            one.add_argument("--spectra", type=Path, nargs="*", default=[], help=text_)
        add_out(one, writes, "folder")


def speed_table(**inputs: Any) -> None:
    """Build the table of speeds."""
    from a3.report.tables.speed import build_speed_table

    build_speed_table(**inputs)


def add_speed_table(commands: Any) -> None:
    """Arguments of a3 speed-table."""
    one = add(commands, "speed-table", speed_table, "speed.csv, speed.md")
    one.add_argument("--results", type=Path, required=True)
    one.add_argument("--experiments", type=EXPERIMENTS, required=True, help="JSON: rows")
    one.add_argument("--speed", nargs="+", required=True)
    add_out(one, targets.SPEED_TABLE, "folder")


def surgery_table(**inputs: Any) -> None:
    """Build the table of surgeries."""
    from a3.report.tables.surgery import build_surgery_table

    build_surgery_table(**inputs)


def surgery_figures(**inputs: Any) -> None:
    """Build the figures of surgeries."""
    from a3.report.figures.surgery import build_surgery_figures

    build_surgery_figures(**inputs)


def add_surgery_tables(commands: Any) -> None:
    """Arguments of a3 surgery-table and a3 surgery-figures."""
    said = "surgery.csv, surgery_layers.csv, surgery.md"
    for name, command, writes, text_ in (
        ("surgery-table", surgery_table, targets.SURGERY_TABLE, said),
        ("surgery-figures", surgery_figures, targets.NEW, "SVG and PNG figures of surgeries"),
    ):
        one = add(commands, name, command, text_)
        one.add_argument("--results", type=Path, required=True)
        one.add_argument("--surgeries", type=SURGERIES, required=True, help="JSON: rows")
        one.add_argument("--perplexity", nargs="*", default=[])
        one.add_argument("--harness", nargs="*", default=[])
        add_out(one, writes, "folder")


def report(results: Path, tables: Path, config: dict[str, Any], out: Path) -> None:
    """Build the report."""
    from a3.report.page import build_report

    build_report(results, tables, config, out)


def add_report(commands: Any) -> None:
    """Arguments of a3 report."""
    one = add(commands, "report", report, "self-contained HTML report")
    one.add_argument("--results", type=Path, required=True)
    one.add_argument("--tables", type=Path, required=True)
    one.add_argument("--config", type=values.mapping, required=True, help="JSON")
    add_out(one, targets.PLAIN, "report.html")


def paper_rows(table: Path, **inputs: Any) -> None:
    """Join one model's results for a table of the paper."""
    from a3.report.tables.paper_rows import build_rows

    build_rows(table, **inputs)


def add_paper_rows(kinds: Any) -> None:
    """Arguments of a3 paper rows."""
    one = add(kinds, "rows", paper_rows, "one model's group of rows, from its results")
    one.add_argument("table", type=Path, help=TABLE)
    one.add_argument("--model", required=True, help="name in config/paper.yaml")
    one.add_argument("--results", type=Path, required=True)
    add_out(one, targets.PLAIN, "<model>.csv")


def paper_compare(table: Path, out: Path) -> None:
    """Compare with the paper."""
    from a3.report.paper import compare

    compare(table, out)


def add_paper_compare(kinds: Any) -> None:
    """Arguments of a3 paper compare."""
    one = add(kinds, "compare", paper_compare, "ours beside the published figures")
    one.add_argument("table", type=Path, help=TABLE)
    add_out(
        one, targets.COMPARISON, "folder of <model>.csv, for comparison.csv, .md, .svg and .png"
    )


def show(table: Path) -> None:
    """Print a table."""
    from a3.report.tables.frames import print_table

    print(print_table(table))
    print(f"report: {table / 'report.html'}")


def add_show(commands: Any) -> None:
    """Arguments of a3 show."""
    one = add(commands, "show", show, "print a result table")
    one.add_argument("table", type=Path, help="folder of results.md")
