#!/usr/bin/env bash
# Guess: with svg.hashsalt set and no date, drawings that are equal as written give equal SVG files: the ids in them are
#        hashes of what they name.
# What happens: the id of a clipping rectangle is a hash of its unrounded floats, while the file holds them to six
#        digits. Axes at 0.1 + 0.2 and at 0.3 give files that differ in this id alone. With layout="tight" one and
#        the same figure, saved twice, gives two such files: the second layout starts from the first and ends some
#        1e-14 points beside it. Ids of markers, hashes of the text that is written, stay.
# Versions: matplotlib 3.11.2, numpy 2.4.6.
# Who is hit: figures kept under version control, compared byte by byte in tests, or named by their hash: a rounding in
#        the layout (another order of sums, another processor's kernels) changes files that draw the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q matplotlib==3.11.2 numpy==2.4.6
cat > "$folder/clips.py" <<'PY'
import difflib
import io
import re

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams["svg.hashsalt"] = "fixed"


def written(figure: Figure) -> str:
    """The figure as SVG, without its date."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def placed(left: float) -> Figure:
    """A figure with one axes that starts here."""
    figure = Figure(figsize=(4, 3))
    figure.add_axes((left, 0.1, 0.6, 0.8)).plot([1, 2, 3], marker="o")
    return figure


def compare(name: str, one: str, other: str) -> None:
    """Show where two files differ: in the ids of clipping rectangles alone."""
    print(f"{name}: {'equal' if one == other else 'not equal'}")
    for line in difflib.unified_diff(one.splitlines(), other.splitlines(), n=0, lineterm=""):
        if ids := re.findall(r'clip-path="url\(#p\w+\)"|<clipPath id="\w+"', line):
            print("   ", line[0], ids[0])
    without = [re.sub(r"\bp[0-9a-f]{10}\b", "ID", text) for text in (one, other)]
    assert one != other and without[0] == without[1]


assert written(placed(0.3)) == written(placed(0.3))
print("axes at 0.3 and at 0.3: equal")
compare("axes at 0.3 and at 0.1 + 0.2", written(placed(0.3)), written(placed(0.1 + 0.2)))
figure = Figure(figsize=(4.1, 3.3), layout="tight")
for axes in figure.subplots(1, 2):
    axes.plot([1, 2, 3])
    axes.set_xlabel("time")
    axes.set_ylabel("x")
compare('one figure with layout="tight", saved twice', written(figure), written(figure))
PY
"$folder/venv/bin/python" "$folder/clips.py"
