"""Damaged files by the thousand for every reader: how many were refused, none silently taken.

    python benchmarks/fuzz.py --cases 500

The cases are those of tests/helpers/fuzz.py, from other seeds than the tests take. Exits with 1
where a reader raised anything but the clear error, or gave what a damaged file did not hold.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/helpers"))

from fuzz import READERS, fuzz, prepare

FIRST_SEED = 1_000_000


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--cases", type=int, default=500, help="of each reader")
    arguments.add_argument("--readers", nargs="*", default=list(READERS), choices=list(READERS))
    options = arguments.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        print("| reader | tried | refused | same content | other input | faults | s |")
        print("|---|---|---|---|---|---|---|")
        for title in options.readers:
            start = time.perf_counter()
            outcome = fuzz(folder, READERS[title], options.cases, FIRST_SEED)
            counts = [outcome.counts[key] for key in ("refused", "same", "other", "fault")]
            cells = [title, sum(counts), *counts, round(time.perf_counter() - start)]
            print("|", " | ".join(map(str, cells)), "|", flush=True)
            for fault in outcome.faults:
                print(f"    {fault[:300]}", flush=True)
            faults += len(outcome.faults)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
