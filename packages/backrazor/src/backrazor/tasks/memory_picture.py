"""The picture of ``backrazor-memory``: bytes saved by layer and by operation, dense and by Back Razor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from memtrain_common.console import format_bytes
from memtrain_common.measuring.plots import COLOURS

MOST = 24  # bars that are told apart; the rest is added up


class Bar(Protocol):
    """A name with two numbers of bytes."""

    @property
    def name(self) -> str: ...

    @property
    def dense(self) -> int: ...

    @property
    def razor(self) -> int: ...


def plot_saved(
    layers: Sequence[Bar], operations: Sequence[Bar], total: Bar, path: Path, *, title: str, batch: int
) -> None:
    """Two panels of horizontal bars, as PNG.

    Args:
        layers: in the order of the forward pass.
        operations: from the largest.
        total: of all.
        path: of the picture.
        title: what was run.
        batch: samples, by which bytes are divided.
    """
    from matplotlib.figure import Figure

    panels = [("by layer", _largest(layers)), ("by operation", _largest(operations))]
    heights = [0.24 * len(bars) + 0.6 for _, bars in panels]
    figure = Figure(figsize=(8.4, sum(heights) + 1.2), dpi=144, layout="constrained")
    for axes, (heading, bars) in zip(figure.subplots(2, 1, height_ratios=heights), panels, strict=True):
        _panel(axes, bars, heading, batch)
    ratio = f"{total.dense / total.razor:.1f}× less" if total.razor else "nothing kept"
    figure.suptitle(
        f"{title}\nsaved per sample: {format_bytes(total.dense / batch)} dense, "
        f"{format_bytes(total.razor / batch)} by Back Razor ({ratio})",
        fontsize=10,
    )
    figure.savefig(path)


def _largest(bars: Sequence[Bar]) -> list[tuple[str, int, int]]:
    """The largest bars in their order, and the sum of the others."""
    kept = sorted(range(len(bars)), key=lambda i: -bars[i].dense)[:MOST]
    rest = [b for i, b in enumerate(bars) if i not in kept]
    out = [(bars[i].name, bars[i].dense, bars[i].razor) for i in sorted(kept)]
    if rest:
        out.append((f"{len(rest)} others", sum(b.dense for b in rest), sum(b.razor for b in rest)))
    return out


def _panel(axes: Any, bars: list[tuple[str, int, int]], heading: str, batch: int) -> None:
    places = range(len(bars), 0, -1)
    most = max(max(b[1:]) for b in bars) / batch
    unit, power = next((u, p) for u, p in (("MiB", 20), ("KiB", 10), ("bytes", 0)) if most >= 2**p or not p)
    scale = batch * 2**power
    axes.barh([p + 0.2 for p in places], [b[1] / scale for b in bars], 0.38, color=COLOURS[1], label="dense")
    axes.barh([p - 0.2 for p in places], [b[2] / scale for b in bars], 0.38, color=COLOURS[0], label="Back Razor")
    axes.set_yticks(list(places), [b[0] for b in bars], fontsize=7)
    axes.set_ylim(0.4, len(bars) + 0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(heading, fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
