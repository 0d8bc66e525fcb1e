"""AUC and ACC as MedMNIST's Evaluator defines them, and calibration error; numpy alone.

Scores are what the official result files hold: (N, classes) probabilities of a multi-class task, (N,),
(N, 1) or (N, 2) of a binary one (the last column counts), (N, labels) of a multi-label one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

MULTI_LABEL = "multi-label, binary-class"
TASKS = ("multi-class", "ordinal-regression", "binary-class", MULTI_LABEL)


def auc(labels: ArrayLike, scores: ArrayLike, task: str) -> float:
    """Area under the ROC curve: binary, or the mean over labels, or over classes one against the rest."""
    y, s = _checked(labels, scores, task)
    return float(np.mean([_binary_auc(y[:, i], s[:, i], i, task) for i in range(s.shape[1])]))


def accuracy(labels: ArrayLike, scores: ArrayLike, task: str) -> float:
    """Share of right answers: the largest score's class, or scores above 0.5 (the mean over labels)."""
    y, s = _checked(labels, scores, task)
    if task in ("binary-class", MULTI_LABEL):
        return float(np.mean((s > 0.5) == y))
    return float(np.mean(s.argmax(axis=1) == y.argmax(axis=1)))


def calibration_error(labels: ArrayLike, scores: ArrayLike, task: str, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017, arXiv:1706.04599, Equation 3), a number in [0, 1].

    Σ_b |B_b|/N · |accuracy(B_b) − confidence(B_b)| over bins of equal width of the answer's probability;
    of a multi-label task the mean over labels.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    y, s = _checked(labels, scores, task)
    if s.min() < 0.0 or s.max() > 1.0:
        raise ValueError("calibration needs probabilities, and a score lies outside 0..1: apply softmax or sigmoid")
    if task in ("binary-class", MULTI_LABEL):
        confidence, right = np.maximum(s, 1 - s), (s > 0.5) == y  # (N, labels)
    else:
        confidence, right = s.max(axis=1, keepdims=True), (s.argmax(axis=1) == y.argmax(axis=1))[:, None]
    return float(np.mean([_gap(confidence[:, i], right[:, i], bins) for i in range(confidence.shape[1])]))


def _gap(confidence: NDArray, right: NDArray, bins: int) -> float:
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    total = 0.0
    for b in np.unique(which):
        inside = which == b
        total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(total)


def _binary_auc(y: NDArray, s: NDArray, column: int, task: str) -> float:
    """P(score of a positive > score of a negative), ties half: the rank-sum statistic."""
    positives = int(y.sum())
    negatives = len(y) - positives
    if positives == 0 or negatives == 0:
        what = f"label {column}" if task == MULTI_LABEL else f"class {column if task != 'binary-class' else 1}"
        only = "absent from" if positives == 0 else "the only one in"
        raise ValueError(f"AUC is undefined: {what} is {only} the {len(y)} samples; evaluate on more of them")
    _, place, counts = np.unique(s, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal scores share the mean of their ranks
    return float((ranks[y].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _checked(labels: ArrayLike, scores: ArrayLike, task: str) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(N, columns) truth and scores; one column for a binary task."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {'; '.join(TASKS)}, not {task!r}")
    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError("a label is NaN or Inf")
    if y.shape[:1] != s.shape[:1] or len(y) == 0:
        raise ValueError(f"{len(s) if s.ndim else 0} scores do not match {len(y) if y.ndim else 0} labels")
    if not np.isfinite(s).all():
        raise ValueError("a score is NaN or Inf")
    y, s = y.reshape(len(y), -1), s.reshape(len(s), -1)
    highest = 1 if task in ("binary-class", MULTI_LABEL) else s.shape[1] - 1
    if y.min() < 0 or y.max() > highest:
        raise ValueError(f"labels lie in {y.min()}..{y.max()}, and must lie in 0..{highest}")
    if task == MULTI_LABEL:
        if y.shape != s.shape:
            raise ValueError(f"scores have {s.shape[1]} columns for {y.shape[1]} labels")
        return y.astype(bool), s
    if y.shape[1] != 1:
        raise ValueError(f"a {task} task has one label a sample, not {y.shape[1]}")
    if task == "binary-class":
        if s.shape[1] > 2:
            raise ValueError(f"a binary task has one or two scores a sample, not {s.shape[1]}")
        return y.astype(bool), s[:, -1:]
    return y == np.arange(s.shape[1]), s
