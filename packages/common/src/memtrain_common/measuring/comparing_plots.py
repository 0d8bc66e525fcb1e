"""Pictures over several runs: validation losses, memory against time, and bars in groups. A run keeps its colour."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plots import COLOURS, new_figure, save_figure

_STYLES = ("-", "--", ":", "-.")
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
_MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_validation(runs: Mapping[str, list[dict[str, Any]]], path: Path, *, ylabel: str) -> None:
    """Validation loss over the steps, a line a run; the legend is in the order of the last losses.

    Args:
        runs: rows of ``metrics.jsonl`` by the run's name.
    """
    figure, axes = new_figure(width=_width(runs))
    lines = []
    for i, (name, rows) in enumerate(runs.items()):
        points = [(r["step"], r["loss"]) for r in rows if r["split"] == "val" and r["loss"] is not None]
        if points:
            style = _MARKERS[i // len(COLOURS) % 6] + _STYLES[i // len(COLOURS) % len(_STYLES)]
            label = f"{name}: {points[-1][1]:.3f}"
            (line,) = axes.plot(
                *zip(*points, strict=True), style, color=_colour(i), markersize=3.5, linewidth=1.3, label=label
            )
            lines.append((points[-1][1], line))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    _legend(figure, [line for _, line in sorted(lines, key=lambda item: -item[0])])
    save_figure(figure, path)


def plot_memory_against_time(points: Mapping[str, tuple[float, float]], path: Path) -> None:
    """(seconds a step, bytes that a step holds) of each run, as points; both axes begin at 0."""
    figure, axes = new_figure(width=_width(points))
    largest = max(held for _, held in points.values())
    unit, size = next((u, n) for u, n in _UNITS if largest >= n or n == 1)
    handles = []
    for i, (name, (seconds, held)) in enumerate(points.items()):
        marker = _MARKERS[i // len(COLOURS) % 6]
        look = {"color": _colour(i), "markersize": 8, "linestyle": "none", "alpha": 0.85}
        handles += axes.plot(1e3 * seconds, held / size, marker, label=name, **look)
    axes.set_xlim(0, 1e3 * 1.1 * max(seconds for seconds, _ in points.values()))
    axes.set_ylim(0, 1.15 * largest / size)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_xlabel("time of an optimizer step, ms")
    axes.set_ylabel(f"memory of a training step, {unit}")
    _legend(figure, handles)
    save_figure(figure, path)


def plot_groups(
    groups: Mapping[str, Sequence[str]],
    above: Mapping[str, float],
    below: Mapping[str, float],
    path: Path,
    *,
    labels: tuple[str, str, str],
) -> None:
    """Runs in groups beside one another: points above, bars below.

    Args:
        groups: names of runs by group.
        above, below: a number by the run's name.
        labels: of the upper axis, the lower one, and the groups.
    """
    figure, (top, bottom) = new_figure(width=_width(above), height=5.4, rows=2)
    order, handles, ticks, position = list(above), [], [], 0.0
    for names in groups.values():
        first = position
        for name in names:
            i = order.index(name)
            marker = _MARKERS[i // len(COLOURS) % 6]
            handles += top.plot(position, above[name], marker, color=_colour(i), markersize=7, label=name)
            top.annotate(f"{above[name]:.3f}", (position, above[name]), xytext=(0, 7), textcoords="offset points",
                         ha="center", fontsize=7)  # fmt: skip
            bottom.bar(position, below[name], width=0.8, color=_colour(i), alpha=0.85)
            position += 1
        ticks.append((first + position - 1) / 2)
        position += 1
    top.margins(y=0.25)
    bottom.set_xticks(ticks, groups)
    top.set_ylabel(labels[0])
    bottom.set_ylabel(labels[1])
    bottom.set_xlabel(labels[2])
    bottom.yaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value else "0")
    _legend(figure, handles)
    save_figure(figure, path)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _legend(figure: Any, handles: list[Any]) -> None:
    if handles:
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)


def _width(names: Mapping[str, Any]) -> float:
    """Room for the longest name beside the axes."""
    return 6.4 + 0.075 * min(40, max(map(len, names)))
