"""Commands that evaluate: a3 eval ppl, fit, harness, generation, speed, and a3 compare."""

import tempfile
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli import options as values
from a3.cli.arguments import (
    ANY_MODEL,
    DRAWN,
    JOINS,
    NAMED_TEXT,
    SEED,
    SMALL_MODEL,
    TEXT,
    add,
    add_blocks,
    add_components,
    add_group,
    add_model,
    add_multiple,
    add_out,
    add_run,
    add_seed,
    add_stream,
    add_text,
    add_wheels,
    entry,
    folder,
    ratio,
)
from a3.cli.options import count
from a3.core.errors import A3Error
from a3.core.extras import require_installed
from a3.solutions.modes import COMPONENTS

# What a3 compare lets models continue: a fact, a story, code.
PROMPTS = ("The capital of France is", "Once upon a time, a fox", "def is_prime(n):")


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    subcommands = add_group(
        commands,
        "eval",
        "measure perplexity, benchmark scores, generated text or speed",
        "Each kind reads models and writes one JSON record of result and provenance.",
        "a3 eval ppl small --text other-text.txt -o ppl.json",
    )
    add_perplexity(subcommands)
    add_fit(subcommands)
    add_harness(subcommands)
    add_generation(subcommands)
    add_speed(subcommands)
    add_compare(commands)


def perplexity(
    model: Path,
    text: list[Path],
    out: Path,
    name: list[str],
    source: list[Path],
    **settings: Any,
) -> None:
    """Score perplexity."""
    from a3.stages.evaluate.perplexity import Scored, perplexity

    for option, given in (("--name", name), ("--source", source)):
        if given and len(given) != len(text):
            raise A3Error(
                f"{option}: found {len(given)}, expected one for each of {len(text)} texts."
            )
    names = name or [path.stem for path in text]
    sources: Sequence[Path | None] = source or [None] * len(text)
    perplexity(folder(model), list(map(Scored, names, text, sources)), out, **settings)


def add_perplexity(commands: Any) -> None:
    """Arguments of a3 eval ppl."""
    one = add(
        commands,
        "ppl",
        perplexity,
        "measure perplexity on texts",
        "Reads a model and a text, scores blocks of the text, and writes perplexity, its standard "
        "error and the loss of each block. Several texts are scored in one pass over the weights; "
        "the result has each text's scores, the mean over texts, and the worst text. Use texts "
        "that the model was not calibrated on.",
        "a3 eval ppl small --text other-text.txt --tokens all -o ppl.json",
    )
    add_model(one, ANY_MODEL)
    one.add_argument("--text", type=Path, nargs="+", required=True, metavar="TEXT", help=TEXT)
    text_ = "names of the texts to record (default: the files' names)"
    one.add_argument("--name", nargs="+", default=[], metavar="NAME", help=text_)
    text_ = "name of the split to record"
    one.add_argument("--split", default="test", metavar="NAME", help=text_)
    text_ = "records of a3 text (docs.json) that say where the texts are from"
    one.add_argument("--source", type=Path, nargs="+", default=[], metavar="FILE", help=text_)
    text_ = "what to put between two documents"
    one.add_argument("--join", choices=JOINS, default=JOINS[0], help=text_)
    add_out(one, targets.PERPLEXITY, "FILE", "JSON file to write")
    add_stream(one)
    add_blocks(one, tokens=16384, seed=False, scored=True)
    text_ = f"{DRAWN}; by default documents stay in order"
    one.add_argument("--seed", type=SEED, metavar="N", help=text_)
    add_run(one)


def fit(model: Path, small: Path, text: Path, out: Path, **settings: Any) -> None:
    """Measure the loss on calibration and dev text."""
    from a3.stages.evaluate.fit import fit

    fit(folder(model), folder(small), text, out, **settings)


def add_fit(commands: Any) -> None:
    """Arguments of a3 eval fit."""
    one = add(
        commands,
        "fit",
        fit,
        "measure how much a compressed model is overfitted to its calibration",
        "Reads a dense model and the compressed one, scores a few blocks of the calibration text "
        "and of a dev text, and writes the increases of the loss, beside the predicted one. Give "
        "the calibration's own --tokens, --block-length, --seed and --bos.",
        "a3 eval fit dense small --text docs.jsonl --dev-text dev.jsonl -o fit.json",
    )
    add_model(one)
    one.add_argument("small", type=Path, metavar="SMALL", help=SMALL_MODEL)
    add_text(one)
    text_ = "text that the calibration has not seen"
    one.add_argument("--dev-text", type=Path, metavar="TEXT", help=text_)
    text_ = "ranks that a3 allocate wrote, for modes marked ~; they say the predicted loss"
    one.add_argument("--allocation", type=Path, metavar="FILE", help=text_)
    text_ = "number of blocks of each text"
    one.add_argument("--blocks", type=count(), default=4, metavar="N", help=text_)
    add_out(one, targets.FIT, "FILE", "JSON file to write")
    add_stream(one)
    add_run(add_blocks(one, tokens=32768, seed=True))


def harness(model: Path, task: str, out: Path, **settings: Any) -> None:
    """Run one lm-eval task."""
    require_installed("lm_eval", "eval")
    from a3.stages.evaluate.harness import harness

    harness(folder(model), task, out, **settings)


def add_harness(commands: Any) -> None:
    """Arguments of a3 eval harness."""
    one = add(
        commands,
        "harness",
        harness,
        "run one task of lm-eval",
        "Reads a model and a task (of lm-eval, a YAML file, or items that a3 items made), and "
        "writes the task's scores, with one score for each item.",
        "a3 eval harness small --task arc_challenge --shots 25 -o arc.json",
    )
    add_model(one, ANY_MODEL)
    text_ = "name of the task in lm-eval; any name for a local task"
    one.add_argument("--task", required=True, metavar="NAME", help=text_)
    text_ = "local task: items.jsonl (query, choices, gold)"
    one.add_argument("--items", type=Path, metavar="FILE", help=text_)
    text_ = "local task: a YAML file as lm-eval reads it, with its data files"
    one.add_argument("--yaml", type=Path, metavar="FILE", help=text_)
    text_ = "score to report (default: the first of the task)"
    one.add_argument("--metric", metavar="NAME", help=text_)
    text_ = "number of examples to show (default: as the task says)"
    one.add_argument("--shots", type=count(0), metavar="N", help=text_)
    text_ = "ask only the first N items"
    one.add_argument("--limit", type=count(), metavar="N", help=text_)
    add_seed(one)
    text_ = "put the prompt into the tokenizer's chat template, or into the one of this name"
    one.add_argument(
        "--apply-chat-template", nargs="?", const=True, default=False, metavar="NAME", help=text_
    )
    text_ = "with a chat template: show each example as a turn of the chat"
    one.add_argument("--fewshot-as-multiturn", action="store_true", help=text_)
    text_ = "instruction to put before the prompt"
    one.add_argument("--system-instruction", metavar="TEXT", help=text_)
    add_out(one, targets.HARNESS, "FILE", "JSON file to write")
    add_run(one)


def generation(model: Path, out: Path, **settings: Any) -> None:
    """Continue a prompt."""
    from a3.stages.evaluate.generation import generation

    generation(folder(model), out, **settings)


def add_generation(commands: Any) -> None:
    """Arguments of a3 eval generation."""
    one = add(
        commands,
        "generation",
        generation,
        "continue a prompt, greedily",
        "Reads a model and a prompt, and writes the text that the model generates.",
        'a3 eval generation small --prompt "A river is" -o text.json',
    )
    add_model(one, ANY_MODEL)
    text_ = "raw prompt, no chat template"
    one.add_argument("--prompt", type=values.unicode, required=True, metavar="TEXT", help=text_)
    add_new_tokens(one, 40)
    add_out(one, targets.GENERATION, "FILE", "JSON file to write")
    add_run(one)


def add_new_tokens(one: Any, default: int) -> None:
    """How long generation goes on."""
    text_ = "number of tokens to generate"
    one.add_argument("--new-tokens", type=count(), default=default, metavar="N", help=text_)


def speed(
    models: list[Path], ratio: list[str], beside: list[str], layers: int | None, **options: Any
) -> None:
    """Benchmark several models, interleaved."""
    from a3.stages.evaluate.speed import speed

    modes = {component: options.pop(component) for component in COMPONENTS}
    methods = [modes, *(dict.fromkeys(COMPONENTS, mode) for mode in beside)]
    rows = [method | {"ratio": one} for method in methods for one in ratio]
    speed([folder(model) for model in models], rows=rows, layers=layers, **options)


def add_speed(commands: Any) -> None:
    """Arguments of a3 eval speed."""
    one = add(
        commands,
        "speed",
        speed,
        "benchmark several models, interleaved",
        "Reads a dense model and smaller ones, and times prefill and decoding in turns in one "
        "process. With --ratio it needs config.json only: it builds the models of these ratios "
        "with random weights. Writes tokens/s, memory and KV-cache sizes.",
        "a3 eval speed dense small --batch 1 --prompt 256 -o speed.json",
    )
    text_ = "Hugging Face folders, the dense one first; with --ratio one folder"
    one.add_argument("models", type=Path, nargs="+", metavar="MODEL", help=text_)
    text_ = "time the dense model and those of these ratios, all with random weights"
    one.add_argument("--ratio", type=ratio, nargs="+", default=[], metavar="RATIO", help=text_)
    add_components(one)
    text_ = "with --ratio: also time these two-factor modes on all components: svd-llm …"
    one.add_argument("--beside", nargs="+", default=[], metavar="MODE", help=text_)
    add_multiple(one, nargs="+", default=[1], dest="multiples")
    text_ = "with --ratio: run only N layers, and extrapolate (default: all)"
    one.add_argument("--layers", type=count(), metavar="N", help=text_)
    text_ = "number of sequences at once"
    one.add_argument("--batch", type=count(), default=1, metavar="N", help=text_)
    text_ = "number of tokens of each prompt"
    one.add_argument("--prompt", type=count(), default=256, metavar="N", help=text_)
    add_new_tokens(one, 32)
    text_ = "number of rounds over all models"
    one.add_argument("--repeats", type=count(), default=5, metavar="N", help=text_)
    attention = ["eager", "sdpa"]
    text_ = "implementations of attention in transformers to time"
    one.add_argument("--attention", nargs="+", choices=attention, default=attention, help=text_)
    text_ = "time decoding also compiled (torch.compile, static cache; on a GPU: CUDA graphs)"
    one.add_argument("--compile", action="store_true", help=text_)
    add_out(one, targets.SPEED, "FILE", "JSON file to write")
    add_run(one)


def compare(
    models: list[Path], text: list[str], split: str, wheels: Path | None, json: bool, **options: Any
) -> None:
    """Print a comparison of several models."""
    from a3.report.comparison import markdown
    from a3.stages.evaluate.compare import compare

    if options["task"] is not None:
        require_installed("lm_eval", "eval")
    elif options["items"] is not None:
        raise A3Error("--items: items of which task? Name it (--task).")
    folders = [folder(model) for model in models]
    with tempfile.TemporaryDirectory(prefix="a3-compare-") as work:
        texts = make_texts(text, split, wheels, Path(work))
        record = compare(folders, texts, **options)
    print(dumps(record, indent=2, ensure_ascii=False) if json else markdown(record))


def make_texts(words: list[str], split: str, wheels: Path | None, work: Path) -> list[Any]:
    """The texts that a user names, made in the folder `work`, where wheels go without `wheels`."""
    from a3.stages.evaluate.perplexity import Scored
    from a3.stages.inputs.catalogued import make_text

    found = []
    for number, word in enumerate(words):
        made = work / f"{number}.jsonl"
        make_text(entry(word, "texts"), wheels or work, made, split)
        found.append(Scored(Path(word).stem, made))
    return found


def add_compare(commands: Any) -> None:
    """Arguments of a3 compare."""
    one = add(
        commands,
        "compare",
        compare,
        "show models side by side: sizes, perplexity, speed, text",
        "Reads a model, usually the dense one, and others, and prints one table: sizes, and on "
        "texts perplexity, bits a byte, the paired increase of the loss and how far predictions "
        "are from the first model's; then how each model continues prompts. Writes nothing.",
        "a3 compare dense small --text web code --speed",
    )
    text_ = "Hugging Face folders, dense or compressed; the first is what others are compared to"
    one.add_argument("models", type=Path, nargs="+", metavar="MODEL", help=text_)
    text_ = f"texts to score: each a {NAMED_TEXT}"
    one.add_argument("--text", nargs="+", default=[], metavar="TEXT", help=text_)
    text_ = "name of the split to record, and of a text of the catalogue to score: dev or test"
    one.add_argument("--split", choices=("dev", "test"), default="test", metavar="NAME", help=text_)
    add_wheels(one)
    text_ = "prompts to continue greedily"
    one.add_argument(
        "--prompt",
        nargs="*",
        dest="prompts",
        type=values.unicode,
        default=list(PROMPTS),
        metavar="TEXT",
        help=text_,
    )
    add_new_tokens(one, 24)
    text_ = "time prefill and decoding too"
    one.add_argument("--speed", action="store_true", help=text_)
    text_ = "score a task too: name of the task in lm-eval; any name for a local task"
    one.add_argument("--task", metavar="NAME", help=text_)
    text_ = "local task: items.jsonl (query, choices, gold)"
    one.add_argument("--items", type=Path, metavar="FILE", help=text_)
    text_ = "print JSON, with all digits and the loss of each block"
    one.add_argument("--json", action="store_true", help=text_)
    add_blocks(one, tokens=8192, seed=False, scored=True)
    add_run(one)
