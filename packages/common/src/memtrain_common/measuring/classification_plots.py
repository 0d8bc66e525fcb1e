"""Pictures of a classifier's answers: the confusion matrix, and ROC curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .plots import COLOURS

Scores = NDArray[np.float64]
"""Probabilities (N, classes)."""


def confusion(labels: NDArray[np.int64], scores: Scores, classes: int) -> NDArray[np.int64]:
    """(classes, classes) counts: rows are the truth, columns the answer."""
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (labels, scores.argmax(1)), 1)
    return table


def plot_confusion(labels: NDArray[np.int64], scores: Scores, name: str, classes: Sequence[str], path: Path) -> None:
    """The confusion matrix as PNG; of a multi-label set a 2×2 one for each label."""
    from matplotlib.figure import Figure

    if labels.ndim == 2:
        tables = [confusion(y, np.stack([1 - s, s], 1), 2) for y, s in zip(labels.T, scores.T, strict=True)]
        titles: Sequence[str] = classes
        names: Sequence[str] = ("no", "yes")
    else:
        tables, titles, names = [confusion(labels, scores, len(classes))], [name], classes
    names = [shorter(n) for n in names]
    columns = min(5, len(tables))
    rows = -(-len(tables) // columns)
    side = 2.2 if len(tables) > 1 else max(3.6, 0.55 * len(names))
    figure = Figure(figsize=(side * columns, side * rows), dpi=144, layout="constrained")
    for i, (table, title) in enumerate(zip(tables, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        share = table / table.sum(1, keepdims=True).clip(1)
        shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (y, x), n in np.ndenumerate(table):
            axes.text(x, y, str(n), ha="center", va="center", color="white" if share[y, x] > 0.5 else "black")
        axes.set_xticks(range(len(names)), names)
        if max(map(len, names)) > 4:
            for label in axes.get_xticklabels():
                label.set(rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
    figure.colorbar(shown, ax=figure.axes, label="share of the true class", shrink=0.8)
    figure.savefig(path)


def shorter(name: str, most: int = 24) -> str:
    """A class's name as a label: what is longer ends in an ellipsis."""
    return name if len(name) <= most else name[: most - 1].rstrip() + "…"


def roc_curve(labels: NDArray[np.bool_], scores: Scores) -> tuple[Scores, Scores]:
    """False and true positive rates (k,) over falling thresholds, one a distinct score, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    y, s = labels[order], scores[order]
    last = np.append(np.flatnonzero(np.diff(s)), len(s) - 1)  # of each run of equal scores
    hits, misses = np.cumsum(y)[last], np.cumsum(~y)[last]
    return np.append(0, misses / max(1, (~y).sum())), np.append(0, hits / max(1, y.sum()))


def plot_roc(labels: NDArray[np.int64], scores: Scores, name: str, classes: Sequence[str], path: Path) -> None:
    """A ROC curve for each class against the rest, or each label; one for a binary set; as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.8), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    binary = labels.ndim == 1 and len(classes) == 2
    for i, c in enumerate([1] if binary else range(len(classes))):
        truth = labels[:, c] == 1 if labels.ndim == 2 else labels == c
        x, y = roc_curve(truth, scores[:, c])
        area = float(np.trapezoid(y, x))
        style = "-" if i < len(COLOURS) else "--"
        axes.plot(x, y, style, color=COLOURS[i % len(COLOURS)], label=f"{shorter(classes[c])}: {area:.3f}")
    axes.plot([0, 1], [0, 1], ":", color="#999999", linewidth=0.8, label="chance: 0.500")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.set_title(f"{name}: area under the curve")
    axes.legend(frameon=False, fontsize=8, ncols=1 if len(classes) < 12 else 2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
