"""The one grammar of result paths: written, read back, and refused where it is none."""

from pathlib import Path

import pytest

from a3.artifacts.places import Place, SurgeryPlace, collected_on, place_of
from a3.core.errors import A3Error

RESULTS = Path("some/results")
WHOLE = ("dense", "dense", "dense")
PLACES = {
    "m/dense": Place("m"),
    "m/c/a+b+d/0.2": Place("m", "c", "a", "b", "d", "0.2"),
    "m/c/a@6+b~+dense/-": Place("m", "c", "a@6", "b~", "dense", "-"),
    "m/c/a+b+d/0.2/w4a8+qera@32": Place("m", "c", "a", "b", "d", "0.2", "w4a8+qera@32"),
    "m/c/dense+dense+dense/-/w4a8+none": Place("m", "c", *WHOLE, "-", "w4a8+none"),
    "m/c/a+b+d/0.2/heal-ten.min": Place("m", "c", "a", "b", "d", "0.2", heal="ten.min"),
    # A recipe may begin like a training.
    "m/c/a+b+d/0.2/heal-x+qera@32": Place("m", "c", "a", "b", "d", "0.2", "heal-x+qera@32"),
    "m/c/pca-separate/variance@0.9": SurgeryPlace(
        "m", "c", mode="pca-separate", size="variance@0.9"
    ),
    # As the workflow's rules spell them.
    "{m}/{c}/{a}+{b}+{d}/{r}": Place("{m}", "{c}", "{a}", "{b}", "{d}", "{r}"),
}


@pytest.mark.parametrize(("text", "place"), PLACES.items())
def test_what_is_written_is_read_back(text, place):
    assert place.format() == text
    assert Place.parse(text) == place
    assert type(place).__name__ == type(Place.parse(text)).__name__


@pytest.mark.parametrize(("text", "place"), PLACES.items())
def test_every_file_of_a_row_names_it(text, place):
    files = [
        place.perplexity(RESULTS, "t.1"),
        place.harness(RESULTS, "t"),
        place.speed(RESULTS, "s"),
    ]
    files += [] if place.is_dense else [place.weights(RESULTS)]
    files += [path for path in [place.allocation(RESULTS)] if path]
    files += [place.generation(RESULTS)] if isinstance(place, SurgeryPlace) else []
    for path in files:
        assert place_of(RESULTS, path) == place
    if not place.is_dense:
        found = collected_on(RESULTS, place.rxx(RESULTS, "k"))
        # A trained row has the statistics of the row that it was made from.
        solved = place.base if place.is_healed else place
        assert found.format() == solved.base.format()


def test_losses_by_rank_are_of_the_modes_that_eliminate():
    for modes, folder in (
        (("fisher~", "xkv", "obs@0.3"), "fisher+dense+obs"),
        (("fisher", "joint~", "dense"), "fisher+joint+dense"),
        (("qk", "xkv", "ls"), None),
    ):
        expected = RESULTS / "losses/m/c" / folder if folder else None
        assert Place("m", "c", *modes, "0.2").losses(RESULTS) == expected


def test_shards_of_statistics_are_of_the_dense_model():
    path = RESULTS / "rxx/m/c/shards/0of4/v_blocks.safetensors"
    assert collected_on(RESULTS, path) == Place("m")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "m",
        "m/c",
        "m/dense/a+b+d/0.2/x/y",
        "m/c/a+b/0.2",
        "m/c/a+b+d",
        "m/c/pca/x/low+qera",
        "/",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(A3Error, match="expected MODEL/dense"):
        Place.parse(text)
