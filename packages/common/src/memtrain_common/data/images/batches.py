"""Batches of images by number: decoded, cropped, mirrored and coloured as published recipes do, then normalised.

A batch, augmentation included, is a pure function of (seed, number). The geometry and the colours are torchvision's;
only its random numbers are ours.

===========  ==========================================================  ==========================================
recipe       training                                                    evaluation
===========  ==========================================================  ==========================================
none         scaled to S×S                                               scaled to S×S
flip         the same, half of them mirrored                             the same
flip-shift   the same, also moved by up to S/8, black beyond the edge    the same
vit          RandomResizedCrop of 5 to 100 % of the area                 the same
cotuning     scaled to 8S/7, RandomResizedCrop of 8 to 100 %, mirrored   scaled to 8S/7 square, the middle S×S
cnn          RandomResizedCrop of 22 to 100 %, mirrored                  shorter side to S/0.875, the middle S×S
===========  ==========================================================  ==========================================

``vit`` and ``cotuning`` are the recipes of Back Razor's ViT code (the latter of Co-Tuning, You et al., 2020), ``cnn``
that of its CNN code (TinyTL, Cai et al., 2020, arXiv:2007.11622).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..order import epoch_batch, random_bits, rank_share
from .image_set import ArrayImages, ImageSplit, Pixels

if TYPE_CHECKING:
    from torch import Tensor

Recipe = Literal["none", "flip", "flip-shift", "vit", "cotuning", "cnn"]
Jitter = Literal["none", "torch", "tf"]
Resize = Literal["bilinear", "nearest"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
# Part of the area, (least, most), by recipe; the sides' ratio is between 3/4 and 4/3.
_CROPS = {"vit": (0.05, 1.0), "cotuning": (0.08, 1.0), "cnn": (0.22, 1.0)}
# Greatest change of brightness, contrast, saturation (factors 1 ± x) and hue (± x turns).
_JITTERS = {"torch": (0.4, 0.4, 0.4, 0.1), "tf": (32 / 255, 0.0, 0.5, 0.0)}
_TRIES = 10
_DRAWS = 4 * _TRIES + 5  # a try of a crop takes 4 numbers, colour 5
Uniform = NDArray[np.float64]


@dataclass(frozen=True)
class Normalize:
    """(x/255 − mean) / std, by channel."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __call__(self, images: Pixels) -> "Tensor":
        """(B, S, S, 3) bytes -> (B, 3, S, S) floats."""
        import torch

        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return x.div_(255).sub_(mean).div_(std).contiguous()


IMAGENET = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ImageBatches:
    """Training batches by number, for :func:`memtrain_common.training.loop.fit`: (pixels (B, 3, S, S), labels)."""

    split: ImageSplit
    batch_size: int
    """Over all processes."""
    size: int
    """S: pixels of the model's input."""
    seed: int
    recipe: Recipe = "none"
    jitter: Jitter = "none"
    """Random brightness, contrast, saturation and hue, after the crop."""
    normalize: Normalize = Normalize()
    resize: Resize = "bilinear"
    """How S is reached without a crop: bilinear before anything else, or by nearest neighbours after all the rest, as
    MedMNIST's protocol has it: images in memory are mirrored and moved in pixels of their own."""
    multi_label: bool = False
    rank: int = 0
    world_size: int = 1

    def __call__(self, number: int) -> tuple["Tensor", "Tensor"]:
        rows = epoch_batch(self.seed, number, batch=self.batch_size, size=len(self.split))
        share = rank_share(np.arange(self.batch_size), self.rank, self.world_size)
        images = self._images(rows, share, number)
        if self.recipe not in ("none", "vit"):
            chance = random_bits(self.seed, number, 1, size=3 * self.batch_size).reshape(3, -1)[:, share]
            images = mirrored(images, chance[0])
            if self.recipe == "flip-shift":
                images = shifted(images, chance[1:])
        if self.jitter != "none":
            turns = self._uniform(number)[share, 4 * _TRIES :]
            images = np.stack([jittered(i, u, self.jitter) for i, u in zip(images, turns, strict=True)])
        return self.normalize(nearest(images, self.size)), as_labels(self.split.labels[rows[share]], self.multi_label)

    def _images(self, rows: NDArray[np.int64], share: NDArray[np.int64], number: int) -> Pixels:
        """(B, S, S, 3) bytes, cropped where the recipe crops."""
        if self.recipe not in _CROPS:
            return scaled(self.split, rows[share], self.size, self.resize)
        uniform = self._uniform(number)
        out = np.empty((len(share), self.size, self.size, 3), np.uint8)
        for i, j in enumerate(share):
            out[i] = randomly_cropped(self.split.images[rows[j]], uniform[j], self.size, self.recipe)
        return out

    def _uniform(self, number: int) -> Uniform:
        """(batch_size, _DRAWS) numbers in [0, 1)."""
        bits = random_bits(self.seed, number, 2, size=self.batch_size * _DRAWS)
        return np.multiply(bits >> np.uint64(11), 2.0**-53, dtype=np.float64).reshape(self.batch_size, _DRAWS)


def evaluation_batches(
    split: ImageSplit,
    size: int,
    *,
    recipe: Recipe = "none",
    normalize: Normalize,
    resize: Resize = "bilinear",
    batch: int,
    multi_label: bool = False,
) -> Iterator[tuple["Tensor", "Tensor"]]:
    """All images in their order, as the recipe evaluates them."""
    for start in range(0, len(split), batch):
        rows = np.arange(start, min(start + batch, len(split)))
        if recipe in ("cotuning", "cnn"):
            images = centred(split, rows, size, recipe)
        else:
            images = scaled(split, rows, size, resize)
        yield normalize(nearest(images, size)), as_labels(split.labels[rows], multi_label)


def as_labels(labels: NDArray[np.int64], multi_label: bool) -> "Tensor":
    import torch

    found = torch.from_numpy(labels)
    return found.float() if multi_label else found


def scaled(split: ImageSplit, rows: NDArray[np.int64], size: int, resize: Resize = "bilinear") -> Pixels:
    """(B, size, size, 3): each image scaled to the square whatever its shape, bilinear; "nearest" is left to do.

    Raises:
        ValueError: if images that are not in memory shall be scaled by nearest neighbours.
    """
    images = split.images
    if isinstance(images, ArrayImages) and (resize == "nearest" or images.array.shape[1:3] == (size, size)):
        array = images.array[rows]
        return array if array.ndim == 4 else np.repeat(array[..., None], 3, axis=3)
    if resize == "nearest":
        raise ValueError("nearest neighbours are taken of images in memory alone: load the set with fit=True")
    return np.stack([_resized(images[i], [size, size]) for i in rows])


def nearest(images: Pixels, size: int) -> Pixels:
    """(B, H, W, 3) -> (B, size, size, 3) by nearest neighbours."""
    import torch

    if images.shape[1:3] == (size, size):
        return images
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(x, (size, size), mode="nearest-exact").permute(0, 2, 3, 1).numpy()


def mirrored(images: Pixels, chance: NDArray[np.uint64]) -> Pixels:
    """Half of the images (B, H, W, 3) turned left to right, by random bits (B,)."""
    turned = (chance >> np.uint64(63)).astype(bool)
    return np.where(turned[:, None, None, None], images[:, :, ::-1], images)


def shifted(images: Pixels, chance: NDArray[np.uint64]) -> Pixels:
    """Images (B, S, S, 3) moved down and right by up to S/8, black beyond the edge, by random bits (2, B)."""
    side = images.shape[1]
    reach = max(1, side // 8)
    moves = (chance >> np.uint64(11)) % np.uint64(2 * reach + 1)  # (2, B)
    padded = np.pad(images, [(0, 0), (reach, reach), (reach, reach), (0, 0)])
    return np.stack([p[y : y + side, x : x + side] for p, (y, x) in zip(padded, moves.T.astype(int), strict=True)])


def centred(split: ImageSplit, rows: NDArray[np.int64], size: int, recipe: Recipe) -> Pixels:
    """(B, size, size, 3): scaled to a little more, and the middle."""
    larger = [8 * size // 7, 8 * size // 7] if recipe == "cotuning" else [math.ceil(size / 0.875)]
    way = "bicubic" if recipe == "cotuning" else "bilinear"
    out = np.empty((len(rows), size, size, 3), np.uint8)
    for k, i in enumerate(rows):
        image = _resized(split.images[i], larger, way)
        top, left = (round((n - size) / 2) for n in image.shape[:2])
        out[k] = image[top : top + size, left : left + size]
    return out


def randomly_cropped(picture: Pixels, uniform: Uniform, size: int, recipe: Recipe) -> Pixels:
    """torchvision's RandomResizedCrop, with the random numbers given: (size, size, 3)."""
    from torchvision.transforms import functional as F

    if recipe == "cotuning":
        picture = _resized(picture, [8 * size // 7, 8 * size // 7], "bicubic")
    top, left, height, width = crop_box(picture.shape[0], picture.shape[1], uniform, _CROPS[recipe])
    return np.asarray(F.resized_crop(_pil(picture), top, left, height, width, [size, size]))


def crop_box(height: int, width: int, uniform: Uniform, area: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width: a random part of the area in a random shape, or the middle where none fits."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for u in uniform[: 4 * _TRIES].reshape(_TRIES, 4):
        target = height * width * (area[0] + u[0] * (area[1] - area[0]))
        ratio = math.exp(low + u[1] * (high - low))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def jittered(image: Pixels, uniform: Uniform, kind: Jitter) -> Pixels:
    """Brightness, contrast, saturation and hue changed at random, in a random order."""
    from torchvision.transforms import functional as F

    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    order = _permutation(int(uniform[4] * 24))
    picture = _pil(image)
    for i in order:
        reach, turn = _JITTERS[kind][i], 2 * uniform[i] - 1
        if reach:
            picture = changes[i](picture, reach * turn + (i < 3))
    return np.asarray(picture)


def _permutation(number: int) -> list[int]:
    """The number-th of the 24 orders of four."""
    left, out = [0, 1, 2, 3], []
    for n in (6, 2, 1, 1):
        out.append(left.pop(number // n % len(left)))
        number %= n
    return out


def _pil(picture: Pixels) -> Any:
    from PIL import Image

    return Image.fromarray(picture)


def _resized(picture: Pixels, size: list[int], way: str = "bilinear") -> Pixels:
    """To [height, width], or the shorter side to [n]."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    if list(picture.shape[:2]) == size:
        return picture
    return np.asarray(F.resize(_pil(picture), size, InterpolationMode(way)))
