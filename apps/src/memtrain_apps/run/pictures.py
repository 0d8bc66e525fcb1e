"""Pictures to classify: any set that ``memtrain_common`` reads, by a ViT or a CNN."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from memtrain_common.data.images.batches import ImageBatches, evaluation_batches
from memtrain_common.data.images.image_set import ImageSet, ImageSplit
from memtrain_common.data.images.sets import load_images
from memtrain_common.errors import UserError
from memtrain_common.files import write_json
from memtrain_common.models.classifier import Classifier
from memtrain_common.models.classifiers import MODELS, build_classifier, classification_loss, logits_of, usual_size
from memtrain_common.training.distributed import World
from memtrain_common.training.task import Task
from torch import nn

from .config import FinetuneConfig
from .workload import Workload, name_classes

CENTRED = ("cotuning", "cnn")
"""Recipes that judge the middle of a picture, which no processor of transformers cuts out alike."""


@dataclass(frozen=True)
class ImageProcessor:
    """How pictures become a classifier's input, as transformers' ``ViTImageProcessor`` reads it."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, classifier: Classifier) -> "ImageProcessor":
        return cls(classifier.image_size, classifier.normalize.mean, classifier.normalize.std)

    def save_pretrained(self, path: Path) -> None:
        """Write ``preprocessor_config.json``: the square of the training's size, bilinear, then (x/255 − mean)/std."""
        size = {"height": self.image_size, "width": self.image_size}
        content = {
            "image_processor_type": "ViTImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": size,
            "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(self.mean), "image_std": list(self.std),
        }  # fmt: skip
        write_json(path / "preprocessor_config.json", content)


@torch.no_grad()
def unseen_edge(model: nn.Module, image_size: int) -> str:
    """A sentence where patches do not fill the picture, whose edge the model then never sees; else ""."""
    patch = next((m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3), None)
    if patch is None or isinstance(patch.padding, str) or _seen(patch, image_size) >= image_size:
        return ""
    widths: list[int] = []  # a Swin widens the picture until patches fill it
    handle = patch.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[-1]))
    training, weight = model.training, patch.weight
    model.eval()(torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype))
    model.train(training)
    handle.remove()
    seen = _seen(patch, widths[0])
    if seen >= image_size:
        return ""
    return (
        f"patches of {patch.kernel_size[0]} pixels fill {seen} of a picture's {image_size}: its edge is not seen; give "
        f"--image-size {seen} or {seen + patch.stride[0]}"
    )


def _seen(patch: nn.Conv2d, width: int) -> int:
    """Pixels from a picture's left edge to the last one that the convolution looks at."""
    kernel, stride, padding = patch.kernel_size[0], patch.stride[0], int(patch.padding[0])
    steps = (width + 2 * padding - kernel) // stride
    return steps * stride + kernel - padding


def picture_workload(config: FinetuneConfig, world: World) -> Workload:
    """The set and the classifier that the flags name; fresh weights come from torch's generator."""
    notes: list[str] = []
    found = load_images(
        config.data, config.data_dir, size=config.size, verify=config.verify, bad=config.bad_images, say=notes.append
    )
    pictures = with_labels(found, config.labels)
    name = config.model or "vit-mini"
    brings = config.weights or name not in MODELS
    size = config.image_size or (0 if brings else usual_size(name) or pictures.size)
    if not size and not brings:
        raise UserError(
            f"--image-size is missing: the pictures of {pictures.name} may have several sizes, and {name} takes any"
        )
    classifier = build_classifier(name, len(pictures.classes), weights=config.weights, image_size=size)
    if unseen := unseen_edge(classifier.model, classifier.image_size):
        notes.append(unseen)
    name_classes(classifier.model, pictures.classes)
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
        notes=tuple(notes),
        identity={"normalize": [list(classifier.normalize.mean), list(classifier.normalize.std)]},  # of moved weights
        extra={} if config.augment in CENTRED else {"image_processor": ImageProcessor.of(classifier)},
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
