"""The report: one HTML file with tables, figures, protocol and provenance; needs no network."""

import base64
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from a3.errors import A3Error
from a3.files import SEAL, read_json, whole_file
from a3.provenance import provenance
from a3.results import Place, Record
from a3.solutions.modes import NO_RATIO
from a3.stages.tables import (
    Column,
    columns,
    names,
    place_of,
    protocol,
    read_table,
    seconds_columns,
    text_columns,
)

# Statistics differ between the rows of one method only by kind; all else is how text was read.
NOT_SETTINGS = {
    "stage",
    "code",
    "libraries",
    "kind",
    "weights_sha256",
    "config_sha256",
    "model",
    SEAL,
}


def build_report(results: Path, tables: Path, config: dict[str, Any], out: Path) -> None:
    """Write the report of one table.

    Args:
        results: the folder that all runs write to, as Snakemake's targets spell it.
        tables: folder with results.csv, seconds.csv and figures/ of this table.
        config: the configuration that was run; shown as it is.
        out: the HTML file.

    Raises:
        A3Error: a file of the table, or a result that it was made from, is missing.
    """
    frame = read_table(tables / "results.csv")
    page = _template().render(
        title=tables.name,
        summary=_summary(frame),
        results=columns(frame),
        seconds=seconds_columns(read_table(tables / "seconds.csv")),
        figures=list(_figures(tables / "figures")),
        protocol=protocol(frame),
        calibration=_calibration(results, frame),
        provenance=_provenance(results, frame),
        rebuild=list(_rebuild(results, frame)),
        config=json.dumps(config, indent=2, sort_keys=True, default=str),
    )
    with whole_file(out) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _template() -> Any:
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _summary(frame: pd.DataFrame) -> str:
    """What the table says, in a few sentences: dense figures, and the best row at each ratio."""
    said = []
    for model, group in frame.groupby("model", sort=False):
        rows = [row for _, row in group.iterrows()]
        dense = next(row for row in rows if place_of(row).is_dense)
        compressed = [row for row in rows if not place_of(row).is_dense]
        said.append(f"{model}: {len(compressed)} compressed rows beside the dense model.")
        for text in names(frame, "perplexity")[:1]:
            said.append(_dense_sentence(dense, text))
            uniform = [row for row in compressed if place_of(row).nominal is not None]
            ratios = sorted({row["ratio"] for row in uniform}, key=float)
            if ratios:
                best = "; ".join(_best(uniform, ratio, text) for ratio in ratios)
                said.append(f"Best of the smallest models at each ratio: {best}.")
    return " ".join(said)


def _dense_sentence(dense: pd.Series, text: str) -> str:
    return (
        f"Dense perplexity on {text} is {dense[f'{text}.perplexity']:.2f} "
        f"({dense[f'{text}.tokens_scored']:,} tokens scored, blocks of "
        f"{dense[f'{text}.block_length']:,}, {dense[f'{text}.dtype']})."
    )


def _best(rows: list[pd.Series], ratio: str, text: str) -> str:
    """The least perplexity at a ratio among the smallest models: those that compress every part.

    A row that compresses one part alone loses less and saves less; it is not what to compare with.
    """
    at_ratio = [row for row in rows if row["ratio"] == ratio]
    fewest = min(row["parameters"] for row in at_ratio)
    smallest = [row for row in at_ratio if row["parameters"] <= 1.005 * fewest]
    best = min(smallest, key=lambda row: row[f"{text}.perplexity"])
    return (
        f"at {float(ratio):g}, {best[f'{text}.perplexity']:.2f} "
        f"({best[f'{text}.perplexity_delta']:+.2f}) by {place_of(best).method}, which keeps "
        f"{best['parameters_ratio']:.1%} of the parameters and "
        f"{best['kv_bytes_per_token_ratio']:.1%} of the KV cache"
    )


def _figures(folder: Path) -> Iterator[dict[str, str]]:
    """Captions and SVGs as data URIs: nothing to fetch, and no identifiers that clash."""
    for figure in read_json(folder / "captions.json"):
        path = folder / f"{figure['name']}.svg"
        if not path.is_file():
            raise A3Error(f"{path}: no such file, but captions.json lists it. Draw it again.")
        yield {
            "caption": figure["caption"],
            "data": base64.b64encode(path.read_bytes()).decode("ascii"),
        }


def _records(results: Path, frame: pd.DataFrame) -> Iterator[tuple[Place, Record]]:
    """Every JSON file that the table was made from."""
    for _, row in frame.iterrows():
        place = place_of(row)
        yield place, Record.read(place.weights(results))
        for text in names(frame, "perplexity"):
            yield place, Record.read(place.perplexity(results, text))
        for task in names(frame, "value"):
            yield place, Record.read(place.harness(results, task))


def _statistics(record: Record) -> list[dict[str, Any]]:
    """The records of the statistics that a checkpoint was made from; none for other files."""
    return list(record.data.get("provenance", {}).get("statistics", {}).values())


def _provenance(results: Path, frame: pd.DataFrame) -> list[Column]:
    """One row for each stage, code and set of libraries, with how many files came from it."""
    found = [provenance(__name__)]
    for _, record in _records(results, frame):
        if "provenance" in record.data:
            found += [record.data["provenance"], *_statistics(record)]
    counts = Counter(
        (
            made["stage"],
            made["code"],
            ", ".join(f"{name} {version}" for name, version in sorted(made["libraries"].items())),
        )
        for made in found
    )
    rows = [(*key, str(count)) for key, count in sorted(counts.items())]
    return text_columns(("stage", "code fingerprint", "libraries", "records"), rows)


def _calibration(results: Path, frame: pd.DataFrame) -> list[Column]:
    """How each calibration's text was read."""
    rows = set()
    for place, record in _records(results, frame):
        for made in _statistics(record):
            settings = {key: made[key] for key in sorted(made.keys() - NOT_SETTINGS)}
            said = ", ".join(f"{key} {value}" for key, value in settings.items())
            rows.add((place.model, place.calibration, said))
    return text_columns(("model", "calibration", "settings"), sorted(rows))


def _rebuild(results: Path, frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The files behind each row, as Snakemake targets."""
    root = Path(results.name) if results.is_absolute() else results
    for _, row in frame.iterrows():
        place = place_of(row)
        files, targets = (
            [
                place.weights(folder),
                *(place.perplexity(folder, text) for text in names(frame, "perplexity")),
                *(place.harness(folder, task) for task in names(frame, "value")),
            ]
            for folder in (results, root)
        )
        seals = [Record.read(path)[SEAL] for path in files]
        ratio = "" if place.ratio == NO_RATIO else f", ratio {place.ratio}"
        how = "" if place.is_dense else f"{ratio}, calibration {place.calibration}"
        yield {
            "title": f"{place.model}: {place.method}{how}",
            "weights_sha256": row["weights_sha256"],
            "targets": [(t.as_posix(), seal) for t, seal in zip(targets, seals, strict=True)],
        }
