"""GLUE: its tasks, its TSV files in the layout that the benchmark ships, and its official metrics.

Layout of a task's folder (``DIR/CoLA``, ``DIR/SST-2``, …; the folder itself will do too): ``train.tsv`` and
``dev.tsv``, MNLI's ``dev_matched.tsv`` and ``dev_mismatched.tsv``. Columns are found by the names in the first row;
CoLA has none, and MRPC may come as ``msr_paraphrase_train.txt`` and ``msr_paraphrase_test.txt``.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import UserError
from ...files import lines_of
from ..hub import hub_rows

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class GlueTask:
    """One task: where it lies, what its columns are called, what is reported."""

    folder: str
    columns: tuple[str, ...]
    """The sentence, or the two, in the TSV's first row."""
    label: str
    """The label's column."""
    labels: tuple[str, ...]
    """Label texts in the order of their classes; empty: the label is a number (STS-B)."""
    metrics: tuple[str, ...]
    """What the benchmark reports; the first decides which of two runs is better."""
    hub_columns: tuple[str, ...] = ()
    """Columns in the hub's copy, where they differ."""

    @property
    def num_labels(self) -> int:
        return len(self.labels) or 1


TASKS = {
    "cola": GlueTask("CoLA", ("sentence",), "label", ("0", "1"), ("matthews",)),
    "sst2": GlueTask("SST-2", ("sentence",), "label", ("0", "1"), ("accuracy",)),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", ("entailment", "not_entailment"), ("accuracy",)),
    "mrpc": GlueTask(
        "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("accuracy", "f1"), ("sentence1", "sentence2")
    ),
    "rte": GlueTask("RTE", ("sentence1", "sentence2"), "label", ("entailment", "not_entailment"), ("accuracy",)),
    "stsb": GlueTask("STS-B", ("sentence1", "sentence2"), "score", (), ("pearson", "spearman")),
    "mnli": GlueTask(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("accuracy", "accuracy_mismatched"),
        ("premise", "hypothesis"),
    ),
    "qqp": GlueTask("QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), ("accuracy", "f1")),
}
_FILES = {
    "train": ("train.tsv", "msr_paraphrase_train.txt"),
    "dev": ("dev.tsv", "dev_matched.tsv", "msr_paraphrase_test.txt"),
    "dev_mismatched": ("dev_mismatched.tsv",),
}


@dataclass(frozen=True)
class GlueSplit:
    """Rows of one split, in the file's order."""

    texts: tuple[tuple[str, ...], ...]
    """One or two sentences a row."""
    labels: Array
    """Classes (int64), or scores (float32)."""

    def __len__(self) -> int:
        return len(self.texts)


def splits(task: str) -> tuple[str, ...]:
    """The splits that training and reporting need."""
    return ("train", "dev", "dev_mismatched") if task == "mnli" else ("train", "dev")


def load_glue(task: str, data_dir: str | Path | None) -> dict[str, GlueSplit]:
    """Every split of :func:`splits`, from local files or, without ``data_dir``, by the ``datasets`` package.

    Raises:
        UserError: naming the file, and the line where a row does not fit.
    """
    if data_dir is None:
        return {split: _from_hub(task, split) for split in splits(task)}
    return {split: read_split(task, Path(data_dir), split) for split in splits(task)}


def read_split(task: str, data_dir: Path, split: str) -> GlueSplit:
    """One split from ``data_dir/FOLDER`` or ``data_dir`` itself."""
    spec = TASKS[task]
    names = _FILES[split][1:2] if (task, split) == ("mnli", "dev") else _FILES[split]
    places = [folder / name for folder in (data_dir / spec.folder, data_dir) for name in names]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise UserError(f"{data_dir} has no {spec.folder}/{names[0]}: --data-dir needs GLUE's own folders of TSV files")
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            lines = [line.removesuffix("\n") for line in lines_of(file, path)] or [""]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    return _parse(spec, path, [line.rstrip("\r") for line in lines])


def _parse(spec: GlueTask, path: Path, lines: Sequence[str]) -> GlueSplit:
    if spec.folder == "CoLA":  # source, label, the author's mark, sentence; no first row of names
        at, label_at, width, first = [3], 1, 4, 0
    else:
        if not any(line.strip() for line in lines):
            raise UserError(f"{path} is empty: its first row must name the columns {', '.join(spec.columns)}")
        header = lines[0].split("\t")
        missing = [c for c in (*spec.columns, spec.label) if c not in header]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}: its first row names {', '.join(header)}")
        at, label_at = [header.index(c) for c in spec.columns], header.index(spec.label)
        width, first = len(header), 1
    texts, labels, incomplete = [], [], 0
    for number, line in enumerate(lines[first:], start=first + 1):
        if not line:
            continue
        cells = line.split("\t")
        if len(cells) < width and spec.folder == "QQP":  # the official file has a few such rows
            incomplete += 1
            continue
        if len(cells) > width or len(cells) <= max(*at, label_at):
            raise UserError(f"{path}, line {number}: {len(cells)} columns instead of {width}")
        labels.append(_label(spec, cells[label_at], path, number))
        texts.append(tuple(cells[i] for i in at))
    if not texts:
        raise UserError(f"{path} has no rows")
    if incomplete:
        warnings.warn(f"{path}: {incomplete} rows of fewer than {width} columns are left out", stacklevel=2)
    return GlueSplit(tuple(texts), np.array(labels, np.int64 if spec.labels else np.float32))


def _label(spec: GlueTask, text: str, path: Path, number: int) -> float:
    if spec.labels:
        if text not in spec.labels:
            raise UserError(f"{path}, line {number}: the label {text!r} is none of {', '.join(spec.labels)}")
        return spec.labels.index(text)
    try:
        score = float(text)
    except ValueError:
        raise UserError(f"{path}, line {number}: the score {text!r} is not a number") from None
    if not 0 <= score <= 5:
        raise UserError(f"{path}, line {number}: the score {score} is not between 0 and 5")
    return score


def _from_hub(task: str, split: str) -> GlueSplit:
    spec = TASKS[task]
    hub_split = {"train": "train", "dev": "validation", "dev_mismatched": "validation_mismatched"}[split]
    rows = hub_rows("nyu-mll/glue", task, "validation_matched" if (task, split) == ("mnli", "dev") else hub_split)
    columns = spec.hub_columns or spec.columns
    texts = tuple(tuple(str(row[c]) for c in columns) for row in rows)
    return GlueSplit(texts, np.array([row["label"] for row in rows], np.int64 if spec.labels else np.float32))


# -- metrics -----------------------------------------------------------------------------------------------------


def accuracy(predicted: Array, labels: Array) -> float:
    return float(np.mean(predicted == labels))


def f1(predicted: Array, labels: Array) -> float:
    """2·TP / (2·TP + FP + FN) of class 1; 0 where there is neither."""
    true = np.sum((predicted == 1) & (labels == 1))
    wrong = np.sum((predicted == 1) != (labels == 1))
    return float(2 * true / (2 * true + wrong)) if true + wrong else 0.0


def matthews(predicted: Array, labels: Array) -> float:
    """Matthews correlation of two classes; 0 where one of the two sides is constant."""
    return pearson(predicted == 1, labels == 1)


def pearson(predicted: Array, labels: Array) -> float:
    """Correlation; 0 where one side is constant, of which rounding would make any number from −1 to 1."""
    if any(np.all(v == v[:1]) for v in map(np.asarray, (predicted, labels))):
        return 0.0
    x, y = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (predicted, labels))
    norm = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / norm) if norm > 0 else 0.0


def spearman(predicted: Array, labels: Array) -> float:
    """Correlation of ranks; equal values share the mean of their ranks."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


_METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def glue_metrics(task: str, outputs: dict[str, Array], labels: dict[str, Array]) -> dict[str, float]:
    """What GLUE reports for the task.

    Args:
        outputs: logits (n×classes), or scores (n×1), by split.
        labels: by split.
    """
    spec = TASKS[task]
    found = {}
    for name in spec.metrics:
        split = "dev_mismatched" if name.endswith("_mismatched") else "dev"
        out = outputs[split]
        predicted = out.argmax(-1) if spec.labels else out[:, 0]
        found[name] = _METRICS[name.removesuffix("_mismatched")](predicted, labels[split])
    return found
