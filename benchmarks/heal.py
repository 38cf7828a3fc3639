"""Perplexity over minutes of healing: a3 heal with several budgets, of several compressed models.

    python benchmarks/heal.py dense a3-small plus-small --text train.jsonl \
        --score summaries=dev.jsonl news=news.jsonl --minutes 1 3 10 --dtype bfloat16 -o curve

Every point is a training of its own, with its own schedule, as a3 heal --minutes gives it. Writes
curve/heal.csv (a row for each model, budget and text; 0 minutes is the model before training, and
the dense model has rows without minutes) and curve/heal.png, .svg. The CSV is written after each
training; what is in it is not trained again. Needs
matplotlib (the extra workflow).
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import torch

from a3.core.files import read_record
from a3.core.progress import on_terminal
from a3.models.load import load_model, load_tokenizer
from a3.stages.evaluate.perplexity import block_losses
from a3.stages.heal.heal import Settings, heal
from a3.texts.blocks import token_blocks
from a3.texts.reading import load_documents

mpl.use("Agg")
import matplotlib.pyplot as plt

KEYS = ["model", "minutes", "text"]


def scores(folder, texts, options):
    """Mean loss of each text with its standard error over blocks, nats a token."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, "float32").to(options.device)
    for name, path in texts.items():
        cut = (options.block_length, options.score_tokens)
        blocks = token_blocks(load_documents(path), tokenizer, *cut, None, True)
        losses = block_losses(model, blocks.to(options.device))
        error = (losses.std() / len(losses) ** 0.5).item()
        yield {"text": name, "nll": losses.mean().item(), "nll_stderr": error}


def trained(folder, minutes, texts, options):
    """Rows of one training."""
    settings = Settings(
        minutes=minutes,
        tokens=None,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        block_length=options.block_length,
        bos=True,
        dtype=options.dtype,
    )
    with tempfile.TemporaryDirectory(dir=options.out) as name:
        out = Path(name, "healed")
        heal(folder, options.dense, options.text, out, settings, device=options.device)
        said, spent = (read_record(out / f"{one}.json") for one in ("approx", "timing"))
        keys = ("steps", "tokens", "loss_before", "loss_after")
        found = {key: said["healed"][key] for key in keys}
        for row in scores(out, texts, options):
            yield row | found | {"seconds": spent["seconds"]}


def measure(options, texts, path):
    """Rows of all models and budgets, and those of an earlier call; written after each."""
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    known = {(row["model"], row["minutes"]) for row in rows if row["minutes"] >= 0}
    if not any(row["model"] == "dense" for row in rows):
        rows += [{"model": "dense"} | row for row in scores(options.dense, texts, options)]
    for minutes in (0, *options.minutes):
        for folder in options.models:
            if (folder.name, minutes) in known:
                continue
            one = trained(folder, minutes, texts, options) if minutes else ()
            found = one or scores(folder, texts, options)
            rows += [{"model": folder.name, "minutes": minutes} | row for row in found]
            frame = pd.DataFrame(rows)
            frame["perplexity"] = frame["nll"].map(torch.tensor).map(torch.exp).map(float)
            first = [*KEYS, "perplexity"]
            frame[[*first, *frame.columns.drop(first)]].to_csv(path, index=False)


def draw(frame, path):
    """A panel for each text: perplexity against minutes."""
    texts = frame["text"].unique()
    figure, panels = plt.subplots(
        1, len(texts), figsize=(4.2 * len(texts), 3.6), squeeze=False, layout="constrained"
    )
    for axes, text in zip(panels[0], texts, strict=True):
        own = frame[frame["text"] == text]
        dense = own[own["model"] == "dense"]["perplexity"].item()
        axes.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
        for marker, (model, rows) in zip(
            "osD^vP", own[own["model"] != "dense"].groupby("model", sort=False), strict=False
        ):
            rows = rows.sort_values("minutes")
            axes.plot(rows["minutes"], rows["perplexity"], marker=marker, label=model)
        axes.set(title=text, xlabel="minutes of training")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("perplexity (lower is better)")
    panels[0][0].legend(frameon=False)
    for ending in ("png", "svg"):
        figure.savefig(path.with_suffix(f".{ending}"), dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path, help="dense folder, the teacher")
    parser.add_argument("models", type=Path, nargs="+", help="compressed folders")
    parser.add_argument("--text", type=Path, required=True, help="text to train on")
    parser.add_argument("--score", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 3, 10])
    parser.add_argument("--score-tokens", type=int, default=8192)
    parser.add_argument("--block-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    texts = {name: Path(path) for name, path in (word.split("=", 1) for word in options.score)}
    path = options.out / "heal.csv"
    with on_terminal():
        measure(options, texts, path)
    frame = pd.read_csv(path)
    draw(frame, path)
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main()
