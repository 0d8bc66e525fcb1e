"""The model of a run: a ViT from random or pretrained weights, with the part that is trained."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from memtrain_common.data.images.batches import Normalize
from memtrain_common.data.images.image_set import ImageSet
from memtrain_common.models.classifier import Classifier
from memtrain_common.models.classifiers import build_classifier
from memtrain_common.models.other_classifiers import is_other_folder
from memtrain_common.models.vit import build_vit, patch_for
from torch import Tensor, nn

from ..melo import HEAD, MeLo, add_melo
from .flags import TrainConfig


def image_size(config: TrainConfig, images: ImageSet) -> int:
    """Pixels of the model's input."""
    return config.image_size or images.size


def describe(images: ImageSet) -> dict[str, Any]:
    """What a run's config.json keeps of its images."""
    return {**images.describe(), "size": images.size, "sha256": images.arrays_sha256}


def make_model(config: TrainConfig, images: ImageSet, say: Callable[[str], None]) -> Classifier:
    """The model with ``requires_grad`` set on what is trained, and the pictures that it wants; random numbers come from
    torch's generator.
    """
    classes = len(images.classes)
    if config.weights:
        size = config.image_size if is_other_folder(config.weights) else image_size(config, images)
        made = build_classifier("vit-b-16", classes, weights=config.weights, image_size=size)
        say(f"weights from {config.weights}; the head is {'theirs' if made.head_kept else 'new'}")
    else:
        size = image_size(config, images)
        patch = config.patch_size or patch_for(size)
        model = build_vit(config.model, image_size=size, patch_size=patch, classes=classes, dropout=config.dropout)
        made = Classifier(model, size, HEAD, Normalize())
        if config.train != "full":
            say(f"the backbone is random and stays so, since --train {config.train} has no --weights to adapt")
    return replace(made, model=select(made.model, config))


def select(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Freeze what ``--train`` does not train; adapters come from PEFT."""
    if config.train == "head":
        model.requires_grad_(False)
        getattr(model, HEAD).requires_grad_(True)
    elif config.train == "melo":
        return add_melo(model, MeLo(config.rank, config.alpha))
    elif config.train == "lora":
        return _add_lora(model, config)
    return model


def _add_lora(model: nn.Module, config: TrainConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != HEAD]
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides it as a float
        target_modules=names,
        modules_to_save=[HEAD],
    )
    return get_peft_model(model, settings)


def loss_of(multi_label: bool) -> Callable[[nn.Module, Any], Tensor]:
    """The mean loss over a batch (pixels, labels): cross-entropy, or binary cross-entropy over every label."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        pixels, labels = batch  # (B, 3, S, S); (B,), or (B, labels)
        logits = model(pixel_values=pixels).logits.float()  # (B, classes)
        if multi_label:
            return nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return nn.functional.cross_entropy(logits, labels)

    return loss
