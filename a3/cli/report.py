"""Commands for tables, figures, reports and model cards."""

from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli import options as values
from a3.cli.arguments import (
    EXPERIMENTS,
    SMALL_MODEL,
    SURGERIES,
    add,
    add_group,
    add_model,
    add_out,
    add_results,
    add_rows,
    add_scores,
    folder,
)
from a3.core.errors import A3Error
from a3.core.extras import require_installed

# Where the paper's tables are defined.
TABLE = "config/paper/TABLE.yaml; config/paper.yaml lies beside its folder"

# What the examples call a row of each table.
ROW = """'[{"model": "m", "qk": "joint~", "ov": "joint~", "mlp": "obs~", "ratio": "0.2"}]'"""

SURGERY = (
    """'[{"model": "m", "calibration": "c", "mode": "pca-separate", "size": "variance@0.9"}]'"""
)


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    add_card(commands)
    add_tables(commands)
    add_figures(commands)
    add_speed_table(commands)
    add_surgery_table(commands)
    add_surgery_figures(commands)
    add_report(commands)
    subcommands = add_group(
        commands,
        "paper",
        "build the paper's tables beside the published figures",
        "docs/paper.md says how the tables are defined and built.",
        "a3 paper compare config/paper/table1.yaml -o results/paper/table1",
    )
    add_paper_rows(subcommands)
    add_paper_compare(subcommands)
    add_show(commands)


def card(
    model: Path,
    dense: list[Path],
    compressed: list[Path],
    licence: str | None,
    html: Path | None,
) -> None:
    """Write perplexities or a licence into a model card, or the card as a page of pictures."""
    from a3.report.card import add_licence, add_perplexity
    from a3.report.happened import write_page

    if not (dense or compressed or licence or html):
        raise A3Error("card: nothing to do. Give --dense and --compressed, --licence or --html.")
    if dense or compressed:
        add_perplexity(folder(model), dense, compressed)
    if licence is not None:
        add_licence(folder(model), licence)
    if html is not None:
        write_page(folder(model), html)


def add_card(commands: Any) -> None:
    """Arguments of a3 card."""
    one = add(
        commands,
        "card",
        card,
        "write perplexities before and after into a compressed model's card",
        "Reads results of a3 eval ppl, checks that they are of this model, and adds them to the "
        "README.md in its folder. --licence adds the licence that the base model has. --html "
        "writes a page of pictures: what each layer gave up, where the loss sits, and why.",
        "a3 card small --dense dense.json --compressed ppl.json --html small.html",
    )
    add_model(one, SMALL_MODEL)
    files: dict[str, Any] = {"type": Path, "nargs": "+", "default": [], "metavar": "FILE"}
    text_ = "results of a3 eval ppl for the dense model, one for each text"
    one.add_argument("--dense", help=text_, **files)
    text_ = "results of a3 eval ppl for the compressed model, in the same order"
    one.add_argument("--compressed", help=text_, **files)
    text_ = "short name of the base model's licence: apache-2.0, mit, gemma, other …"
    one.add_argument("--licence", metavar="NAME", help=text_)
    text_ = "new .html file that shows it, to read offline"
    one.add_argument("--html", type=Path, metavar="FILE", help=text_)


def tables(**inputs: Any) -> None:
    """Build tables."""
    require_installed("tabulate", "workflow")
    from a3.report.tables.results import build_tables

    build_tables(**inputs)


def add_tables(commands: Any) -> None:
    """Arguments of a3 tables."""
    one = add(
        commands,
        "tables",
        tables,
        "build the result tables of a table of experiments",
        "Reads records of models and evaluations, refuses results of different protocols, and "
        "writes results.csv, comparisons.csv, seeds.csv, timings.csv and results.md.",
        f"a3 tables --results results --experiments {ROW} --perplexity wiki -o tables",
    )
    add_experiments(one)
    add_reference(one)
    add_fit(one)
    add_out(one, targets.TABLES, "FOLDER", "folder to write the tables to")


def figures(**inputs: Any) -> None:
    """Build figures."""
    require_installed("matplotlib", "workflow")
    from a3.report.figures.build import build_figures

    build_figures(**inputs)


def add_figures(commands: Any) -> None:
    """Arguments of a3 figures."""
    one = add(
        commands,
        "figures",
        figures,
        "draw the figures of a table of experiments",
        "Reads the same results as a3 tables, spectra and frontiers, and writes each figure as SVG "
        "and PNG.",
        f"a3 figures --results results --experiments {ROW} --perplexity wiki -o figures",
    )
    add_experiments(one)
    text_ = "files of a3 spectra, MODEL/CALIBRATION.json"
    one.add_argument("--spectra", type=Path, nargs="*", default=[], metavar="FILE", help=text_)
    add_frontiers(one)
    add_out(one, targets.NEW, "FOLDER", "new folder")


def add_experiments(one: Any) -> None:
    """Which experiments, and which of their scores."""
    add_results(one, required=True)
    add_rows(one, type=EXPERIMENTS, required=True)
    add_scores(one)


def add_reference(one: Any) -> None:
    """The method that differences are to."""
    text_ = "method that the others are compared to: its modes, joined by +"
    one.add_argument("--reference", metavar="METHOD", help=text_)


def add_fit(one: Any) -> None:
    """Whether losses on calibration and dev text were measured."""
    text_ = "show the losses on calibration and dev text that a3 eval fit measured"
    one.add_argument("--fitted", action="store_true", dest="fit", help=text_)


def add_frontiers(one: Any) -> None:
    """Files of frontiers."""
    text_ = "files of a3 frontier, MODEL/CALIBRATION/MODES.json"
    one.add_argument("--frontiers", type=Path, nargs="*", default=[], metavar="FILE", help=text_)


def speed_table(**inputs: Any) -> None:
    """Build the table of speeds."""
    require_installed("tabulate", "workflow")
    from a3.report.tables.speed import build_speed_table

    build_speed_table(**inputs)


def add_speed_table(commands: Any) -> None:
    """Arguments of a3 speed-table."""
    one = add(
        commands,
        "speed-table",
        speed_table,
        "build the table of speeds",
        "Reads the benchmarks of the workflow's models, and writes speed.csv and speed.md.",
        f"a3 speed-table --results results --experiments {ROW} --speed short -o tables",
    )
    add_results(one, required=True)
    add_rows(one, type=EXPERIMENTS, required=True)
    text_ = "names of speed evaluations to show"
    one.add_argument("--speed", nargs="+", required=True, metavar="NAME", help=text_)
    add_out(one, targets.SPEED_TABLE, "FOLDER", "folder to write the table to")


def surgery_table(**inputs: Any) -> None:
    """Build the table of surgeries."""
    require_installed("tabulate", "workflow")
    from a3.report.tables.surgery import build_surgery_table

    build_surgery_table(**inputs)


def add_surgery_table(commands: Any) -> None:
    """Arguments of a3 surgery-table."""
    one = add(
        commands,
        "surgery-table",
        surgery_table,
        "build the table of surgeries",
        "Reads operated models and their scores, and writes surgery.csv, surgery_layers.csv and "
        "surgery.md.",
        f"a3 surgery-table --results results --surgeries {SURGERY} --perplexity wiki -o tables",
    )
    add_surgeries(one)
    add_out(one, targets.SURGERY_TABLE, "FOLDER", "folder to write the table to")


def surgery_figures(**inputs: Any) -> None:
    """Build the figures of surgeries."""
    require_installed("matplotlib", "workflow")
    from a3.report.figures.surgery import build_surgery_figures

    build_surgery_figures(**inputs)


def add_surgery_figures(commands: Any) -> None:
    """Arguments of a3 surgery-figures."""
    one = add(
        commands,
        "surgery-figures",
        surgery_figures,
        "draw the figures of surgeries",
        "Reads the same results as a3 surgery-table, and writes each figure as SVG and PNG.",
        f"a3 surgery-figures --results results --surgeries {SURGERY} --perplexity wiki -o figures",
    )
    add_surgeries(one)
    add_out(one, targets.NEW, "FOLDER", "new folder")


def add_surgeries(one: Any) -> None:
    """Which surgeries, and which of their scores."""
    add_results(one, required=True)
    text_ = "rows of the table of surgeries, a JSON list of objects"
    one.add_argument("--surgeries", type=SURGERIES, required=True, metavar="JSON", help=text_)
    add_scores(one)


def report(**inputs: Any) -> None:
    """Build the report."""
    require_installed("tabulate", "workflow")
    from a3.report.page import build_report

    build_report(**inputs)


def add_report(commands: Any) -> None:
    """Arguments of a3 report."""
    one = add(
        commands,
        "report",
        report,
        "build the HTML report of a table",
        "Reads the same results as a3 tables, with what a3 tables and a3 figures wrote, and writes "
        "one self-contained page.",
        f"a3 report --results results --experiments {ROW} --perplexity wiki --tables tables "
        "--config '{}' -o report.html",
    )
    add_experiments(one)
    add_reference(one)
    add_fit(one)
    add_frontiers(one)
    text_ = "folder that a3 tables and a3 figures wrote"
    one.add_argument("--tables", type=Path, required=True, metavar="FOLDER", help=text_)
    text_ = "configuration of the workflow, a JSON object"
    one.add_argument("--config", type=values.mapping, required=True, metavar="JSON", help=text_)
    add_out(one, targets.PLAIN, "FILE", ".html file to write")


def paper_rows(table: Path, **inputs: Any) -> None:
    """Join one model's results for a table of the paper."""
    from a3.report.tables.paper_rows import build_rows

    build_rows(table, **inputs)


def add_paper_rows(commands: Any) -> None:
    """Arguments of a3 paper rows."""
    one = add(
        commands,
        "rows",
        paper_rows,
        "build the rows of one model",
        "Reads the model's results, and writes its rows of the table.",
        "a3 paper rows config/paper/table1.yaml --model llama-2-7b --results results "
        "-o llama-2-7b.csv",
    )
    one.add_argument("table", type=Path, metavar="TABLE", help=TABLE)
    text_ = "name of the model in config/paper.yaml"
    one.add_argument("--model", required=True, metavar="NAME", help=text_)
    add_results(one, required=True)
    add_out(one, targets.PLAIN, "FILE", ".csv file to write")


def paper_compare(table: Path, out: Path) -> None:
    """Compare with the paper."""
    require_installed("matplotlib", "workflow")
    require_installed("tabulate", "workflow")
    from a3.report.paper import compare

    compare(table, out)


def add_paper_compare(commands: Any) -> None:
    """Arguments of a3 paper compare."""
    one = add(
        commands,
        "compare",
        paper_compare,
        "show our results beside the published figures",
        "Reads the rows of all models (MODEL.csv) in a folder, and writes comparison.csv, .md, "
        ".svg and .png to the same folder.",
        "a3 paper compare config/paper/table1.yaml -o results/paper/table1",
    )
    one.add_argument("table", type=Path, metavar="TABLE", help=TABLE)
    add_out(one, targets.COMPARISON, "FOLDER", "folder of the rows, to write the comparison to")


def show(table: Path) -> None:
    """Print a table."""
    from a3.report.tables.frames import print_table

    print(print_table(table))
    print(f"report: {table / 'report.html'}")


def add_show(commands: Any) -> None:
    """Arguments of a3 show."""
    one = add(
        commands,
        "show",
        show,
        "print a result table",
        "Reads results.md in a folder that a3 tables wrote, and says where the report is.",
        "a3 show results/tables/default",
    )
    one.add_argument("table", type=Path, metavar="TABLES", help="folder that a3 tables wrote")
