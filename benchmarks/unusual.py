"""Valid but unusual inputs by the thousand: each equals the dense model at ratio 0, or is refused.

    python benchmarks/unusual.py --cases 2000

The cases are those of tests/helpers/unusual.py, from other seeds than the tests take. Exits with 1
where a compressed model is another one than the dense, or anything but the clear error was raised.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests/helpers"))

from unusual import Ear, unusual

FIRST_SEED = 1_000_000


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--cases", type=int, default=2000)
    arguments.add_argument("--first", type=int, default=FIRST_SEED, help="the first seed")
    options = arguments.parse_args()
    seeds = range(options.first, options.first + options.cases)
    with tempfile.TemporaryDirectory() as name, Ear() as heard:
        outcome = unusual(Path(name), seeds, lambda: heard)
    print(dict(outcome.counts))
    for reason, count in outcome.reasons.most_common():
        print(f"{count:6} refused: {reason}")
    for fault in outcome.faults:
        print(f"fault: {fault}")
    return min(len(outcome.faults), 1)


if __name__ == "__main__":
    sys.exit(main())
