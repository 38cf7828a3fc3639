"""Draw docs/perplexity.png, the README's figure, from the table of docs/modes.md.

python docs/figure.py
"""

import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
STYLES = {"A3": ("#888888", "o"), "MoDeGPT": ("#00798c", "s"), "a3-plus": ("#d1495b", "D")}
DENSE = 16.7


def curves() -> tuple[list[float], dict[str, list[list[float]]]]:
    """Ratios; of each method the perplexities, mean shares and worst shares at these ratios."""
    text = (HERE / "modes.md").read_text()
    table = text[text.index("| | 0.1 |") :].split("\n\n")[0].splitlines()
    ratios = [float(cell) for cell in re.findall(r"[\d.]+", table[0])]
    found = {}
    for line in table[2:]:
        name, *cells = [cell.strip(" *`") for cell in line.strip("|").split("|")]
        numbers = [list(map(float, cell.split(" / "))) for cell in cells]
        found[name] = [list(one) for one in zip(*numbers, strict=True)]
    return ratios, found


def main() -> None:
    """Two panels over the share removed: perplexity, and the share of A3's increase by kind."""
    ratios, found = curves()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, layout="constrained")
    for name, (colour, marker) in STYLES.items():
        perplexity, mean, worst = found[name]
        left.plot(ratios, perplexity, color=colour, marker=marker, label=name)
        if name == "A3":
            right.axhline(1, color=colour, label=name)
            continue
        right.plot(ratios, mean, color=colour, marker=marker, label=f"{name}, mean of kinds")
        right.plot(ratios, worst, color=colour, linestyle=":", label=f"{name}, worst kind")
    left.axhline(DENSE, color="black", linewidth=1, linestyle="--", label="dense")
    left.set(yscale="log", ylabel="perplexity, mean of seven kinds of text")
    left.set_yticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
    right.set(ylim=(0, 1.65), ylabel="increase over dense, as a share of A3's")
    for axes in (left, right):
        axes.set(xlabel="share of each dimension removed")
        axes.set_xticks(ratios)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(
        "SmolLM2-135M without training, at equal parameters and KV cache (lower is better)"
    )
    figure.savefig(HERE / "perplexity.png", dpi=150)


if __name__ == "__main__":
    main()
