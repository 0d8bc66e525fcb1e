"""Pictures of a run: its losses over the steps, and where its memory goes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..console import format_bytes
from .memory import CATEGORIES, Ledger

# Okabe and Ito's palette: told apart by the colour-blind as well.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")


def plot_loss(
    runs: Mapping[str, list[dict[str, Any]]], path: Path, *, ylabel: str, levels: Mapping[str, float] | None = None
) -> None:
    """Training loss (thin) and validation loss (dots) over the steps, as PNG.

    Args:
        runs: rows of ``metrics.jsonl`` by the run's name.
        ylabel: what the loss is, with its unit.
        levels: horizontal lines by name: losses to compare with.
    """
    figure, axes = new_figure()
    for colour, (name, rows) in zip(COLOURS, runs.items(), strict=False):
        train = [(r["step"], r["loss"]) for r in rows if r["split"] == "train"]
        val = [(r["step"], r["loss"]) for r in rows if r["split"] == "val"]
        if train:
            label = "" if val else f"{name}: training"
            axes.plot(*zip(*train, strict=True), color=colour, linewidth=0.8, alpha=0.45, label=label)
        if val:
            label = f"{name}: validation {val[-1][1]:.3f}{' (line: training)' if train else ''}"
            axes.plot(*zip(*val, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.4, label=label)
    for name, level in (levels or {}).items():
        axes.axhline(level, color="#666666", linestyle="--", linewidth=0.9)
        axes.annotate(f"{name} {level:.3f}", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      color="#444444", fontsize=8)  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_memory(ledger: Ledger, path: Path, *, layers: int = 12) -> None:
    """The ledger as horizontal stacked bars, one a category; below each the layers that hold most of it; as PNG."""
    figure, axes = new_figure(height=4.4)
    biggest = max(ledger.totals.values()) or 1
    unit, power = next((u, p) for u, p in (("GiB", 30), ("MiB", 20), ("KiB", 10), ("bytes", 0)) if biggest >= 2**p)
    scale = 2**power
    for row, category in enumerate(reversed(CATEGORIES)):
        left = 0
        colour = COLOURS[CATEGORIES.index(category)]
        parts = sorted(ledger.bytes_by_layer[category].items(), key=lambda item: -item[1])
        rest = sum(n for _, n in parts[layers:])
        for i, (_, n) in enumerate([*parts[:layers], *([("others", rest)] if rest else [])]):
            alpha = 0.9 if i % 2 else 0.65
            axes.barh(
                row, n / scale, 0.5, left=left / scale, color=colour, alpha=alpha, edgecolor="white", linewidth=0.5
            )
            left += n
        place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(format_bytes(left), (left / scale, row), fontsize=9, **place)
        below = largest_layers(ledger.bytes_by_layer[category])
        # not in the layout: a long line would leave the bars no room
        axes.annotate(below, (0, row - 0.38), fontsize=7, color="#444444", **place).set_in_layout(False)
    names = [c if c != "activations" else "saved\nactivations" for c in CATEGORIES]
    axes.set_yticks(range(len(CATEGORIES)), reversed(names))
    axes.set_ylim(-0.65, len(CATEGORIES) - 0.6)
    axes.set_xlim(0, 1.15 * biggest / scale)
    axes.set_xlabel(f"{unit} in one training step; total {format_bytes(sum(ledger.totals.values()))}")
    save_figure(figure, path)


def largest_layers(bytes_by_layer: Mapping[str, int], most: int = 3) -> str:
    """The kinds of layers that hold most: "h.*.mlp.c_fc (12×) 41 %, …".

    A block's number counts as a star; of a long name the end stays.
    """
    kinds: dict[str, list[int]] = {}
    for layer, n in bytes_by_layer.items():
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer, count=1), []).append(n)
    total = sum(bytes_by_layer.values())
    largest = sorted(kinds.items(), key=lambda kind: -sum(kind[1]))[:most]
    return ", ".join(
        f"{name if len(name) <= 28 else '…' + name[-27:]}{f' ({len(n)}×)' if len(n) > 1 else ''} {sum(n) / total:.0%}"
        for name, n in largest
        if sum(n)
    )


def new_figure(height: float = 4.2, width: float = 7.2, rows: int = 1) -> Any:
    """-> (figure, axes), without upper and right spines; with ``rows``, axes one below another on one x axis."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, (axes[0] if rows == 1 else axes)


def save_figure(figure: Any, path: Path) -> None:
    """As the picture that the path's suffix names."""
    figure.savefig(path)
