"""What fills the memory for the best choices, as bars beside the budget. matplotlib is imported here."""

from pathlib import Path

from memtrain_common.measuring.plots import COLOURS, new_figure, save_figure

from .arms import Plan
from .table import time_of, unit_of

MOST = 3
"""Choices that are drawn."""


def draw_plan(plan: Plan, path: Path) -> None:
    """A horizontal bar a choice: its ledger, whose parts need not live at one time, and what lives besides at the
    peak; a mark at the peak, and lines at the usable budget and the whole one."""
    arms = (plan.fitting or plan.lacking)[:MOST]
    config = plan.config
    name, size, _ = unit_of(max(config.budget_bytes, *(a.predicted.peak for a in arms)))
    figure, axes = new_figure(height=1.5 + 0.75 * len(arms))
    kinds = ("weights", "gradients", "optimizer", "activations", "buffers")
    names = {"optimizer": "optimizer state", "activations": "saved activations"}
    seen: set[str] = set()
    for row, arm in enumerate(reversed(arms)):
        found = arm.predicted
        # at the peak not all of the ledger may live; what is above the peak is drawn, paler, behind it
        left = 0.0
        for kind, colour in zip(kinds, COLOURS, strict=True):
            width = found.ledger[kind] / size
            if width:
                label = None if kind in seen else names.get(kind, kind)
                seen.add(kind)
                axes.barh(row, width, 0.5, left=left, color=colour, label=label)
                if width > 0.07 * max(config.budget_bytes, found.peak) / size:
                    axes.text(
                        left + width / 2, row, f"{width:.1f}", ha="center", va="center", color="white", fontsize=8
                    )
            left += width
        more = found.peak / size - left
        if more > 0:
            label = None if "more" in seen else "other, at the peak"
            seen.add("more")
            axes.barh(row, more, 0.5, left=left, color="#BBBBBB", label=label)
        axes.plot([found.peak / size] * 2, [row - 0.33, row + 0.33], color="black", linewidth=1.5)
        axes.text(max(left, found.peak / size), row + 0.34, f"peak {found.peak / size:.1f}  {time_of(arm)}",
                  ha="right", va="bottom", fontsize=8)  # fmt: skip
    for value, words in ((config.usable_bytes, "usable"), (config.budget_bytes, "budget")):
        axes.axvline(value / size, color="#666666", linestyle="--", linewidth=0.9)
        axes.text(
            value / size,
            len(arms) - 0.35,
            words,
            ha="center",
            va="bottom",
            fontsize=8,
            color="#444444",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axes.set_yticks(range(len(arms)), [a.axes.name.replace("+", "\n") for a in reversed(arms)], fontsize=8)
    axes.set_ylim(-0.6, len(arms) - 0.1)
    axes.set_xlim(0, 1.06 * max(config.budget_bytes, *(a.predicted.peak for a in arms)) / size)
    axes.set_xlabel(f"{name} of a device, predicted: {config.model}, {config.batch} samples")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    save_figure(figure, path)
