"""The table of a3 compare: models as columns, what was measured as rows, in Markdown."""

from collections.abc import Callable, Iterator
from typing import Any

from a3.report.tables.rounding import plus_minus, rounded

NOTHING = "–"

# Title, key, and how much of it is shown, of each size.
SIZES: list[tuple[str, str, Callable[[int], str]]] = [
    ("parameters", "parameters", "{:,}".format),
    ("weights, MB", "file_bytes", lambda size: f"{size / 1e6:,.1f}"),
    ("KV cache, bytes a token", "kv_bytes_per_token", "{:,}".format),
    ("MFLOPs a token", "flops_per_token", lambda count: f"{count / 1e6:,.1f}"),
]

# What the words of the table mean.
NOTE = (
    "± is one standard error; increases are paired over blocks, to the first model. KL is KL(first "
    "‖ model) in nats a token; same next token is the share of tokens after which both models find "
    "the same one likeliest."
)


def markdown(record: dict[str, Any]) -> str:
    """What `compare` found, as a table and the continuations of each prompt."""
    models = record["models"]
    rows = [["", *(model["name"] for model in models)], *size_rows(models)]
    if "texts" in models[0]:
        rows += text_rows(models)
    for key, show in (("speed", speed_rows), ("task", task_rows)):
        if key in models[0]:
            rows += show(models)
    said = [table(rows)]
    if "texts" in models[0]:
        said.append(NOTE)
    for number, prompt in enumerate(record["prompts"]):
        lines = [f"**{shown(prompt)}** …"]
        lines += [f"- {model['name']}: {shown(model['continuations'][number])}" for model in models]
        said.append("\n".join(lines))
    return "\n\n".join(said)


def size_rows(models: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Sizes, with the share of the first model's."""
    first = models[0]
    for title, key, show in SIZES:
        # Recurrent layers may have no KV cache.
        others = [f" ({m[key] / first[key]:.1%})" if first[key] else "" for m in models[1:]]
        shares = ["", *others]
        yield [title, *(show(m[key]) + share for m, share in zip(models, shares, strict=True))]


def text_rows(models: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Perplexity, bits per byte, increase of the loss and disagreement, of each text."""

    def increase(text: dict[str, Any]) -> str:
        return plus_minus(f"{text['increase']:+.4f}", text["increase_stderr"])

    for number, text in enumerate(models[0]["texts"]):
        own = [model["texts"][number] for model in models]
        name = text["text"]
        yield [
            f"{name}: perplexity",
            *(plus_minus(rounded(t["perplexity"]), t["perplexity_stderr"]) for t in own),
        ]
        yield [f"{name}: bits a byte", *(f"{t['bits_per_byte']:.3f}" for t in own)]
        found = [increase(t) if "increase" in t else NOTHING for t in own[1:]]
        yield [f"{name}: increase, nats a token", "", *found]
        yield [f"{name}: KL", "", *(f"{t['kl']:.4f}" if "kl" in t else NOTHING for t in own[1:])]
        found = [f"{t['same_top']:.1%}" if "same_top" in t else NOTHING for t in own[1:]]
        yield [f"{name}: same next token", "", *found]


def speed_rows(models: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Tokens a second of prefill and decoding, with the ratio to the first model's."""
    for phase in ("prefill", "decode"):
        found = [f"{m['speed'][phase]:,.1f} (× {m['speed'][f'{phase}_ratio']:.2f})" for m in models]
        yield [f"{phase}, tokens/s", *found]


def task_rows(models: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The score of a harness task."""
    found = [plus_minus(f"{m['task']['value']:.3f}", m["task"]["stderr"]) for m in models]
    yield [f"{models[0]['task']['task']}: {models[0]['task']['metric']}", *found]


def table(rows: list[list[str]]) -> str:
    """Rows of equal lengths, the first of them the heading, as GitHub Markdown."""
    rows = [[shown(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    padded = [
        line(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    rule = line(["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])])
    return "\n".join([padded[0], rule, *padded[1:]])


def shown(text: str) -> str:
    """A text in one line."""
    return " ".join(text.split())
