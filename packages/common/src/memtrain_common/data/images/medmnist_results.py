"""Predictions in MedMNIST's official form: names and CSV files that its Evaluator reads."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from .image_set import ImageSet

Scores = NDArray[np.float64]
"""Probabilities (N, classes)."""


def official_name(images: ImageSet) -> str:
    """How MedMNIST calls a set in the names of result files, whose parts an underscore divides."""
    return images.file_stem or images.name.replace("_", "-")


def official_file(images: ImageSet, split: str, auc: float, acc: float, run: Any) -> str:
    """The name that MedMNIST gives a file of predictions."""
    return f"{official_name(images)}_{split}_[AUC]{auc:.3f}_[ACC]{acc:.3f}@{run}.csv"


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
