"""The figure of the studies on real pretrained models, from their committed results: bytes against accuracy.

    python benchmarks/real_figure.py

Across: what a step holds besides the weights (saved activations, gradients of 4 bytes a trained number, optimizer
state). Up: the mean difference of runs of the same seed from training everything with everything kept, with its 95 %
interval; of a loss in nats the axis is turned round, so that up is better everywhere. Arms of fewer than three seeds
are left out. Arms of about the same bytes stand side by side.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from memtrain_common.measuring.plots import COLOURS, save_figure

RESULTS = Path(__file__).parent / "results"
PICTURE = RESULTS / "real_models.png"
TASKS = {
    "minilm-sst2": "MiniLM-L6, SST-2",
    "minilm-sst2-lengths": "MiniLM-L6, SST-2, batches by length",
    "minilm-cola": "MiniLM-L6, CoLA",
    "dinov2-cifar10-56": "DINOv2-small, CIFAR-10 at 56 px",
    "dinov2-breastmnist": "DINOv2-small, BreastMNIST at 56 px",
    "efficientnet-cifar10": "EfficientNet-Lite0, CIFAR-10 at 112 px",
    "stories": "stories260K, Tiny Shakespeare",
}
CROWDED = 20
"""A study of more arms has two panels."""
APART = 0.022
"""How far arms of about the same bytes stand from each other, as a part of the axis."""
GREY = "#888888"
FAMILIES = {
    "low-bit": ("Back Razor", COLOURS[0], "o"),
    "checkpoint": ("checkpointing", GREY, "h"),
    "pruned": ("Back Razor's older modes", COLOURS[0], "x"),
    "paper": ("Back Razor's older modes", COLOURS[0], "x"),
    "lora": ("LoRA, LTE, MeLo", COLOURS[2], "s"),
    "lte": ("LoRA, LTE, MeLo", COLOURS[2], "s"),
    "melo": ("LoRA, LTE, MeLo", COLOURS[2], "s"),
    "lora-xs svd": ("LoRA-XS, the SVD's or random bases", COLOURS[3], "v"),
    "lora-xs random": ("LoRA-XS, the SVD's or random bases", COLOURS[3], "v"),
    "lora-xs gradient": ("LoRA-XS, bases from the gradient", COLOURS[3], "^"),
    "lora-xs narrowed": ("LoRA-XS, narrowed from r = 32", COLOURS[3], "<"),
    "galore-adamw": ("GaLore, GaLoreScaled, 8-bit AdamW", COLOURS[1], "D"),
    "galore-scaled": ("GaLore, GaLoreScaled, 8-bit AdamW", COLOURS[1], "D"),
    "adamw8bit": ("GaLore, GaLoreScaled, 8-bit AdamW", COLOURS[1], "D"),
    "bitfit": ("BitFit, the head alone", GREY, "P"),
    "head": ("BitFit, the head alone", GREY, "P"),
}
"""First words of an arm's name -> legend, colour and marker; hollow where Back Razor saves beside it."""
SHORT = {"galore-adamw": "GaLore", "galore-scaled": "Scaled", "adamw8bit": "8-bit", "bitfit": "BitFit", "head": "head"}


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    found = {t: json.loads(p.read_text()) for t in TASKS if (p := RESULTS / f"real_{t}.json").exists()}
    shown = {t: f for t, f in found.items() if sum(arm["seeds"] > 2 for arm in f["arms"].values()) > 1}
    drawn = [part for name, study in shown.items() for part in parts(TASKS[name], study)]
    rows = -(-len(drawn) // 2)
    figure = Figure(figsize=(10, 3.3 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    for panel, (title, study) in zip(panels, drawn, strict=False):
        draw(panel, title, study)
    for empty in panels[len(drawn) :]:
        empty.set_axis_off()
    legend = {label: (colour, marker) for label, colour, marker in FAMILIES.values()}
    marks = [Line2D([], [], color=c, marker=m, linestyle="", label=label) for label, (c, m) in legend.items()]
    marks.append(Line2D([], [], color="black", marker="*", linestyle="", label="everything trained and kept"))
    marks.append(Line2D([], [], color="black", marker="o", markerfacecolor="none", linestyle="",
                        label="hollow: with Back Razor"))  # fmt: skip
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_figure(figure, PICTURE)


def parts(title: str, study: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A study and its title; one of many arms in two, by what is trained."""
    arms = {n: a for n, a in study["arms"].items() if a["seeds"] > 2}
    few = {n: a for n, a in arms.items() if a["trained_numbers"] < arms["dense"]["trained_numbers"] / 2}
    if len(arms) <= CROWDED:
        return [(title, {**study, "arms": arms})]
    rest = {n: a for n, a in arms.items() if n not in few}
    return [
        (f"{title}: everything trained", {**study, "arms": rest}),
        (f"{title}: adapters", {**study, "arms": few}),
    ]


def draw(panel: Axes, title: str, study: dict[str, Any]) -> None:
    """One study: a point an arm."""
    arms, nats = study["arms"], study["metric"] == "nats"
    panel.axhline(0, color="black", linewidth=0.7, linestyle=":")
    wanted = {n: mebibytes(a) for n, a in arms.items()}
    most = max(wanted.values())
    if "dense" in wanted:
        panel.plot(wanted.pop("dense"), 0, "*", color="black", markersize=9)
    least = min(wanted.values())
    begin = 0.9 * least if least > most / 3 and len(arms) > 8 else 0.0  # else bytes are counted from 0
    places = side_by_side(wanted, APART * (most - begin))
    for label, at in places.items():
        arm, (kind, number) = arms[label], family(label)
        _, colour, marker = FAMILIES[kind]
        with_razor = "low-bit" in label and not label.startswith("low-bit")
        change, half = arm["less_dense"], arm["less_dense_ci95"]
        panel.errorbar(
            at, change, half, fmt=marker, color=colour, markersize=5, elinewidth=0.8, capsize=2,
            markerfacecolor="none" if with_razor else colour,
        )  # fmt: skip
        words = f"{SHORT.get(kind, '')} {number}".strip()
        panel.annotate(
            words, (at, change - half if nats else change + half), xytext=(0, 2), textcoords="offset points",
            ha="center", va="bottom", rotation=90 if len(words) > 2 else 0, fontsize=6.5, color=colour,
        )  # fmt: skip
    left, aside = min(begin, *places.values()), 0.05 * (most - begin)
    panel.set_xlim(left - aside, most + aside)
    low, high = panel.get_ylim()
    room = 0.3 * (high - low) if any(map(shortened, arms)) else 0.12 * (high - low)  # for the words above the bars
    panel.set_ylim(low - room * nats, high + room * (not nats))
    if nats:
        panel.invert_yaxis()
    unit = {"nats": "nats above (up is better)", "accuracy": "points of accuracy"}.get(
        study["metric"], "points of Matthews"
    )
    panel.set_ylabel(f"{unit},\nbeside full training", fontsize=8)
    panel.set_xlabel("MiB a step beside the weights", fontsize=8)
    panel.set_title(title, fontsize=9)
    panel.tick_params(labelsize=8)


def shortened(arm: str) -> bool:
    """Whether the arm's point has a word beside it, and not a number alone."""
    return family(arm)[0] in SHORT if arm != "dense" else False


def side_by_side(wanted: dict[str, float], step: float) -> dict[str, float]:
    """Where each arm is drawn: where it belongs, moved so that neighbours are at least ``step`` from each other."""
    groups: list[tuple[list[str], float]] = []  # of names, and their middle
    for name in sorted(wanted, key=lambda n: wanted[n]):
        names, middle = [name], wanted[name]
        while groups and middle - step * (len(names) - 1) / 2 < groups[-1][1] + step * (len(groups[-1][0]) + 1) / 2:
            names = groups.pop()[0] + names
            middle = sum(wanted[n] for n in names) / len(names)
        groups.append((names, middle))
    return {
        name: middle + step * (i - (len(names) - 1) / 2) for names, middle in groups for i, name in enumerate(names)
    }


def family(arm: str) -> tuple[str, str]:
    """-> the arm's key in FAMILIES and what its point is labelled by."""
    plain = arm.split(",")[0]
    kind = next(k for k in sorted(FAMILIES, key=len, reverse=True) if plain.startswith(k))
    return kind, plain.removeprefix(kind).removeprefix("-step").strip().replace("4x8", "LTE")


def mebibytes(arm: dict[str, Any]) -> float:
    """What a step holds besides the weights."""
    return (arm["saved_bytes"] + arm["optimizer_bytes"] + 4 * arm["trained_numbers"]) / 2**20


if __name__ == "__main__":
    main()
