"""Helpers of rules/paper.smk: what its jobs read and are told."""

from a3.core.files import sha256


def paper_groups(table):
    """The groups of rows that a comparison with the paper builds."""
    with correctable():
        models = PAPER.models_of(PAPER.tables[table], C["paper"]["models"])
    return [f"{PAPER_GROUPS}/{table}/{model}.csv" for model in models]


def other_paper_groups(table):
    """The groups that are there beside them, and their content: a change makes a new comparison."""
    there = {str(path) for path in Path(PAPER_GROUPS, table).glob("*.csv")}
    others = sorted(there - set(paper_groups(table)))
    return {path: sha256(Path(path)) for path in others if Path(path).stem in PAPER.models}
