"""Tables of the studies on real pretrained models for READMEs, from their committed results: print, and paste.

    python benchmarks/real_table.py backrazor|lora_xs|galore_vit|lte|under_backrazor|smaller|smaller_pruned

"against dense" is the mean difference of runs of the same seed from training everything with everything kept;
``under_backrazor`` has adapters with Back Razor beside the same adapters without it; ``smaller`` and ``smaller_pruned``
are what ``backrazor_accuracy.py`` measured with the modes low-bit and pruned.
"""

import json
import sys
from pathlib import Path
from typing import Any

from memtrain_common.measuring.intervals import mean_and_ci

RESULTS = Path(__file__).parent / "results"
SAVING = (
    "dense", "checkpoint", "low-bit 0.1", "low-bit 0.05", "pruned 0.12", "pruned 0.06", "paper 0.2", "paper 0.1",
    "paper 0.03",
)  # fmt: skip
TABLES: dict[str, tuple[str, ...]] = {
    "backrazor": (
        "minilm-sst2",
        "minilm-sst2-lengths",
        "minilm-sst2-5000",
        "minilm-sst2-long",
        "minilm-cola",
        "minilm-rte",
        "efficientnet-cifar10",
        "efficientnet-cifar10-frozen-norms",
        "efficientnet-cifar10-frozen-norms-long",
        "dinov2-cifar10-56",
        "dinov2-cifar10-56-long",
        "dinov2-cifar10",
        "dinov2-cifar10-5000",
        "dinov2-breastmnist",
        "stories",
    ),
    "lora_xs": ("minilm-sst2-lengths", "minilm-cola", "dinov2-cifar10-56", "stories"),
    "galore_vit": ("minilm-sst2-lengths", "dinov2-cifar10-56", "dinov2-breastmnist"),
    "lte": ("dinov2-cifar10-56",),
    "under_backrazor": ("minilm-sst2-lengths", "dinov2-cifar10-56", "dinov2-breastmnist"),
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
    "lte": (
        "| | | trained numbers | seeds | end | against training everything |",
        "|---|---|--:|--:|--:|--:|",
    ),
    "galore_vit": (
        "| | | state, of AdamW's | seeds | end | against AdamW |",
        "|---|---|--:|--:|--:|--:|",
    ),
    "under_backrazor": (
        "| | | less saved than without | seeds | end | against the same without |",
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
            if package == "under_backrazor":
                found["arms"] = _beside_the_same(task, found["arms"])
            arms = {n: a for n, a in found["arms"].items() if a["seeds"] > 1 and _belongs(package, n, task)}
            for i, (name, arm) in enumerate(arms.items() if len(arms) > (package != "under_backrazor") else ()):
                about = f"{found['about']}: {_metric(found['metric'])}" if i == 0 else ""
                lines.append(
                    f"| {about} | {_name(package, name)} | {_amount(package, arm, found)} | {_scores(found, arm)} |"
                )
    return "\n".join(lines)


SMALLER = {
    "resnet20": "ResNet-20 (CIFAR-10's weights, 81.5 before) to CIFAR-10 as JPEG files, 4,091 to train on",
    "breastmnist": "the same weights to BreastMNIST, 546 to train on and 156 to test on",
    "vit": "a ViT 96 wide, pretrained here on CIFAR-10's classes 0–4 (65.8 there), to 5,625 pictures of 5–9",
}


def smaller(mode: str, ending: str = "") -> str:
    """Smaller models, fine-tuned by ``backrazor-train``'s own code."""
    ways = " | ".join(f"`{mode}` {keep}: less saved | end | against dense" for keep in ("0.1", "0.05"))
    lines = [f"| | seeds | dense | {ways} |", "|---|" + "--:|" * 8]
    for study, about in SMALLER.items():
        found = json.loads((RESULTS / f"backrazor_accuracy_{study}{ending}.json").read_text())
        for key, name, digits in (("test_accuracy", about, 1), ("test_AUC", "its AUC", 3)):
            arms = found["results"]
            if key in arms["dense"]:
                cells = [name, str(len(found["seeds"])), _with_ci(arms["dense"][key], digits)]
                for arm in (arms["keep 0.1"], arms["keep 0.05"]):
                    cells += [f"{arm['activations_times_less']:.1f}×", _with_ci(arm[key], digits)]
                    cells.append(_with_ci(arm[f"{key}_less_dense"], digits, "+"))
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_ci(found: dict[str, float], digits: int, sign: str = "") -> str:
    return f"{_rounded(found['mean'], digits, sign)} ± {found['ci95']:.{digits}f}"


def _rounded(value: float, digits: int, sign: str = "") -> str:
    """With a true minus; what rounds to nothing has no minus."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")


def _beside_the_same(task: str, arms: dict[str, Any]) -> dict[str, Any]:
    """Adapters with Back Razor, with what they lose and save beside the same adapter and seeds without it."""
    out = {}
    for name, arm in arms.items():
        plain, _, save = name.partition(", ")
        if save and plain in arms:
            runs, others = (_runs(task, n) for n in (name, plain))
            pairs = [runs[s]["score"] - others[s]["score"] for s in runs if s in others]
            mean, half = mean_and_ci(pairs)
            times = arms[plain]["saved_bytes"] / arm["saved_bytes"]
            out[name] = {**arm, "seeds": len(pairs), "less_dense": mean, "less_dense_ci95": half, "times": times}
    return out


def _runs(task: str, arm: str) -> dict[str, Any]:
    """A seed's score and costs, by seed."""
    return dict(json.loads((RESULTS / "real" / task / f"{arm.replace(' ', '_')}.json").read_text())["runs"])


def _belongs(package: str, arm: str, task: str) -> bool:
    kind = arm.split(" ")[0]
    if package == "under_backrazor":
        return True
    if "," in arm:
        return False
    if package == "lte":
        return kind in ("dense", "lora", "lte")
    if package == "galore_vit":
        beside_melo = ("lora",) if task == "dinov2-breastmnist" else ()
        return kind in ("dense", "adamw8bit", "galore-adamw", "galore-scaled", "melo", *beside_melo)
    if package == "backrazor":
        return arm in SAVING
    return kind in ("dense", "lora", "lte", "lora-xs", "bitfit", "head")


def _name(package: str, arm: str) -> str:
    if arm == "dense":
        return {"backrazor": "dense", "lora_xs": "full training", "lte": "everything", "galore_vit": "AdamW"}[package]
    if ", " in arm:
        plain, save = arm.split(", ")
        return f"{_name('lora_xs', plain)}; `{save.split(' ')[0]}` {save.split(' ')[1]}"
    kind, _, rest = arm.partition(" ")
    if package == "backrazor":
        return f"`{kind}` {rest}" if rest else "checkpointing"
    if kind == "lora-xs":
        bases, rank = rest.split(" ")
        if bases == "narrowed":
            return f"LoRA-XS, gradient bases, r = 32 narrowed to {rank}"
        kinds = {"svd": "the SVD's bases", "gradient": "gradient bases", "random": "random bases"}
        return f"LoRA-XS, {kinds.get(bases, 'gradient bases and a first step')}, r = {rank}"
    words = {
        "lora": "LoRA", "bitfit": "BitFit", "head": "head", "melo": "MeLo", "adamw8bit": "8-bit AdamW",
        "galore-adamw": "`GaLoreAdamW`", "galore-scaled": "`GaLoreScaled`", "lte": "LTE",
    }  # fmt: skip
    return words.get(kind, kind) + (f", r = {rest}".replace("r = 4x8", "4 heads of r = 8") if rest else "")


def _amount(package: str, arm: dict[str, Any], found: dict[str, Any]) -> str:
    if package == "under_backrazor":
        return f"{arm['times']:.1f}×"
    if package == "galore_vit":
        return f"{100 * arm['optimizer_bytes'] / found['arms']['dense']['optimizer_bytes']:.1f} %"
    if package == "backrazor":
        return f"{arm['times_less_saved']:.1f}×"
    left = arm.get("trained_numbers_once_narrowed")
    return f"{arm['trained_numbers']:,}" + (f", then {left:,}" if left else "")


def _scores(found: dict[str, Any], arm: dict[str, Any]) -> str:
    digits = 3 if found["metric"] == "nats" else 1
    cells = [str(arm["seeds"]), f"{arm['score']:.{digits}f}"]
    if "less_dense" not in arm:
        return " | ".join([*cells, ""])
    change = _rounded(arm["less_dense"], digits, "+")
    return " | ".join([*cells, f"{change} ± {arm['less_dense_ci95']:.{digits}f}"])


def _metric(metric: str) -> str:
    words = {"nats": "held-out loss in nats (less is better)", "accuracy": "points of accuracy"}
    return words.get(metric, f"{metric.capitalize()} in hundredths")


if __name__ == "__main__":
    asked = sys.argv[1]
    if asked.startswith("smaller"):
        print(smaller("pruned", "_pruned") if asked.endswith("_pruned") else smaller("low-bit"))
    else:
        print(table(asked))
