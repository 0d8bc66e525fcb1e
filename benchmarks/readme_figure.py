"""The README's figure, from committed results: how much is saved, and how near the gradients are to dense ones.

    python benchmarks/readme_figure.py

Every point is of backrazor_gradients.json; dense and checkpointing have exact gradients, so that theirs is 1.
"""

import json
from pathlib import Path

from memtrain_common.measuring.plots import COLOURS, new_figure, save_figure

RESULTS = Path(__file__).parent / "results"
PICTURE = RESULTS / "readme_figure.png"


def main() -> None:
    results = json.loads((RESULTS / "backrazor_gradients.json").read_text())["results"]
    figure, axes = new_figure(height=3.6, width=7.6)
    for colour, (name, found) in zip(COLOURS, results.items(), strict=False):
        points = [(k, v["times_less"], v["least"]) for k, v in found.items() if isinstance(v, dict)]
        dial = sorted((x, y) for k, x, y in points if k.startswith("low-bit") and "," not in k)
        axes.plot(*zip(*[(1.0, 1.0), *dial], strict=True), "o-", color=colour, markersize=4, label=name)
        for way, marker in (("pruned 0.1", "s"), ("paper 0.1", "^")):
            place = next((x, y) for k, x, y in points if k == way)
            axes.plot(*place, marker, color=colour, markersize=5, markerfacecolor="none")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("times less saved for the backward pass (1× is dense)")
    axes.set_ylabel("cosine with the dense gradient,\nthe worst kind of weight")
    axes.plot([], [], "ko-", markersize=4, label="Back Razor, keep 0.125 to 0.03")
    axes.plot([], [], "ks", markerfacecolor="none", markersize=5, label="pruned to a tenth (mode pruned)")
    axes.plot([], [], "k^", markerfacecolor="none", markersize=5, label="the paper's storage (mode paper)")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.01, 0.9))
    save_figure(figure, PICTURE)


if __name__ == "__main__":
    main()
