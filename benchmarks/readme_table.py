"""READMEs' tables of ablations, from their committed results: print one, and paste it where it stands.

    python benchmarks/readme_table.py            # the root README's, of ablate without arguments
    python benchmarks/readme_table.py dinov2     # apps/README's, of the grid dinov2; or minilm

The last column of the first is paired: points of accuracy above the same training, of the same seed, that saves
everything.
"""

import json
import sys
from pathlib import Path
from typing import Any

from memtrain_common.measuring.intervals import mean_and_ci

RESULTS = Path(__file__).parent / "results"
CATEGORIES = ("weights", "gradients", "optimizer", "activations")
SHOWN = (
    "full+all+adamw", "full+checkpoint+adamw", "full+backrazor-keep0.1+adamw", "full+all+adamw8bit",
    "full+all+galore-adamw-galore-rank4", "full+backrazor-keep0.1+galore-adamw-galore-rank4", "lora-rank8+all+adamw",
    "lora-rank8+checkpoint+adamw", "lora-rank8+backrazor-keep0.1+adamw", "lora-xs-rank8+all+adamw",
    "lora-xs-rank8+backrazor-keep0.1+adamw", "lte-rank8-lte-resttrained+all+adamw", "bitfit+all+adamw",
    "head+all+adamw",
)  # fmt: skip


def table() -> str:
    arms = {arm["combination"]: arm for arm in json.loads((RESULTS / "ablation_digits.json").read_text())["arms"]}
    lines = [
        "| train | save | optim | accuracy | weights | gradients | optimizer | activations | MiB in all | paired |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [row(name, arms) for name in SHOWN]
    return "\n".join(lines)


def of_one_seed(grid: str) -> str:
    """Of a grid of real models, by ``ablation_real.py``."""
    lines = [
        "| train | save | optim | accuracy | optimizer | activations | MiB in all |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for arm in json.loads((RESULTS / f"ablation_{grid}.json").read_text())["arms"]:
        measured = {c: n / 2**20 for c, n in arm["memory_bytes"]["measured"].items()}
        train, save, *rest = [words(choice) for choice in arm["combination"].split("+")]
        cells = [train, save, ", ".join(rest)]
        cells += [f"{100 * arm['mean']:.1f} %", f"{measured['optimizer']:.1f}", f"{measured['activations']:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {sum(measured.values()):.1f} |")
    return "\n".join(lines)


def row(name: str, arms: dict[str, Any]) -> str:
    train, save, optim = name.split("+")
    measured = {c: n / 2**20 for c, n in arms[name]["memory_bytes"]["measured"].items()}
    cells = [words(train), words(save), words(optim)]
    cells += [f"{100 * arms[name]['mean']:.1f} ± {100 * arms[name]['ci95']:.1f} %"]
    cells += [f"{measured[c]:.1f}" for c in CATEGORIES] + [f"{sum(measured.values()):.1f}"]
    whole = arms.get(f"{train}+all+{optim}")
    if save == "all" or whole is None:
        return f"| {' | '.join(cells)} | |"
    scores = zip(arms[name]["test_accuracy"], whole["test_accuracy"], strict=True)
    mean, half = mean_and_ci([100 * (a - b) for a, b in scores])
    return f"| {' | '.join(cells)} | {mean:+.1f} ± {half:.1f} |"


def words(choice: str) -> str:
    """``galore-adamw-galore-rank4`` -> "galore-adamw, rank 4"."""
    for mark in ("-galore-rank", "-rank", "-keep"):
        if mark in choice:
            plain, value = choice.split(mark)
            value = value.replace("-init", ", init ").removesuffix("-lte-resttrained")
            return f"{plain}, {'keep' if mark == '-keep' else 'rank'} {value}"
    return choice.replace("lr", "rate ") if choice[2:3].isdigit() else choice


if __name__ == "__main__":
    print(of_one_seed(sys.argv[1]) if len(sys.argv) > 1 else table())
