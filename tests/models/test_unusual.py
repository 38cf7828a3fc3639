"""Valid but unusual inputs: the compressed model equals the dense one at ratio 0, or is refused."""

from unusual import Ear, unusual

CASES = 30


def test_unusual_inputs_are_equal_or_refused_by_name(tmp_path):
    with Ear() as heard:
        outcome = unusual(tmp_path, range(CASES), lambda: heard)
    assert outcome.faults == []
    assert outcome.counts["equal"] >= CASES / 2
