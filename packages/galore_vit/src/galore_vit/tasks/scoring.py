"""Scores of a model on a split, what they are worth, and the files that show it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memtrain_common.data.images.batches import evaluation_batches
from memtrain_common.data.images.image_set import ImageSet, ImageSplit
from memtrain_common.data.images.medmnist_names import class_names
from memtrain_common.data.images.medmnist_results import Scores, official_file, official_name, write_predictions
from memtrain_common.errors import UserError
from memtrain_common.measuring.classification_plots import plot_confusion, plot_roc
from memtrain_common.models.classifier import Classifier
from memtrain_common.optional import installed
from numpy.typing import NDArray
from torch import nn

from ..metrics import accuracy, auc, calibration_error


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
def predict(model: nn.Module, split: ImageSplit, made: Classifier, *, multi_label: bool, batch: int = 256) -> Scores:
    """Probabilities (N, classes) of a split's images, by the model in eval mode.

    Args:
        made: what the model must be given.
    """
    device = next(model.parameters()).device
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    parts = []
    for pixels, _ in evaluation_batches(
        split, made.image_size, normalize=made.normalize, resize="nearest", batch=batch
    ):
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


def write_all(folder: Path, images: ImageSet, split: str, scores: Scores, run: Any, *, pictures: bool = True) -> Score:
    """Predictions, confusion matrix, ROC curves and ``SPLIT.json`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = images.splits[split].labels
    found = score(labels, scores, images.task)
    for old in folder.glob(f"{official_name(images)}_{split}_*@{run}.csv"):
        old.unlink()  # of an earlier evaluation of the same run
    write_predictions(folder / official_file(images, split, found.auc, found.acc, run), scores)
    (folder / f"{split}.json").write_text(json.dumps({"split": split, "images": len(labels), **found.numbers}) + "\n")
    if pictures and installed("matplotlib"):
        classes = class_names(images.name, images.classes)
        plot_confusion(labels, scores, images.name, classes, folder / f"confusion_{split}.png")
        plot_roc(labels, scores, images.name, classes, folder / f"roc_{split}.png")
    return found
