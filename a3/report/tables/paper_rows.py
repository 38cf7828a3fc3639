"""One model's rows of a table of the paper."""

from pathlib import Path
from typing import Any

import pandas as pd

from a3.artifacts.places import Place
from a3.artifacts.protocols import HARNESS_PROTOCOL, PERPLEXITY_PROTOCOL, SPEED_PROTOCOL
from a3.artifacts.runs import Run, check_speed, read_runs
from a3.core.errors import A3Error
from a3.core.records import Record
from a3.experiments.paper import KEYS, SPEED, Wanted
from a3.report.tables.frames import frame_of, write_csv
from a3.report.tables.paper_comparison import read_definition

PROTOCOL = {
    "perplexity": PERPLEXITY_PROTOCOL,
    "delta": PERPLEXITY_PROTOCOL,
    "accuracy": HARNESS_PROTOCOL,
} | dict.fromkeys(SPEED, (*SPEED_PROTOCOL, "device_name"))


# --- one model's rows ---
def build_rows(path: Path, model: str, results: Path, out: Path) -> None:
    """Write a model's figures for a table of the paper to `out`, a .csv file, one a line.

    With what they were read from and by what protocol. Raises A3Error as `read_runs` does, and
    where the model has no rows in this table.
    """
    paper, table = read_definition(path)
    wanted = paper.wanted(table, model)
    if not wanted:
        raise A3Error(f"{path}: has no rows that can be built of {model!r}. Name another model.")
    runs = runs_of(wanted, results)
    dense = runs[Place(model)]
    lines = [line(dense, runs[one.place], one, results) for one in wanted]
    for one in wanted:
        if one.cell.quantity == "average":
            own = [x for x in lines if x["measure"].startswith("accuracy ")]
            for average in (x for x in lines if x["measure"] == one.cell.measure):
                same = [x["ours"] for x in own if all(x[key] == average[key] for key in KEYS)]
                average["ours"] = None if None in same else sum(same) / len(same)
    write_csv(out, frame_of(lines))


def runs_of(wanted: list[Wanted], results: Path) -> dict[Place, Run]:
    """The results of every row, held to their weights and to one protocol, the dense ones too."""
    texts = {one.entry: None for one in wanted if one.cell.quantity in ("perplexity", "delta")}
    tasks = {one.entry: None for one in wanted if one.cell.quantity == "accuracy"}
    rows = [vars(one.place) for one in wanted]
    groups = read_runs(results, rows, list(texts), list(tasks))
    return {run.place: run for dense, runs in groups for run in (dense, *runs)}


def line(dense: Run, run: Run, one: Wanted, results: Path) -> dict[str, Any]:
    """One figure of ours: names, value, standard error, source and protocol."""
    record = record_of(run, one, results)
    value, error = measured(dense, run, one, record, results)
    protocol = [f"{k} {record[k]}" for k in PROTOCOL.get(one.cell.quantity, ())]
    return {
        "model": one.cell.model,
        **vars(one.cell.row),
        "measure": one.cell.measure,
        "ours": value,
        "stderr": error,
        "method_of_ours": run.place.method,
        "source": str(record.path),
        "protocol": ", ".join(protocol),
        "weights_sha256": run.weights["weights_sha256"],
    }


def record_of(run: Run, one: Wanted, results: Path) -> Record:
    """The record that a figure of ours is read from."""
    quantity = one.cell.quantity
    if quantity in ("perplexity", "delta"):
        return run.perplexity[one.entry]
    if quantity == "accuracy":
        return run.harness[one.entry]
    if quantity == "seconds" or quantity in SPEED:
        return Record.read(one.files(results)[0])
    return run.weights


def measured(
    dense: Run, run: Run, one: Wanted, record: Record, results: Path
) -> tuple[float | None, float | None]:
    """A figure of ours and its standard error, where it has one.

    The average of accuracies is None here.
    """
    quantity, name = one.cell.quantity, one.cell.name
    if quantity == "perplexity":
        return record["perplexity"], record["perplexity_stderr"]
    if quantity == "delta":
        return delta(dense.perplexity[one.entry], record)
    if quantity == "accuracy":
        return record["value"], record["stderr"]
    if quantity == "error":
        errors = [layer[name]["relative_error"] for layer in run.layers]
        return sum(errors) / len(errors), None
    if quantity == "seconds":
        return sum(layer[name] for layer in record["layers"]), None
    if quantity in SPEED:
        return speed(run, one, record, results), None
    return None, None


def delta(dense: Record, run: Record) -> tuple[float, float]:
    """Perplexity less the dense model's, and its standard error.

    To first order a block adds perplexity × its loss to each, and blocks are the same in both.
    """
    p, q = run["perplexity"], dense["perplexity"]
    pairs = zip(run["block_nll"], dense["block_nll"], strict=True)
    return p - q, float(pd.Series([p * a - q * b for a, b in pairs]).sem())


def speed(run: Run, one: Wanted, record: Record, results: Path) -> float | None:
    """A figure of a speed record; None if the device does not measure it.

    Of a row whose setting is an attention implementation, that one's. Raises A3Error if the
    record is of other weights.
    """
    check_speed(record, Record.read(one.timed.weights(results)))
    dense, own = record["models"] if not run.place.is_dense else record["models"][:1] * 2
    setting = one.cell.row.setting
    attention = setting if setting in record["attention"] else record["attention"][-1]
    rates, dense_rates = own["attention"][attention], dense["attention"][attention]
    if one.cell.quantity == "flops":
        return own["flops_per_token_paper"] / dense["flops_per_token_paper"]
    if one.cell.quantity == "prefill":
        return rates["prefill"]["median"]
    if one.cell.quantity == "memory":
        return rates["peak_memory_bytes"] and rates["peak_memory_bytes"] / 1e6
    return rates["decode"]["median"] - dense_rates["decode"]["median"]
