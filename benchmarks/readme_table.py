"""The README's table of the ablation, from its committed result: print it, and paste it where it stands.

    python benchmarks/readme_table.py

The last column is paired: points of accuracy above the same training, of the same seed, that saves everything.
"""

import json
from pathlib import Path
from typing import Any

from memtrain_common.measuring.intervals import mean_and_ci

RESULT = Path(__file__).parent / "results" / "ablation_digits.json"
CATEGORIES = ("weights", "gradients", "optimizer", "activations")
SHOWN = (
    "full+all+adamw", "full+checkpoint+adamw", "full+backrazor-keep0.1+adamw", "full+all+adamw8bit",
    "full+all+galore-adamw-galore-rank4", "full+backrazor-keep0.1+galore-adamw-galore-rank4", "lora-rank8+all+adamw",
    "lora-rank8+checkpoint+adamw", "lora-rank8+backrazor-keep0.1+adamw", "lora-xs-rank8+all+adamw",
    "lora-xs-rank8+backrazor-keep0.1+adamw", "lte-rank8+all+adamw", "bitfit+all+adamw", "head+all+adamw",
)  # fmt: skip


def table() -> str:
    arms = {arm["combination"]: arm for arm in json.loads(RESULT.read_text())["arms"]}
    lines = [
        "| train | save | optim | accuracy | weights | gradients | optimizer | activations | MiB in all | paired |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [row(name, arms) for name in SHOWN if name in arms]
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
            return f"{plain}, {'keep' if mark == '-keep' else 'rank'} {value}"
    return choice


if __name__ == "__main__":
    print(table())
