"""The report: one HTML file with tables, figures, protocol and provenance; needs no network."""

import base64
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from a3.artifacts.places import Place
from a3.core.errors import A3Error
from a3.core.files import SEAL, read_json, sha256, whole_file
from a3.core.provenance import PACKAGE, provenance
from a3.core.records import Record
from a3.report.tables.columns import (
    Column,
    columns,
    comparison_columns,
    comparison_note,
    free_columns,
    names,
    place_of,
    protocol,
    seconds_columns,
    seed_columns,
    seed_note,
    text_columns,
)
from a3.report.tables.compare import WORSE, differences, settings, verdict
from a3.report.tables.frames import read_table
from a3.report.tables.surgery import (
    generation_columns,
    read_surgery_table,
    surgery_columns,
    surgery_note,
)
from a3.solutions.modes import NO_RATIO


def build_report(results: Path, tables: Path, config: dict[str, Any], out: Path) -> None:
    """Write the report of one table.

    Args:
        results: the folder that all runs write to, as Snakemake's targets spell it.
        tables: folder with results.csv, comparisons.csv, seeds.csv, timings.csv and figures/ of
            this table; speed.csv, and surgery.csv with surgery_figures/, are shown where they are
            there.
        config: the configuration that was run; shown as it is.
        out: the HTML file.

    Raises:
        A3Error: a file of the table, or a result that it was made from, is missing.
    """
    frame = read_table(tables / "results.csv")
    page = _template().render(
        title=tables.name,
        summary=_summary(results, frame),
        results=columns(frame),
        comparisons=_optional(tables / "comparisons.csv", comparison_columns, comparison_note),
        seeds=_optional(tables / "seeds.csv", seed_columns, seed_note),
        speed=free_columns(tables / "speed.csv"),
        seconds=seconds_columns(read_table(tables / "timings.csv")),
        surgery=_surgery(tables),
        figures=list(_figures(tables / "figures")),
        protocol=protocol(frame),
        calibration=_calibration(results, frame),
        provenance=_provenance(results, frame),
        checkout=checkout(),
        rebuild=[_rebuild_table(results, tables, frame), *_rebuild(results, frame)],
        config=json.dumps(config, indent=2, sort_keys=True, default=str),
    )
    with whole_file(out) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _optional(
    path: Path, shown: Callable[[pd.DataFrame], list[Column]], note: Callable[[pd.DataFrame], str]
) -> dict[str, Any] | None:
    """A table and its note; None where it has no rows."""
    frame = read_table(path)
    return {"columns": shown(frame), "note": note(frame)} if len(frame) else None


def _surgery(tables: Path) -> dict[str, Any] | None:
    """Tables, note and figures of surgeries; None where the table has none."""
    if not (tables / "surgery.csv").is_file():
        return None
    frame = read_surgery_table(tables / "surgery.csv")
    return {
        "columns": surgery_columns(frame),
        "generations": generation_columns(frame),
        "note": surgery_note(frame),
        "figures": list(_figures(tables / "surgery_figures")),
    }


def _template() -> Any:
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def _summary(results: Path, frame: pd.DataFrame) -> str:
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
                best = "; ".join(_best(results, uniform, ratio, text) for ratio in ratios)
                said.append(f"Best of the smallest models at each ratio: {best}.")
    return " ".join(said)


def _dense_sentence(dense: pd.Series, text: str) -> str:
    return (
        f"Dense perplexity on {text} is {dense[f'{text}.perplexity']:.2f} "
        f"({dense[f'{text}.tokens_scored']:,} tokens scored, blocks of "
        f"{dense[f'{text}.block_length']:,}, {dense[f'{text}.dtype']})."
    )


def _best(results: Path, rows: list[pd.Series], ratio: str, text: str) -> str:
    """The least perplexity at a ratio among the smallest models: all components are compressed.

    A row that compresses one component loses less and saves less: not what to compare with.
    Methods that the blocks do not tell from the best are named beside it.
    """
    at_ratio = [row for row in rows if row["ratio"] == ratio]
    fewest = min(row["parameters"] for row in at_ratio)
    smallest = [row for row in at_ratio if row["parameters"] <= 1.005 * fewest]
    best = min(smallest, key=lambda row: row[f"{text}.perplexity"])
    losses = [place_of(row).perplexity(results, text) for row in (best, *smallest)]
    first, *others = (Record.read(path)["block_nll"] for path in losses)
    level = {
        place_of(row).method
        for row, nll in zip(smallest, others, strict=True)
        if verdict(*differences(first, nll).values(), lower_is_better=True) != WORSE
    } - {place_of(best).method}
    also = f" (not told from it by two standard errors: {', '.join(sorted(level))})"
    return (
        f"at {float(ratio):g}, {best[f'{text}.perplexity']:.2f} "
        f"({best[f'{text}.perplexity_delta']:+.2f}) by {place_of(best).method}"
        f"{also if level else ''}, which keeps "
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
            said = ", ".join(f"{key} {value}" for key, value in sorted(settings(made).items()))
            rows.add((place.model, place.calibration, said))
    return text_columns(("model", "calibration", "settings"), sorted(rows))


def checkout() -> dict[str, Any] | None:
    """Commit of the checkout that this code lies in, and whether it was changed since.

    None where there is no git, or the code is not tracked by the repository around it.
    """

    def git(*words: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(PACKAGE), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    if shutil.which("git") is None or git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "changed": changed != ""}


def _root(results: Path) -> Path:
    """The results folder as targets spell it: nothing of this machine."""
    return Path(results.name) if results.is_absolute() else results


def _rebuild_table(results: Path, tables: Path, frame: pd.DataFrame) -> dict[str, Any]:
    """The files of the table itself, as Snakemake targets."""
    files = [tables / f"{name}.csv" for name in ("results", "comparisons", "seeds", "timings")]
    targets = [_root(results) / "tables" / tables.name / path.name for path in files]
    drawn = {figure["name"] for figure in read_json(tables / "figures" / "captions.json")}
    pairs = zip(frame["model"], frame["calibration"], strict=True)
    for place in dict.fromkeys(Place(*pair) for pair in pairs):
        if f"spectra-{place.model}-{place.calibration}" in drawn:
            files.append(place.spectra(results))
            targets.append(place.spectra(_root(results)))
    return {
        "title": f"Table {tables.name}, its comparisons, seeds and seconds, and spectra",
        "targets": [(t.as_posix(), sha256(f)) for t, f in zip(targets, files, strict=True)],
    }


def _rebuild(results: Path, frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The files behind each row, as Snakemake targets."""
    root = _root(results)
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
