"""Metrics against MedMNIST's own Evaluator on files of its form, and against definitions."""

import numpy as np
import pytest
from galore_vit.metrics import accuracy, auc, calibration_error
from image_files import random_file
from memtrain_common.data.images.medmnist_sets import SETS

FLAGS = ["breastmnist", "bloodmnist", "retinamnist", "chestmnist"]


def random_scores(flag, n, columns, ties):
    draw = np.random.default_rng(1)
    s = draw.random((n, columns))
    s = np.round(s, 1) if ties else s
    task = SETS[flag].task
    return s if task.startswith("multi-label") or columns == 1 else s / s.sum(1, keepdims=True).clip(1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("flag", FLAGS)
def test_equal_to_the_evaluator(tmp_path, flag, ties):
    evaluator = pytest.importorskip("medmnist.evaluator", reason="medmnist is not installed")
    labels = random_file(tmp_path, flag, 97)
    task, classes = SETS[flag].task, SETS[flag].classes
    for columns in (1, 2) if task == "binary-class" else (classes,):
        scores = random_scores(flag, 97, columns, ties)
        official = evaluator.Evaluator(flag, "test", root=str(tmp_path)).evaluate(scores)
        assert auc(labels, scores, task) == pytest.approx(official.AUC, abs=1e-12)
        assert accuracy(labels, scores, task) == pytest.approx(official.ACC, abs=1e-12)


@pytest.mark.filterwarnings("ignore:Only one class is present")
@pytest.mark.parametrize("flag", ["breastmnist", "bloodmnist", "chestmnist"])
def test_an_absent_class_is_refused_where_the_evaluator_says_nan(tmp_path, flag):
    evaluator = pytest.importorskip("medmnist.evaluator", reason="medmnist is not installed")
    labels = random_file(tmp_path, flag, 40, absent=1)
    task, classes = SETS[flag].task, SETS[flag].classes
    scores = random_scores(flag, 40, 2 if task == "binary-class" else classes, False)
    official = evaluator.Evaluator(flag, "test", root=str(tmp_path)).evaluate(scores)
    assert np.isnan(official.AUC)
    with pytest.raises(ValueError, match=r"AUC is undefined: (class|label) 1 is absent from the 40 samples"):
        auc(labels, scores, task)
    assert accuracy(labels, scores, task) == pytest.approx(official.ACC, abs=1e-12)


def test_auc_is_the_share_of_ordered_pairs():
    draw = np.random.default_rng(0)
    y, s = draw.integers(0, 2, 40), np.round(draw.random(40), 1)
    pairs = [(a > b) + 0.5 * (a == b) for a in s[y == 1] for b in s[y == 0]]
    assert auc(y, s, "binary-class") == pytest.approx(np.mean(pairs))


def test_calibration_error():
    y = np.array([0, 1, 1, 1])
    assert calibration_error(y, np.array([[1.0, 0.0], [0, 1], [0, 1], [0, 1]]), "multi-class") == 0
    assert calibration_error(y, np.array([1.0, 0, 0, 0]), "binary-class") == 1
    assert calibration_error(y, np.full(4, 0.8), "binary-class") == pytest.approx(0.05)  # 75 % right at 80 %
    two = np.stack([y, 1 - y], 1)
    scores = np.stack([np.full(4, 0.8), np.full(4, 0.2)], 1)
    assert calibration_error(two, scores, "multi-label, binary-class") == pytest.approx(0.05)
    draw = np.random.default_rng(0)
    p = draw.random(200_000)
    assert calibration_error((draw.random(200_000) < p).astype(int), p, "binary-class") < 0.01


def test_one_sample():
    assert accuracy([2], [[0.1, 0.2, 0.7]], "multi-class") == 1.0
    with pytest.raises(ValueError, match="class 0 is absent"):
        auc([2], [[0.1, 0.2, 0.7]], "multi-class")


@pytest.mark.parametrize(("labels", "scores", "task", "match"), [
    ([0, 1, 0], [[0.5, 0.2, 0.3]] * 3, "multi-class", "class 2 is absent"),
    ([0, 0], [0.1, 0.2], "binary-class", "class 1 is absent"),
    ([1, 1], [0.1, 0.2], "binary-class", "the only one"),
    ([0, 3], [[0.5, 0.5]] * 2, "multi-class", "lie in 0..3"),
    ([0, 1, 1], [0.1, 0.2], "binary-class", "do not match"),
    ([0, 1], [[0.1, 0.2, 0.7]] * 2, "binary-class", "one or two"),
    ([[0, 1], [1, 0]], [[0.5] * 3] * 2, "multi-label, binary-class", "3 columns for 2"),
    ([[0, 1], [1, 0]], [[0.5] * 2] * 2, "multi-class", "one label"),
    ([0, 1], [0.1, float("nan")], "binary-class", "NaN"),
    ([0, 1], [0.1, 0.2], "regression", "task must be"),
])  # fmt: skip
def test_refused(labels, scores, task, match):
    with pytest.raises(ValueError, match=match):
        auc(labels, scores, task)


def test_calibration_needs_probabilities():
    with pytest.raises(ValueError, match="probabilities"):
        calibration_error([0, 1], [-1.0, 2.0], "binary-class")
