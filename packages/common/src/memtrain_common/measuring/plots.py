"""Pictures of a run: its losses over the steps, and where its memory goes."""

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
    """The ledger as horizontal stacked bars, one a category, its largest layers named; as PNG."""
    figure, axes = new_figure(height=3.6)
    biggest = max(ledger.totals.values()) or 1
    for row, category in enumerate(reversed(CATEGORIES)):
        left = 0
        parts = sorted(ledger.bytes_by_layer[category].items(), key=lambda item: -item[1])
        rest = sum(n for _, n in parts[layers:])
        for i, (layer, n) in enumerate([*parts[:layers], *([("others", rest)] if rest else [])]):
            colour = COLOURS[CATEGORIES.index(category)]
            axes.barh(row, n, left=left, color=colour, alpha=0.9 if i % 2 else 0.65, edgecolor="white", linewidth=0.5)
            if n > 0.12 * biggest:
                text = layer.removeprefix("transformer.")
                axes.text(left + n / 2, row, text, ha="center", va="center", fontsize=7, clip_on=True)
            left += n
        axes.text(left + 0.01 * biggest, row, format_bytes(left), va="center", fontsize=9)
    axes.set_yticks(
        range(len(CATEGORIES)), reversed([c if c != "activations" else "saved\nactivations" for c in CATEGORIES])
    )
    axes.set_xlim(0, 1.15 * biggest)
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
    axes.set_xlabel(f"bytes in one training step; total {format_bytes(sum(ledger.totals.values()))}")
    save_figure(figure, path)


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
