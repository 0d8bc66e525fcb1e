"""Tables of the studies on real pretrained models for READMEs, from their committed results: print, and paste.

    python benchmarks/real_table.py backrazor|lora_xs

"against dense" is the mean difference of runs of the same seed from training everything with everything kept.
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SAVING = ("dense", "low-bit 0.1", "low-bit 0.05", "pruned 0.12", "pruned 0.06", "paper 0.2", "paper 0.1", "paper 0.03")
TABLES: dict[str, tuple[str, ...]] = {
    "backrazor": ("minilm-sst2", "efficientnet-cifar10", "dinov2-cifar10-56", "stories"),
    "lora_xs": ("minilm-sst2-lengths", "stories"),
}
HEADS = {
    "backrazor": (
        "| | | less saved | seeds | end | against dense |",
        "|---|---|--:|--:|--:|--:|",
    ),
    "lora_xs": (
        "| | | trained numbers | seeds | end | against full training |",
        "|---|---|--:|--:|--:|--:|",
    ),
}


def table(package: str) -> str:
    """All of a package's studies that have results; arms of one seed say nothing yet."""
    lines = list(HEADS[package])
    for task in TABLES[package]:
        path = RESULTS / f"real_{task}.json"
        if path.exists():
            found = json.loads(path.read_text())
            arms = {n: a for n, a in found["arms"].items() if a["seeds"] > 1 and _belongs(package, n)}
            for i, (name, arm) in enumerate(arms.items() if len(arms) > 1 else ()):
                about = f"{found['about']}: {_metric(found['metric'])}" if i == 0 else ""
                lines.append(f"| {about} | {_name(package, name)} | {_amount(package, arm)} | {_scores(found, arm)} |")
    return "\n".join(lines)


def _belongs(package: str, arm: str) -> bool:
    kind = arm.split(" ")[0]
    if package == "backrazor":
        return arm in SAVING
    return kind in ("dense", "lora", "lora-xs", "bitfit", "head")


def _name(package: str, arm: str) -> str:
    if arm == "dense":
        return {"backrazor": "dense", "lora_xs": "full training"}[package]
    kind, _, rest = arm.partition(" ")
    if package == "backrazor":
        return f"`{kind}` {rest}"
    if kind == "lora-xs":
        bases, rank = rest.split(" ")
        kinds = {"svd": "the SVD's bases", "gradient": "gradient bases", "random": "random bases"}
        return f"LoRA-XS, {kinds.get(bases, 'gradient bases and a first step')}, r = {rank}"
    words = {"lora": "LoRA", "bitfit": "BitFit", "head": "head"}
    return words.get(kind, kind) + (f", r = {rest}" if rest else "")


def _amount(package: str, arm: dict[str, Any]) -> str:
    if package == "backrazor":
        return f"{arm['times_less_saved']:.1f}×"
    return f"{arm['trained_numbers']:,}"


def _scores(found: dict[str, Any], arm: dict[str, Any]) -> str:
    digits = 3 if found["metric"] == "nats" else 1
    cells = [str(arm["seeds"]), f"{arm['score']:.{digits}f}"]
    if "less_dense" not in arm:
        return " | ".join([*cells, ""])
    change = f"{arm['less_dense']:+.{digits}f}".replace("-", "−")
    return " | ".join([*cells, f"{change} ± {arm['less_dense_ci95']:.{digits}f}"])


def _metric(metric: str) -> str:
    words = {"nats": "held-out loss in nats (less is better)", "accuracy": "points of accuracy"}
    return words.get(metric, f"{metric.capitalize()} in hundredths")


if __name__ == "__main__":
    print(table(sys.argv[1]))
