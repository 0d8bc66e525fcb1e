"""Pictures to classify: any set that ``memtrain_common`` reads, by a ViT or a CNN."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from memtrain_common.data.images.batches import ImageBatches, evaluation_batches
from memtrain_common.data.images.image_set import ImageSet, ImageSplit
from memtrain_common.data.images.sets import load_images
from memtrain_common.errors import UserError
from memtrain_common.models.classifier import Classifier
from memtrain_common.models.classifiers import MODELS, build_classifier, classification_loss, logits_of, usual_size
from memtrain_common.training.distributed import World
from memtrain_common.training.task import Task
from torch import nn

from .config import FinetuneConfig
from .workload import Workload


def picture_workload(config: FinetuneConfig, world: World) -> Workload:
    """The set and the classifier that the flags name; fresh weights come from torch's generator."""
    pictures = with_labels(
        load_images(config.data, config.data_dir, size=config.size, verify=config.verify, bad=config.bad_images),
        config.labels,
    )
    name = config.model or "vit-mini"
    brings = config.weights or name not in MODELS
    size = config.image_size or (0 if brings else usual_size(name) or pictures.size)
    if not size and not brings:
        raise UserError(f"--image-size is missing: the pictures have several sizes, and {name} takes any")
    classifier = build_classifier(name, len(pictures.classes), weights=config.weights, image_size=size)
    rows = len(pictures.splits["train"])
    per_step = config.batch_size * config.gradient_accumulation_steps
    batches = ImageBatches(
        pictures.splits["train"],
        config.batch_size,
        classifier.image_size,
        config.seed,
        recipe=config.augment,
        normalize=classifier.normalize,
        multi_label=pictures.multi_label,
        rank=world.rank,
        world_size=world.size,
    )
    return Workload(
        task=Task(classifier.model, batches, classification_loss, fresh=classifier.fresh),
        evaluate=partial(_evaluate, pictures, classifier, config),
        metric="accuracy",
        higher_is_better=True,
        steps=config.total_steps(rows, per_step),
        eval_interval=max(1, math.ceil(config.eval_epochs * rows / per_step)),
        about={**pictures.describe(), "parts": pictures.parts()},
        units_per_step=per_step,
    )


def with_labels(found: ImageSet, labels: tuple[int, ...]) -> ImageSet:
    """Only the pictures of these classes, which become 0, 1, …

    Raises:
        UserError: if the set has no such class.
    """
    if not labels:
        return found
    if found.multi_label:
        raise UserError(
            f"--labels chooses classes, and a picture of {found.name} may have several labels: leave it out"
        )
    if len(set(labels)) != len(labels) or len(labels) < 2 or not all(0 <= c < len(found.classes) for c in labels):
        raise UserError(
            f"--labels {' '.join(map(str, labels))} must name two or more different classes of {found.name}, which "
            f"are 0 to {len(found.classes) - 1}"
        )
    splits = {}
    for name, split in found.splits.items():
        rows = np.flatnonzero(np.isin(split.labels, labels))
        new = np.array([labels.index(c) for c in split.labels[rows].tolist()], np.int64)
        splits[name] = ImageSplit(split.images.take(rows), new)
    return replace(found, classes=tuple(found.classes[c] for c in labels), splits=splits)


@torch.no_grad()
def _evaluate(
    pictures: ImageSet, classifier: Classifier, config: FinetuneConfig, model: nn.Module, split: str
) -> dict[str, float]:
    device = next(model.parameters()).device
    total = correct = count = 0.0
    for pixels, labels in evaluation_batches(
        pictures.splits[split], classifier.image_size, recipe=config.augment, normalize=classifier.normalize,
        batch=max(config.batch_size, 128), multi_label=pictures.multi_label,
    ):  # fmt: skip
        batch = (pixels.to(device), labels.to(device))
        logits = logits_of(model, batch[0]).float()
        n = len(labels)
        total += n * float(_loss_of_logits(logits, batch[1]))
        right = (logits > 0) == (batch[1] > 0.5) if pictures.multi_label else logits.argmax(-1) == batch[1]
        correct += float(right.float().mean()) * n
        count += n
    return {"loss": total / count, "accuracy": correct / count}


def _loss_of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.is_floating_point():
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return nn.functional.cross_entropy(logits, labels)
