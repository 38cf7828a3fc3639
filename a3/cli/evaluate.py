"""Commands that evaluate: a3 eval ppl, harness, generation, speed."""

from pathlib import Path
from typing import Any

from a3.artifacts import targets
from a3.cli import options as values
from a3.cli.arguments import (
    JOINS,
    SEED,
    TEXT,
    add,
    add_blocks,
    add_components,
    add_out,
    add_run,
    folder,
    ratio,
)
from a3.cli.options import count
from a3.core.extras import require_installed
from a3.solutions.modes import COMPONENTS


def add_commands(commands: Any) -> None:
    """All commands of this file."""
    evaluate = commands.add_parser(
        "eval", help="perplexity, harness, generation or speed", description="Evaluate."
    )
    kinds = evaluate.add_subparsers(metavar="KIND", required=True)
    add_perplexity(kinds)
    add_harness(kinds)
    add_generation(kinds)
    add_speed(kinds)


def perplexity(model: Path, text: Path, out: Path, name: str | None, **settings: Any) -> None:
    """Score perplexity."""
    from a3.stages.evaluate.perplexity import perplexity

    perplexity(folder(model), text, out, name=name or text.stem, **settings)


def add_perplexity(kinds: Any) -> None:
    """Arguments of a3 eval ppl."""
    one = add(kinds, "ppl", perplexity, "perplexity on a text's blocks")
    one.add_argument("model", type=Path, help="dense or compressed Hugging Face folder")
    one.add_argument("--text", type=Path, required=True, help=TEXT)
    one.add_argument("--name", help="what the result calls the text (default: the file's name)")
    one.add_argument("--split", default="test", help="name of the split to record")
    one.add_argument("--source", type=Path, help="docs.json: where the text is from")
    text_ = "between two documents"
    one.add_argument("--join", choices=JOINS, default=JOINS[0], help=text_)
    add_out(one, targets.PERPLEXITY, "result, JSON")
    add_run(add_blocks(one, tokens=16384, seed=False, scored=True))


def harness(model: Path, task: str, out: Path, **settings: Any) -> None:
    """Run one lm-eval task."""
    require_installed("lm_eval", "eval")
    from a3.stages.evaluate.harness import harness

    harness(folder(model), task, out, **settings)


def add_harness(kinds: Any) -> None:
    """Arguments of a3 eval harness."""
    one = add(kinds, "harness", harness, "one task of lm-eval")
    one.add_argument("model", type=Path, help="dense or compressed Hugging Face folder")
    one.add_argument("--task", required=True, help="lm-eval's name; of a local task any")
    one.add_argument("--items", type=Path, help="items.jsonl (query, choices, gold); offline")
    one.add_argument("--yaml", type=Path, help="a local task, with its data files; offline")
    one.add_argument("--metric", help="score reported (default: the task's first)")
    one.add_argument("--shots", type=count(0), help="examples shown (default: the task's)")
    one.add_argument("--limit", type=count(), help="only the first items")
    one.add_argument("--seed", type=SEED, default=0, help="chooses the examples shown")
    text_ = "put the prompt into the tokenizer's chat template, or into that of this name"
    one.add_argument(
        "--apply-chat-template", nargs="?", const=True, default=False, metavar="NAME", help=text_
    )
    text_ = "with a chat template: examples as turns of the chat, not in one turn of the user"
    one.add_argument("--fewshot-as-multiturn", action="store_true", help=text_)
    one.add_argument("--system-instruction", metavar="TEXT", help="put before the prompt")
    add_out(one, targets.HARNESS, "result, JSON")
    add_run(one)


def generation(model: Path, out: Path, **settings: Any) -> None:
    """Continue a prompt."""
    from a3.stages.evaluate.generation import generation

    generation(folder(model), out, **settings)


def add_generation(kinds: Any) -> None:
    """Arguments of a3 eval generation."""
    one = add(kinds, "generation", generation, "what a model says to a prompt, greedily")
    one.add_argument("model", type=Path, help="dense or compressed Hugging Face folder")
    one.add_argument(
        "--prompt",
        type=values.unicode,
        required=True,
        help="taken as it is, without a chat template",
    )
    one.add_argument("--new-tokens", type=count(), default=40, help="at most")
    add_out(one, targets.GENERATION, "result, JSON")
    add_run(one)


def speed(
    models: list[Path], ratio: list[str], beside: list[str], layers: int | None, **options: Any
) -> None:
    """Time models beside each other."""
    from a3.stages.evaluate.speed import speed

    modes = {component: options.pop(component) for component in COMPONENTS}
    methods = [modes, *(dict.fromkeys(COMPONENTS, mode) for mode in beside)]
    rows = [method | {"ratio": one} for method in methods for one in ratio]
    speed([folder(model) for model in models], rows=rows, layers=layers, **options)


def add_speed(kinds: Any) -> None:
    """Arguments of a3 eval speed."""
    one = add(kinds, "speed", speed, "tokens/s of models, interleaved in one process")
    text_ = "Hugging Face folders, the dense one first; with --ratio one, config.json is enough"
    one.add_argument("models", type=Path, nargs="+", help=text_)
    text_ = "time the dense model and those of these ratios, all with random weights"
    one.add_argument("--ratio", type=ratio, nargs="+", default=[], help=text_)
    add_components(one)
    text_ = "with --ratio: also a mode that factors the matrices of all components: svd-llm …"
    one.add_argument("--beside", nargs="+", default=[], metavar="MODE", help=text_)
    text_ = "with --ratio: each of them with ranks that are multiples of 1, of 64 …"
    one.add_argument("--multiples", type=count(), nargs="+", default=[1], help=text_)
    text_ = "with --ratio: run only so many layers, and extrapolate (default: all)"
    one.add_argument("--layers", type=count(), help=text_)
    one.add_argument("--batch", type=count(), default=1, help="sequences")
    one.add_argument("--prompt", type=count(), default=256, help="tokens of each, put in at once")
    one.add_argument("--new-tokens", type=count(), default=32, help="tokens of each, one by one")
    one.add_argument("--repeats", type=count(), default=5, help="rounds over all models")
    attention = ["eager", "sdpa"]
    text_ = "transformers' implementations"
    one.add_argument("--attention", nargs="+", choices=attention, default=attention, help=text_)
    add_out(one, targets.SPEED, "result, JSON")
    add_run(one)
