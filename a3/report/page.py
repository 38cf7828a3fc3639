"""The report: one HTML file with tables, figures, protocol and provenance, to read offline."""

import base64
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from a3.artifacts.places import Place
from a3.artifacts.runs import Run, read_runs
from a3.core.errors import A3Error
from a3.core.files import SEAL, read_json, sha256
from a3.core.provenance import PACKAGE, provenance
from a3.core.records import Record
from a3.experiments.rows import check_reference
from a3.report.advice import advice, in_order, level_with_best, rivals, smallest
from a3.report.frontiers import read_frontiers
from a3.report.labels import named
from a3.report.tables.columns import (
    Column,
    by_text_columns,
    comparison_columns,
    comparison_note,
    free_columns,
    is_set,
    protocol_columns,
    result_columns,
    seconds_columns,
    seed_columns,
    seed_note,
    share_columns,
    text_columns,
)
from a3.report.tables.compare import settings
from a3.report.tables.fit import fit_note
from a3.report.tables.frames import read_csv, write_text
from a3.report.tables.results import frames_of
from a3.report.tables.surgery import (
    generation_columns,
    read_surgery_table,
    surgery_columns,
    surgery_note,
)
from a3.report.templates import template
from a3.solutions.modes import NO_RATIO


def build_report(
    results: Path,
    experiments: list[dict[str, str]],
    perplexity: list[str],
    harness: list[str],
    tables: Path,
    config: dict[str, Any],
    out: Path,
    reference: str | None = None,
    fit: bool = False,
    frontiers: Sequence[Path] = (),
) -> None:
    """Write the report of one table.

    Args:
        results: the folder that all runs write to, as Snakemake's targets spell it.
        experiments: as `build_tables` takes them, like `perplexity`, `harness`, `reference`, `fit`.
        tables: folder of this table: its .csv files are listed, with their hashes, among what can
            be rebuilt, and its figures/ are shown; also speed.csv, and surgery.csv with
            surgery_figures/, if they exist.
        config: the configuration of the run; shown unchanged.
        out: the HTML file.
        frontiers: as `build_figures` takes them.

    Raises:
        A3Error: a file of the table is missing, or `build_tables` or `build_figures` would raise
            it.
    """
    check_reference(experiments, reference)
    groups = read_runs(results, experiments, perplexity, harness, fit)
    frames = frames_of(results, groups, reference)
    runs = [run for dense, others in groups for run in (dense, *others)]
    shown = read_frontiers(frontiers, [dense for dense, _ in groups], config)
    page = template("page.html.jinja").render(
        title=tables.name,
        **_first_lines(groups, perplexity),
        results=result_columns(frames["results"], perplexity, harness),
        fit=" ".join(fit_note(frames["results"])),
        sets=[_set(frames, entry) for entry in perplexity if is_set(frames["results"], entry)],
        comparisons=_noted(frames["comparisons"], comparison_columns, comparison_note),
        seeds=_noted(frames["seeds"], lambda one: seed_columns(one, perplexity), seed_note),
        panels=[one.panel() for one in shown],
        speed=_speed(tables),
        seconds=seconds_columns(frames["timings"]),
        surgery=_surgery(tables),
        figures=list(_figures(tables / "figures")),
        protocol=protocol_columns(frames["results"], perplexity, harness),
        calibration=_calibration(runs),
        provenance=_provenance([*_records(runs), *(one.record for one in shown)]),
        checkout=checkout(),
        rebuild=[
            _rebuild_table(results, tables, list(frames), runs, frontiers),
            *(_rebuild(results, run) for run in runs),
        ],
        config=json.dumps(config, indent=2, sort_keys=True, default=str),
    )
    write_text(out, page)


def _noted(
    frame: pd.DataFrame,
    columns: Callable[[pd.DataFrame], list[Column]],
    note: Callable[[pd.DataFrame], str],
) -> dict[str, Any] | None:
    """A table and the note under it; None if it has no rows."""
    return None if frame.empty else {"columns": columns(frame), "note": note(frame)}


def _set(frames: dict[str, pd.DataFrame], entry: str) -> dict[str, Any]:
    """Perplexity on each text of a set, and each one's share of the reference's increase."""
    compared = frames["comparisons"]
    shares = share_columns(compared, entry) if f"{entry}.mean.share" in compared else None
    return {
        "name": entry,
        "perplexity": by_text_columns(frames["results"], entry),
        "shares": shares,
    }


def _speed(tables: Path) -> list[Column]:
    """The table of speeds; empty if it has not been built."""
    path = tables / "speed.csv"
    return free_columns(read_csv(path, ())) if path.is_file() else []


def _surgery(tables: Path) -> dict[str, Any] | None:
    """Tables, note and figures of surgeries; None if the table has none."""
    if not (tables / "surgery.csv").is_file():
        return None
    frame = read_surgery_table(tables / "surgery.csv")
    return {
        "columns": surgery_columns(frame),
        "generations": generation_columns(frame),
        "note": surgery_note(frame),
        "figures": list(_figures(tables / "surgery_figures")),
    }


# --- the first lines ---
def _first_lines(
    groups: Sequence[tuple[Run, list[Run]]], perplexity: Sequence[str]
) -> dict[str, Any]:
    """What to take, and what it was measured on; the best rows where there is no advice."""
    found = [
        [advice(dense, others, text) for text in perplexity[:1]] or [""] for dense, others in groups
    ]
    return {
        "advice": [said for (said,) in found],
        "summary": " ".join(
            _summary(dense, others, perplexity, bool(said))
            for (dense, others), (said,) in zip(groups, found, strict=True)
        ),
    }


def _summary(dense: Run, runs: Sequence[Run], perplexity: Sequence[str], advised: bool) -> str:
    """A summary of one model's rows: what was scored, and the best row at each ratio.

    Where `advised`, the line above has the perplexities, and this one the sizes that go with them.
    """
    said = [f"{dense.place.model}: {len(runs)} compressed rows beside the dense model."]
    for text in perplexity[:1]:
        records = [dense.texts[name] for name in dense.texts_of(text)]
        tokens = sum(record["tokens_scored"] for record in records)
        mean = f", the mean of {len(records)} texts," if dense.is_set(text) else ""
        scored = (
            f"{tokens:,} tokens scored, blocks of {records[0]['block_length']:,}, "
            f"{records[0]['dtype']}"
        )
        if advised:
            said += [f"Perplexity on {text}{mean} is of {scored}.", _sizes(dense, runs, text)]
        else:
            value = dense.perplexity[text]["perplexity"]
            said.append(f"Dense perplexity on {text}{mean} is {value:.2f} ({scored}).")
        # A row that was trained is no rival of those that were not.
        for trained, title in ((False, "Best"), (True, "Best after training (a3 heal)")):
            by_ratio: dict[str, list[Run]] = {}
            for run in runs if trained or not advised else ():
                if run.place.nominal is not None and run.place.is_healed is trained:
                    by_ratio.setdefault(run.place.ratio, []).append(run)
            found = [_best(dense, by_ratio[ratio], text) for ratio in sorted(by_ratio, key=float)]
            if found:
                said.append(f"{title} of the smallest models at each ratio: {'; '.join(found)}.")
    return " ".join(said)


def _sizes(dense: Run, runs: Sequence[Run], text: str) -> str:
    """What the smallest models of each ratio keep, and which are as good as the best of them."""
    found = []
    for ratio, own in rivals(runs).items():
        best = in_order(smallest(own), text)[0]
        found.append(f"at {ratio}, {kept_by(dense, best)}{_level(smallest(own), text)}")
    return f"Of the smallest models, the best keeps: {'; '.join(found)}."


def _best(dense: Run, runs: Sequence[Run], text: str) -> str:
    """The best perplexity at a ratio among the smallest models, which compress all components.

    A row that compresses only one component loses less but also saves less, so it is left out.
    """
    best = in_order(smallest(runs), text)[0]
    first, place = best.perplexity[text], best.place
    return (
        f"at {float(place.ratio):g}, {first['perplexity']:.2f} "
        f"({first['perplexity'] - dense.perplexity[text]['perplexity']:+.2f}) by "
        f"{named(place.method)}{_level(smallest(runs), text)}, which keeps {kept_by(dense, best)}"
    )


def _level(rows: Sequence[Run], text: str) -> str:
    """The methods whose difference from the best row is not significant over the blocks."""
    best = in_order(rows, text)[0].place.method
    level = sorted(map(named, level_with_best(rows, text) - {best}))
    return f" (within two standard errors of {named(best)}: {', '.join(level)})" if level else ""


def kept_by(dense: Run, run: Run) -> str:
    """The shares of parameters and KV cache that a row keeps."""
    kept = {key: run.size[key] / dense.size[key] for key in ("parameters", "kv_bytes_per_token")}
    return (
        f"{kept['parameters']:.1%} of the parameters and "
        f"{kept['kv_bytes_per_token']:.1%} of the KV cache"
    )


def _figures(folder: Path) -> Iterator[dict[str, str]]:
    """Captions and SVGs as data URIs, so that nothing is fetched and no identifiers clash."""
    for figure in read_json(folder / "captions.json"):
        path = folder / f"{figure['name']}.svg"
        if not path.is_file():
            raise A3Error(f"{path}: no such file, but captions.json lists it. Draw it again.")
        yield {
            "caption": figure["caption"],
            "data": base64.b64encode(path.read_bytes()).decode("ascii"),
        }


# --- what it was made from ---
def _records(runs: Sequence[Run]) -> list[Record]:
    """All records of some rows."""
    return [record for run in runs for record in run.records]


def _provenance(records: Sequence[Record]) -> list[Column]:
    """One row for each stage, code and set of libraries, with the number of files it made."""
    found = [provenance(__name__)]
    for record in records:
        if made := record.data.get("provenance"):
            found += [made, *made.get("statistics", {}).values()]
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


def _calibration(runs: Sequence[Run]) -> list[Column]:
    """How each calibration's text was read."""
    rows = set()
    for run in runs:
        for made in run.statistics.values():
            said = ", ".join(f"{key} {value}" for key, value in sorted(settings(made).items()))
            rows.add((run.place.model, run.place.calibration, said))
    return text_columns(("model", "calibration", "settings"), sorted(rows))


def checkout() -> dict[str, Any] | None:
    """Commit of the checkout that contains this code, and whether it has uncommitted changes.

    None if git is not installed, or if the repository around this code does not track it.
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
    """The results folder as targets name it, without paths of this machine."""
    return Path(results.name) if results.is_absolute() else results


def _rebuild_table(
    results: Path,
    tables: Path,
    names: Sequence[str],
    runs: Sequence[Run],
    frontiers: Sequence[Path],
) -> dict[str, Any]:
    """The files of the table itself, as Snakemake targets."""
    files = [tables / f"{name}.csv" for name in names]
    if missing := [path for path in files if not path.is_file()]:
        raise A3Error(f"{missing[0]}: no such file. Build the table first.")
    targets = [_root(results) / "tables" / tables.name / path.name for path in files]
    drawn = {figure["name"] for figure in read_json(tables / "figures" / "captions.json")}
    for place in dict.fromkeys(Place(run.place.model, run.place.calibration) for run in runs):
        if f"spectra-{place.model}-{place.calibration}" in drawn:
            files.append(place.spectra(results))
            targets.append(place.spectra(_root(results)))
    for path in frontiers:
        files.append(path)
        targets.append(_root(results) / "frontiers" / Path(*path.parts[-3:]))
    return {
        "title": f"Table {tables.name}, its comparisons, seeds and timings, spectra and frontiers",
        "targets": [(t.as_posix(), sha256(f)) for t, f in zip(targets, files, strict=True)],
    }


def _rebuild(results: Path, run: Run) -> dict[str, Any]:
    """The files behind a row, as Snakemake targets."""
    place = run.place
    ratio = "" if place.ratio == NO_RATIO else f", ratio {place.ratio}"
    how = "" if place.is_dense else f"{ratio}, calibration {place.calibration}"
    targets = [
        ((_root(results) / record.path.relative_to(results)).as_posix(), record[SEAL])
        for record in run.records
    ]
    return {
        "title": f"{place.model}: {place.method}{how}",
        "weights_sha256": run.weights["weights_sha256"],
        "targets": targets,
    }
