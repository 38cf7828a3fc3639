"""What a reader should take from a table, in plain words: the report's first lines."""

from collections.abc import Sequence

from a3.artifacts.runs import Run
from a3.report.labels import named
from a3.report.tables.paired import WORSE, losses_apart, verdict
from a3.solutions.modes import PRESETS


def advice(dense: Run, runs: Sequence[Run], entry: str) -> str:
    """Which method to take, and what each costs, by the perplexity of a text or set; "" if unclear.

    It compares the rows of each ratio that have the fewest parameters and were not trained or
    quantised, where two methods or more do. A method is recommended that no other one beats by two
    paired standard errors at any ratio; if there are several, that with the lowest perplexity at
    the smallest ratio. Texts of one block have no standard error and recommend nothing.
    """
    by_ratio = {ratio: smallest(own) for ratio, own in rivals(runs).items()}
    by_ratio = {r: own for r, own in by_ratio.items() if len({x.place.method for x in own}) > 1}
    if not by_ratio or any(no_error(run, entry) for own in by_ratio.values() for run in own):
        return ""
    unbeaten = set.intersection(*(level_with_best(own, entry) for own in by_ratio.values()))
    costs = "; ".join(
        f"at {ratio}, {', '.join(said(run, entry) for run in in_order(own, entry))}"
        for ratio, own in by_ratio.items()
    )
    dense_said = f"Perplexity on {entry}, dense {dense.perplexity[entry]['perplexity']:.1f}"
    if not unbeaten:
        return f"No method is the best at every ratio. {dense_said}; {costs}."
    best = next(
        run for run in in_order(by_ratio[min(by_ratio)], entry) if run.place.method in unbeaten
    )
    name = named(best.place.method)
    preset = f" (--preset {name})" if name in PRESETS else ""
    return (
        f"Take {name}{preset}: at no ratio does a method here lose significantly less. "
        f"{dense_said}; {costs}."
    )


def rivals(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Rows by their one ratio, ascending, without trained and quantised ones."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.place.nominal or 0):
        if run.place.nominal and not (run.place.is_healed or run.place.is_quantised):
            found.setdefault(run.place.ratio, []).append(run)
    return found


def smallest(runs: Sequence[Run]) -> list[Run]:
    """Rows with the fewest parameters: what compresses fewer components loses and saves less."""
    fewest = min(run.size["parameters"] for run in runs)
    return [run for run in runs if run.size["parameters"] <= 1.005 * fewest]


def in_order(runs: Sequence[Run], entry: str) -> list[Run]:
    """Rows by their perplexity, the best first."""
    return sorted(runs, key=lambda run: run.perplexity[entry]["perplexity"])


def level_with_best(runs: Sequence[Run], entry: str) -> set[str]:
    """Methods that are not significantly worse than the best row over the blocks."""
    best = in_order(runs, entry)[0]
    return {run.place.method for run in runs if run is best or is_level(best, run, entry)}


def is_level(best: Run, other: Run, entry: str) -> bool:
    """Whether another result is not significantly worse than the best one over the blocks."""
    return verdict(**losses_apart(best, other, entry), lower_is_better=True) != WORSE


def said(run: Run, entry: str) -> str:
    """A method with its perplexity."""
    return f"{named(run.place.method)} {run.perplexity[entry]['perplexity']:.1f}"


def no_error(run: Run, entry: str) -> bool:
    """Whether a text has one block only."""
    return any(len(run.texts[text]["block_nll"]) < 2 for text in run.texts_of(entry))
