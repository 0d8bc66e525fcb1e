"""Image classifiers of transformers (any folder that it has a classifier for) and of timm (``timm:NAME``).

The size and the normalisation of the pictures are those that the model was trained with, as it says itself: in
``preprocessor_config.json``, or in timm's own table.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.images.batches import IMAGENET, Normalize
from ..errors import UserError
from ..files import read_json
from .classifier import Classifier
from .vit_files import BY_NAME, read_state_dict


def is_other(name: str) -> bool:
    """Whether a name is ``timm:NAME``, or a folder of transformers whose model is none of its ViTs."""
    return name.startswith(BY_NAME) or is_other_folder(name)


def is_other_folder(name: str) -> bool:
    """Whether a name is a folder of transformers whose model is none of its ViTs."""
    return (Path(name) / "config.json").is_file() and _config(Path(name)).get("model_type") != "vit"


def other_size(name: str) -> int:
    """Pixels of a picture's side that the model was trained with."""
    if name.startswith(BY_NAME):
        return int(_timm_settings(name).get("input_size", (3, 224, 224))[-1])
    found = _preprocessing(Path(name))
    for key in ("crop_size", "size"):
        size = found.get(key)
        if isinstance(size, Mapping):
            size = size.get("height") or size.get("shortest_edge")
        if isinstance(size, int) and size > 0:
            return size
    own = _config(Path(name)).get("image_size", 224)
    return int(own[0] if isinstance(own, list) else own)


def load_other(name: str, classes: int, *, weights: str = "", image_size: int = 0) -> Classifier:
    """The classifier; a head of other classes is fresh, drawn by torch's generator.

    Args:
        name: a folder of transformers with ``config.json`` and weights, or ``timm:NAME``.
        weights: of a timm model, a file of its tensors (``.safetensors``, ``.pth``); empty takes timm's own, which are
            in its cache or downloaded. EfficientNet-Lite's published names are known.
        image_size: pixels; 0 takes :func:`other_size`.

    Raises:
        UserError: if there is no such model, its weights are not of it, or it takes no pictures of this size.
    """
    size = image_size or other_size(name)
    fresh: tuple[str, ...] = ()
    if name.startswith(BY_NAME):
        model, kept = _timm(name, classes, weights, size)
        settings = _timm_settings(name)
        normalize = _normalize(settings.get("mean"), settings.get("std"))
    else:
        if weights:
            raise UserError(f"the folder {name} brings its weights: leave {weights} out, or name the model alone")
        model, kept, fresh = _transformers(name, classes)
        found = _preprocessing(Path(name))
        normalize = _normalize(found.get("image_mean"), found.get("image_std"))
    _try(model, name, size)
    return Classifier(model, size, _head(model, name, classes), normalize, kept, fresh)


# -- transformers --------------------------------------------------------------------------------------------------


def _transformers(name: str, classes: int) -> tuple[nn.Module, bool, tuple[str, ...]]:
    """-> the model, whether its head is the folder's own, and what else begins at random."""
    import transformers

    from .encoders import from_pretrained

    config = from_pretrained(transformers.AutoConfig, name, "configuration")
    if type(config) not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise UserError(f"{name} holds a {config.model_type!r} model, and transformers has no image classifier of that")
    model, loading = from_pretrained(
        transformers.AutoModelForImageClassification, name, "model", num_labels=classes, ignore_mismatched_sizes=True,
        output_loading_info=True, dtype=torch.float32,
    )  # fmt: skip
    head = _head(model, name, classes)
    wrong = [str(key[0]) for key in loading["mismatched_keys"] if not str(key[0]).startswith(f"{head}.")]
    if wrong:
        raise UserError(f"{name} has {wrong[0]} of another shape than its config.json says: the folder is inconsistent")
    fresh = [str(key) for key in loading["missing_keys"]]
    missing = next((key for key in fresh if not _may_be_fresh(key, head)), None)
    if missing is not None:
        raise UserError(f"{name} has no {missing}: its weights are not those of its config.json")
    resized = any(str(key[0]).startswith(f"{head}.") for key in loading["mismatched_keys"])
    outside = {key.rpartition(".")[0] for key in fresh if ".pooler." in f".{key}"}
    kept = not resized and not any(key.startswith(f"{head}.") for key in fresh)
    return model.train(), kept, tuple(sorted(outside))


def _may_be_fresh(key: str, head: str) -> bool:
    """What a backbone that was saved alone lacks: the head, and a pooler or norm that stands before it."""
    return key.startswith(f"{head.split('.')[0]}.") or ".pooler." in f".{key}" or key.endswith("mask_token")


def _config(folder: Path) -> dict[str, Any]:
    return _read(folder / "config.json")


def _preprocessing(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): it must be a JSON file of transformers") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object, which transformers writes there")
    return content


# -- timm ----------------------------------------------------------------------------------------------------------


def _timm_settings(name: str) -> dict[str, Any]:
    import timm

    word = name.removeprefix(BY_NAME)
    if not timm.is_model(word):
        near = difflib.get_close_matches(word, timm.list_models(), n=3)
        hint = f": it has {', '.join(near)}" if near else ""
        raise UserError(f"timm {timm.__version__} has no model {word}{hint}")
    found = timm.get_pretrained_cfg(word)
    return found.to_dict() if found is not None else {}


def _timm(name: str, classes: int, weights: str, size: int) -> tuple[nn.Module, bool]:
    import timm

    word = name.removeprefix(BY_NAME)
    own = int(_timm_settings(name).get("input_size", (3, 224, 224))[-1])
    sized = {} if size == own else {"img_size": size}
    try:
        try:
            model: Any = timm.create_model(word, pretrained=not weights, num_classes=classes, **sized)
        except TypeError:  # convolutions take any size and no such word
            model = timm.create_model(word, pretrained=not weights, num_classes=classes)
    except Exception as error:  # of the hub, by classes of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"timm makes no {word} ({reason}): with --weights FILE it needs no network") from None
    if not weights:
        return model, model.pretrained_cfg.get("num_classes") == classes
    tensors = read_state_dict(Path(weights))
    if "_conv_stem.weight" in tensors:
        tensors = published_lite(model, word, weights, tensors)
    state, head = model.state_dict(), _head(model, name, classes)
    parts = [n for n in state if n.startswith(f"{head}.")]
    kept = all(n in tensors and tensors[n].shape == state[n].shape for n in parts)
    if not kept:
        tensors = {**tensors, **{n: state[n] for n in parts}}
    for n, t in state.items():
        if n not in tensors:
            raise UserError(f"{weights} is not of {word}: it has no {n}")
        if tensors[n].shape != t.shape:
            raise UserError(f"{weights} is not of {word}: its {n} is {tuple(tensors[n].shape)}, not {tuple(t.shape)}")
    unknown = next((n for n in tensors if n not in state), None)
    if unknown is not None:
        raise UserError(f"{weights} is not of {word}: it has {unknown}, which that lacks")
    model.load_state_dict(tensors)
    return model, kept


def published_lite(model: Any, word: str, weights: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published EfficientNet-Lite files (``_blocks.3._expand_conv.weight``, …) under timm's names.

    They are TensorFlow's, which pads at the right and below and has 1e-3 in its batch norms: timm's
    ``tf_efficientnet_lite*``. Its ``efficientnet_lite*`` have the same shapes and other outputs, and are refused.
    """
    if not word.startswith("tf_efficientnet_lite"):
        raise UserError(f"{weights} is a published EfficientNet-Lite: give {BY_NAME}tf_efficientnet_lite0 (to lite4)")
    places = [(f"blocks.{s}.{i}", hasattr(block, "conv_pwl")) for s, stage in enumerate(model.blocks)
              for i, block in enumerate(stage)]  # fmt: skip
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    expanded = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    found = {}
    for key, tensor in tensors.items():
        inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        try:
            if inside:
                place, has_expansion = places[int(inside[1])]
                name = f"{place}.{(expanded if has_expansion else separable)[inside[2]]}.{inside[3]}"
            else:
                module, _, part = key.partition(".")
                name = f"{top[module]}.{part}"
        except (KeyError, IndexError):
            raise UserError(f"{weights} is not of {word}: it has {key}, which that lacks") from None
        found[name] = tensor
    return found


# -- both ----------------------------------------------------------------------------------------------------------


def _normalize(mean: Any, std: Any) -> Normalize:
    """As the model says; ImageNet's where it does not."""
    if mean is None or std is None:
        return IMAGENET
    try:
        (a, b, c), (d, e, f) = (tuple(map(float, v)) for v in (mean, std))
    except (TypeError, ValueError):
        raise UserError(f"the model is for pictures of {len(mean)} channels, and ours have 3") from None
    return Normalize((a, b, c), (d, e, f))


def _head(model: nn.Module, name: str, classes: int) -> str:
    last = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    last += [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.out_channels == classes][-1:]
    if not last:
        raise UserError(f"{name} ends in no linear layer of {classes} classes: choose another model")
    return next((n for n in reversed(last) if n.split(".")[0] in ("classifier", "head", "fc")), last[-1])


@torch.no_grad()
def _try(model: nn.Module, name: str, size: int) -> None:
    """One picture through the model, before anything is read or written."""
    training = model.training
    try:
        model.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:  # of any library, in any layer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{name} takes no pictures of {size} pixels ({reason}): leave --image-size out, or give one that it takes"
        ) from None
    finally:
        model.train(training)
