"""No damaged file is taken for a whole one: some cases for every reader, from a fixed seed."""

import pytest
from fuzz import READERS, fuzz, prepare

CASES = 24
# Of readers that load a whole model each time.
SLOW = {"GGUF": 30, "dense weights, no record": 18, "compressed weights": 18}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("fuzz")
    prepare(made)
    return made


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_by_name(folder, name):
    outcome = fuzz(folder, READERS[name], SLOW.get(name, CASES), seed=0)
    assert outcome.faults == []
    assert outcome.counts["refused"] > 0
