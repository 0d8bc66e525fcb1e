"""A task, ready for any combination: a plain model, its batches, its loss, and how it is judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memtrain_common.training.task import Task
from torch import nn


@dataclass(frozen=True)
class Workload:
    """What a run trains on, whatever the axes say."""

    task: Task
    """The plain model with its own weights, on the CPU; its batches and its loss."""
    evaluate: Callable[[nn.Module, str], dict[str, float]]
    """(model, split) -> numbers by name, "loss" and ``metric`` among them."""
    metric: str
    """What decides which checkpoint is best."""
    higher_is_better: bool
    steps: int
    """Optimizer steps of the run."""
    eval_interval: int
    """Steps between evaluations."""
    about: dict[str, Any]
    """What the data are, with their "sha256"."""
    splits: tuple[str, ...] = ("val", "test")
    """Those that are judged at the end; the first one chooses the checkpoint."""
    unit: str = "samples"
    units_per_step: int = 0
    notes: tuple[str, ...] = ()
    """Sentences about the data that a person should read."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What a checkpoint must agree in, besides flags and data."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What is saved beside the model (a tokenizer, an image processor)."""


def name_classes(model: nn.Module, classes: Sequence[str]) -> None:
    """Put the classes' names into the configuration of a model of transformers, which its folder then tells."""
    settings: Any = getattr(model, "config", None)
    if hasattr(settings, "id2label") and len(settings.id2label) == len(classes):
        settings.id2label = dict(enumerate(classes))
        settings.label2id = {name: i for i, name in enumerate(classes)}
