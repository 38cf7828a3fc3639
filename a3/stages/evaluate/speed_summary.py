"""Summarises the samples of a speed record."""

from typing import Any

import numpy as np
import pandas as pd

PHASES = ("prefill", "decode")


def compared(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a model and attention implementation, with shares of the first model's.

    A share of speed is the median over repeats of that repeat's ratio. iqr is the distance of the
    quartiles. Where layers were left out, speeds are the extrapolated ones.
    """
    first = record["models"][0]
    rows = []
    for model in record["models"]:
        for name in [*record["attention"], *record.get("compiled", [])]:
            row = {"name": model["name"], "attention": name}
            own, base = (
                m["attention"][name].get("extrapolated", m["attention"][name])
                for m in (model, first)
            )
            for phase in PHASES:
                ratios = np.divide(own[phase]["samples"], base[phase]["samples"])
                low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
                row[phase] = own[phase]["median"]
                row[f"{phase}_iqr"] = own[phase]["quartiles"][1] - own[phase]["quartiles"][0]
                row[f"{phase}_ratio"] = middle
                row[f"{phase}_ratio_iqr"] = high - low
            row["weights_bytes"] = model["weights_bytes"]
            row["cache_bytes"] = model["cache_bytes"]
            row["peak_memory_bytes"] = model["attention"][name]["peak_memory_bytes"]
            for key in ("parameters", "kv_bytes_per_token", "flops_per_token"):
                row[key] = model["size"][key]
                row[f"{key}_ratio"] = model["size"][key] / first["size"][key]
            paper = "flops_per_token_paper"
            row[paper] = model[paper]
            row[f"{paper}_ratio"] = model[paper] / first[paper]
            rows.append(row)
    return rows


def summary(record: dict[str, Any]) -> str:
    """The rows as a readable table."""
    frame = pd.DataFrame(
        {
            "model": row["name"],
            "attention": row["attention"],
            **{f"{phase} tokens/s": shown(row, phase) for phase in PHASES},
            **{f"{phase} ratio": shown(row, f"{phase}_ratio") for phase in PHASES},
            "parameters": f"{row['parameters_ratio']:.3f}",
            "KV cache": f"{row['kv_bytes_per_token_ratio']:.3f}",
            "FLOPs": f"{row['flops_per_token_ratio']:.3f}",
        }
        for row in compared(record)
    )
    layers = record["layers"]
    said = f"; extrapolated from {layers['timed']} of {layers['of']} layers" if layers else ""
    return (
        f"{frame.to_string(index=False)}\n"
        f"medians of {record['repeats']} ± distance of the quartiles{said}; "
        f"{record['threads']} threads of {record['device_name']}"
    )


def shown(row: dict[str, Any], key: str) -> str:
    """A median and its spread, with as many places as a number of its size needs."""
    places = ".1f" if row[key] >= 10 else ".3f"
    return f"{row[key]:{places}} ± {row[f'{key}_iqr']:{places}}"
