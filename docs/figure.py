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
DENSE = {"summaries": 17.1, "speeches": 32.9}


def curves() -> tuple[list[float], dict[str, list[list[float]]]]:
    """Ratios, and of each method its perplexities on summaries and on speeches."""
    text = (HERE / "modes.md").read_text()
    table = text[text.index("| | 0.1 |") :].split("\n\n")[0].splitlines()
    ratios = [float(cell) for cell in re.findall(r"[\d.]+", table[0])]
    found = {}
    for line in table[2:]:
        name, *cells = [cell.strip(" *`") for cell in line.strip("|").split("|")]
        if name in STYLES:
            numbers = [list(map(float, cell.split(" / ")[:2])) for cell in cells]
            found[name] = [list(one) for one in zip(*numbers, strict=True)]
    return ratios, found


def main() -> None:
    """Two panels: perplexity against the share of weights removed."""
    ratios, found = curves()
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, layout="constrained")
    for index, (axes, (text, dense)) in enumerate(zip(panels, DENSE.items(), strict=True)):
        for name, (colour, marker) in STYLES.items():
            axes.plot(ratios, found[name][index], color=colour, marker=marker, label=name)
        axes.axhline(dense, color="black", linewidth=1, linestyle="--", label="dense")
        axes.set(title=f"unseen {text}", xlabel="share of each dimension removed", yscale="log")
        axes.set_xticks(ratios)
        axes.set_yticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity (lower is better)")
    panels[0].legend(frameon=False)
    figure.suptitle("SmolLM2-135M without training, at equal parameters and KV cache")
    figure.savefig(HERE / "perplexity.png", dpi=150)


if __name__ == "__main__":
    main()
