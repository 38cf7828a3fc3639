"""The table of speeds: each compressed run beside the dense model that was timed with it.

It is separate from results.csv, which is byte-identical in two runs.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from a3.artifacts.places import Place
from a3.artifacts.protocols import SPEED_PROTOCOL
from a3.artifacts.runs import read_speeds
from a3.core.records import Record
from a3.report.tables.columns import Column, markdown_table, places_of, spaced, words
from a3.report.tables.frames import frame_of, write_csv, write_text
from a3.stages.evaluate.speed_summary import compared, shown

MEASURED = ("prefill", "prefill_iqr", "decode", "decode_iqr", "weights_bytes", "cache_bytes")


def build_speed_table(
    results: Path, experiments: list[dict[str, str]], speed: list[str], out: Path
) -> None:
    """Write speed.csv (full precision) and speed.md (rounded) into `out`.

    One row a compressed run, entry of `speed` and attention implementation. Raises A3Error as
    `read_speeds` does.
    """
    found = read_speeds(results, experiments, speed)
    rows = [row for place, name, record in found for row in rows_of(place, name, record)]
    frame = frame_of(rows)
    write_csv(out / "speed.csv", frame)
    write_text(out / "speed.md", markdown(frame))


def rows_of(place: Place, name: str, record: Record) -> list[dict[str, Any]]:
    """Rows of speed.csv of one record: what `compared` says of the compressed model."""
    everything = compared(record.data)
    half = len(everything) // 2
    return [
        {
            **place.names,
            "speed": name,
            "attention": own["attention"],
            **{key: value for key, value in own.items() if key not in ("name", "attention")},
            **{f"dense_{key}": dense[key] for key in (*MEASURED, "peak_memory_bytes")},
            **{key: record[key] for key in SPEED_PROTOCOL if key != "attention"},
            "device": record["device_name"],
        }
        for dense, own in zip(everything[:half], everything[half:], strict=True)
    ]


def speed_columns(frame: pd.DataFrame) -> list[Column]:
    """The columns of speed.csv that people compare, rounded."""
    cells = [
        {
            "model": place.model,
            "method (QK + OV + MLP)": spaced(place),
            "ratio": place.ratio,
            "measured": f"{row['speed']}: {row['batch']} × ({row['prompt']} + {row['new_tokens']})",
            "attention": row["attention"],
            "dense prefill tokens/s": shown(row, "dense_prefill"),
            "prefill tokens/s": shown(row, "prefill"),
            "prefill ratio": shown(row, "prefill_ratio"),
            "dense decode tokens/s": shown(row, "dense_decode"),
            "decode tokens/s": shown(row, "decode"),
            "decode ratio": shown(row, "decode_ratio"),
            "parameters kept": f"{row['parameters_ratio']:.1%}",
            "KV cache kept": f"{row['kv_bytes_per_token_ratio']:.1%}",
            "FLOPs kept": f"{row['flops_per_token_ratio']:.1%}",
            "FLOPs kept, by the paper": f"{row['flops_per_token_paper_ratio']:.1%}",
            "on": f"{row['device']}, {row['threads']} threads, {row['dtype']}",
        }
        for place, row in zip(places_of(frame), frame.to_dict("records"), strict=True)
    ]
    return [words(title, [cell[title] for cell in cells]) for title in cells[0]]


def markdown(frame: pd.DataFrame) -> str:
    """The table as GitHub Markdown."""
    return (
        f"{markdown_table(speed_columns(frame))}\n\n"
        "Medians over repeats ± the distance of the quartiles; ratios are to the dense model, "
        "taken within a repeat, in which both run in turn. Measured: sequences × (prompt + new "
        "tokens).\n"
    )
