"""Image classifiers by name: ViTs, torchvision's CNNs, ProxylessNAS-Mobile, CIFAR's ResNet-20; with local weights.

A folder of transformers or ``timm:NAME`` is any other classifier (:mod:`.other_classifiers`).

What a model wants to be given (its size in pixels, the normalisation of its pretraining) comes with it.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.images.batches import IMAGENET, Normalize
from ..errors import UserError
from .cifar_resnet import CifarResNet
from .classifier import Classifier
from .other_classifiers import is_other, is_other_folder, load_other, other_size
from .proxyless import ProxylessMobile, made_for, renamed
from .vit import build_vit, load_vit, patch_for
from .vit_files import read_state_dict

# name -> (the size of a ViT, its patch in pixels; 0 is decided by the picture)
VITS = {
    "vit-mini": ("mini", 0),
    "vit-ti-16": ("ti", 16),
    "vit-s-16": ("s", 16),
    "vit-b-16": ("b", 16),
    "vit-l-16": ("l", 16),
}
# name -> its head
CNNS = {
    "resnet18": "fc", "resnet50": "fc", "mobilenet_v2": "classifier.1", "proxyless_mobile": "classifier.linear",
    "resnet20": "linear",
}  # fmt: skip
MODELS = (*VITS, *CNNS)
IMAGENET_WEIGHTS = "imagenet"


def usual_size(name: str, weights: str = "") -> int:
    """Pixels that a model was made for; 0 where it takes the picture's."""
    other = _other(name, weights)
    if other:
        return other_size(other)
    if name in CNNS:
        return 32 if name == "resnet20" else 224
    return 0 if name == "vit-mini" and not weights else 224


def build_classifier(
    name: str, classes: int, *, weights: str = "", image_size: int = 0, patch_size: int = 0
) -> Classifier:
    """A classifier of :data:`MODELS`, or another, its random numbers from torch's generator.

    Args:
        name: which, a folder of transformers, or ``timm:NAME``; with ``weights`` of a ViT the file decides, and any
            ViT's name will do.
        classes: outputs of the head. A head of the weights is kept where it has as many, else it is fresh.
        weights: of a ViT a folder of transformers, Google's ``.npz`` or timm's ``.safetensors``; of a CNN its state
            dict as ``.safetensors`` or ``.pth``, or "imagenet" for torchvision's, which are downloaded; of timm's its
            tensors. A folder of transformers may stand here as well.
        image_size: pixels; 0 takes :func:`usual_size`, and of a ViT's weights what they were trained with.
        patch_size: of a ViT with random weights; 0 takes the name's, or what fits the picture.

    Raises:
        UserError: if there is no such model, or the weights are not of it (naming the first that differs).
    """
    other = _other(name, weights)
    if other:
        if patch_size:
            raise UserError(f"--patch-size {patch_size} would do nothing: {other} has patches of its own; leave it out")
        return load_other(other, classes, weights="" if other == weights else weights, image_size=image_size)
    if Path(name).is_dir():  # a ViT of transformers
        if weights:
            raise UserError(f"the folder {name} brings its weights: leave {weights} out, or name the model alone")
        name, weights = "vit-b-16", name
    if name not in MODELS:
        raise UserError(
            f"{name!r} is no known model: choose one of {', '.join(MODELS)}, a folder of transformers, or timm:NAME"
        )
    if name in CNNS:
        image_size = image_size or usual_size(name)
        tensors = _weights(name, weights) if weights else {}
        model = _cnn(name, classes, tensors)
        kept = _load(model, name, weights, tensors) if weights else False
        return Classifier(model, image_size, CNNS[name], IMAGENET, kept)
    if weights:
        model, kept = load_vit(Path(weights), image_size=image_size, classes=classes)
    else:
        size, patch = VITS[name]
        image_size = image_size or usual_size(name)
        patch = patch_size or patch or patch_for(image_size)
        model, kept = build_vit(size, image_size=image_size, patch_size=patch, classes=classes), False
    made: Any = model.config  # of weights whose size was not asked for, their own
    return Classifier(model, made.image_size, "classifier", Normalize(), kept)


def _other(name: str, weights: str) -> str:
    """The folder or name of a classifier that :mod:`.other_classifiers` loads; empty where it is one of ours."""
    if is_other(name):
        return name
    return weights if name in (*VITS, "") and weights and is_other_folder(weights) else ""


def logits_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, classes), of transformers' models and plain ones."""
    out = model(pixels)
    return out if isinstance(out, Tensor) else out.logits


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, label_smoothing: float = 0.0) -> Tensor:
    """The mean over a batch: cross-entropy; where labels are (B, labels) floats, binary cross-entropy over each."""
    pixels, labels = batch
    logits = logits_of(model, pixels).float()
    if labels.is_floating_point():
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def _cnn(name: str, classes: int, tensors: dict[str, Tensor]) -> nn.Module:
    if name == "resnet20":
        return CifarResNet(3, classes)
    if name == "proxyless_mobile":
        return made_for(tensors, classes) if tensors else ProxylessMobile(classes)
    try:
        from torchvision import models
    except ImportError:
        raise UserError(f"{name} needs the package torchvision: pip install torchvision") from None
    return getattr(models, name)(num_classes=classes)


def _weights(name: str, weights: str) -> dict[str, Tensor]:
    tensors = _imagenet(name) if weights == IMAGENET_WEIGHTS else read_state_dict(Path(weights))
    return renamed(tensors) if name == "proxyless_mobile" else tensors


def _load(model: nn.Module, name: str, weights: str, tensors: dict[str, Tensor]) -> bool:
    """Put the weights into the model, all but a head of other classes; -> whether the head was put in."""
    own = model.state_dict()
    head = [f"{CNNS[name]}.{part}" for part in ("weight", "bias")]
    kept = all(n in tensors and tensors[n].shape == own[n].shape for n in head)
    if not kept:
        tensors = {**tensors, **{n: own[n] for n in head}}
    tensors = {**{n: t for n, t in own.items() if n.endswith("num_batches_tracked")}, **tensors}  # old files lack it
    for n in own:
        if n not in tensors:
            raise UserError(f"{weights} is not of a {name}: it has no {n}")
        if tensors[n].shape != own[n].shape:
            raise UserError(
                f"{weights} is not of a {name}: its {n} is {tuple(tensors[n].shape)}, not {tuple(own[n].shape)}"
            )
    unknown = next((n for n in tensors if n not in own), None)
    if unknown is not None:
        raise UserError(f"{weights} is not of a {name}: it has {unknown}, which that lacks")
    model.load_state_dict(tensors)
    return kept


def _imagenet(name: str) -> dict[str, Tensor]:
    """torchvision's newest ImageNet weights, through its cache; the file's hash is in its name and is checked."""
    if name == "resnet20":
        raise UserError("--weights imagenet: there are none of resnet20, which is CIFAR's")
    if name == "proxyless_mobile":
        raise UserError("--weights imagenet: torchvision has none of proxyless_mobile: name the published file")
    from torchvision.models import get_model_weights

    try:
        return dict(get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (OSError, RuntimeError) as error:
        raise UserError(f"ImageNet weights of {name} could not be downloaded: {error}") from None
