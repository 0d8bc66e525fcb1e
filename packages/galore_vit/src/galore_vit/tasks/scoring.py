"""Scores of a model on a split, what they are worth, and the files that show it."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memtrain_common.data.images.batches import Normalize, evaluation_batches
from memtrain_common.data.images.image_set import ImageSet, ImageSplit
from memtrain_common.errors import UserError
from numpy.typing import NDArray
from torch import nn

from ..metrics import accuracy, auc, calibration_error

Scores = NDArray[np.float64]
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


@dataclass(frozen=True)
class Score:
    """What a split's scores are worth."""

    auc: float
    acc: float
    ece: float
    """Expected calibration error over 15 bins."""

    @property
    def numbers(self) -> dict[str, float]:
        return {"AUC": self.auc, "ACC": self.acc, "ECE": self.ece}


@torch.no_grad()
def predict(model: nn.Module, split: ImageSplit, size: int, *, multi_label: bool, batch: int = 256) -> Scores:
    """Probabilities (N, classes) of a split's images, by the model in eval mode."""
    device = next(model.parameters()).device
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    parts = []
    for pixels, _ in evaluation_batches(split, size, normalize=Normalize(), resize="nearest", batch=batch):
        logits = model(pixel_values=pixels.to(device)).logits.double()
        parts.append((logits.sigmoid() if multi_label else logits.softmax(-1)).cpu())
    for module, training in modes:
        module.training = training
    return torch.cat(parts).numpy()


def score(labels: NDArray[np.int64], scores: Scores, task: str) -> Score:
    """AUC and ACC as MedMNIST's Evaluator has them, and the calibration error.

    Raises:
        UserError: where scores and labels do not match, or a class is absent.
    """
    try:
        return Score(auc(labels, scores, task), accuracy(labels, scores, task), calibration_error(labels, scores, task))
    except ValueError as error:
        raise UserError(str(error)) from None


def mean_loss(labels: NDArray[np.int64], scores: Scores, multi_label: bool) -> float:
    """Mean negative log-likelihood of the labels."""
    p = scores.clip(1e-12, 1 - 1e-12 if multi_label else 1.0)
    if multi_label:
        return float(-(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean())
    return float(-np.log(p[np.arange(len(labels)), labels]).mean())


def official_name(images: ImageSet) -> str:
    """How MedMNIST calls a set in the names of result files, whose parts an underscore divides."""
    return images.file_stem or images.name.replace("_", "-")


def official_file(images: ImageSet, split: str, found: Score, run: Any) -> str:
    """The name that MedMNIST gives a file of predictions."""
    return f"{official_name(images)}_{split}_[AUC]{found.auc:.3f}_[ACC]{found.acc:.3f}@{run}.csv"


def write_predictions(path: Path, scores: Scores) -> None:
    """MedMNIST's official form: a line an image, its index and its scores; no heading."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([i, *map(repr, row)] for i, row in enumerate(scores.tolist()))


def read_predictions(path: Path) -> Scores:
    """Scores in the order of their index, (N, columns).

    Raises:
        UserError: if the file is not of the official form.
    """
    try:
        with path.open(newline="") as file:
            rows = [[float(cell) for cell in row] for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not a file of predictions: {error}; a line is an index and its scores") from None
    if not rows or len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        raise UserError(f"{path} is not a file of predictions: every line is an index and equally many scores")
    table = np.array(rows)
    order = table[:, 0].argsort(kind="stable")
    if not np.array_equal(table[order, 0], np.arange(len(table))):
        raise UserError(f"{path} does not number its lines 0 to {len(table) - 1}, each once")
    return table[order, 1:]


def write_all(folder: Path, images: ImageSet, split: str, scores: Scores, run: Any, *, pictures: bool = True) -> Score:
    """Predictions, confusion matrix, ROC curves and ``SPLIT.json`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = images.splits[split].labels
    found = score(labels, scores, images.task)
    for old in folder.glob(f"{official_name(images)}_{split}_*@{run}.csv"):
        old.unlink()  # of an earlier evaluation of the same run
    write_predictions(folder / official_file(images, split, found, run), scores)
    (folder / f"{split}.json").write_text(json.dumps({"split": split, "images": len(labels), **found.numbers}) + "\n")
    if pictures:
        plot_confusion(labels, scores, images, folder / f"confusion_{split}.png")
        plot_roc(labels, scores, images, folder / f"roc_{split}.png")
    return found


def confusion(labels: NDArray[np.int64], scores: Scores, classes: int) -> NDArray[np.int64]:
    """(classes, classes) counts: rows are the truth, columns the answer."""
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (labels, scores.argmax(1)), 1)
    return table


def plot_confusion(labels: NDArray[np.int64], scores: Scores, images: ImageSet, path: Path) -> None:
    """The confusion matrix as PNG; of a multi-label set a 2×2 one for each label."""
    from matplotlib.figure import Figure

    if images.multi_label:
        tables = [confusion(y, np.stack([1 - s, s], 1), 2) for y, s in zip(labels.T, scores.T, strict=True)]
        titles: Sequence[str] = images.classes
        names: Sequence[str] = ("no", "yes")
    else:
        tables, titles, names = [confusion(labels, scores, len(images.classes))], [images.name], images.classes
    columns = min(5, len(tables))
    rows = -(-len(tables) // columns)
    side = 2.2 if len(tables) > 1 else max(3.6, 0.55 * len(names))
    figure = Figure(figsize=(side * columns, side * rows), dpi=144, layout="constrained")
    for i, (table, title) in enumerate(zip(tables, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        share = table / table.sum(1, keepdims=True).clip(1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (y, x), n in np.ndenumerate(table):
            axes.text(x, y, str(n), ha="center", va="center", color="white" if share[y, x] > 0.5 else "black")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title)
        axes.set_xlabel("answer")
        axes.set_ylabel("truth")
    figure.savefig(path)


def roc_curve(labels: NDArray[np.bool_], scores: Scores) -> tuple[Scores, Scores]:
    """False and true positive rates (k,) over falling thresholds, one a distinct score, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    y, s = labels[order], scores[order]
    last = np.append(np.flatnonzero(np.diff(s)), len(s) - 1)  # of each run of equal scores
    hits, misses = np.cumsum(y)[last], np.cumsum(~y)[last]
    return np.append(0, misses / max(1, (~y).sum())), np.append(0, hits / max(1, y.sum()))


def plot_roc(labels: NDArray[np.int64], scores: Scores, images: ImageSet, path: Path) -> None:
    """A ROC curve for each class against the rest, or each label; one for a binary set; as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.8), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    binary = images.task == "binary-class"
    for i, c in enumerate([1] if binary else range(len(images.classes))):
        truth = labels[:, c] == 1 if images.multi_label else labels == c
        x, y = roc_curve(truth, scores[:, c])
        area = float(np.trapezoid(y, x))
        style = "-" if i < len(COLOURS) else "--"
        axes.plot(x, y, style, color=COLOURS[i % len(COLOURS)], label=f"{images.classes[c]}: {area:.3f}")
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.set_title(f"{images.name}: area under the curve")
    axes.legend(frameon=False, fontsize=8, ncols=1 if len(images.classes) < 12 else 2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
