"""Helpers of rules/quantise.smk: what its jobs read and are told."""

from a3.solutions.recipes import parse_quantisation


def rxx_to_quantise(wildcards):
    """The statistics that a quantised checkpoint reads, those of its base."""
    place = place_of(wildcards)
    with correctable():
        return [str(place.rxx(Path(RESULTS), kind)) for kind in kinds_to_quantise(place)]


def quantise_options(wildcards):
    """Recipe, method and rank."""
    said = parse_quantisation(wildcards.quantise)
    recipe = json.dumps(entry("quantisations", said.recipe))
    return ["--recipe", recipe, "--method", said.method] + (
        ["--rank", str(said.rank)] if said.rank else []
    )
