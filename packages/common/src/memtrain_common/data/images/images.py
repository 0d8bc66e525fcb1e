"""Labelled images: scikit-learn's digits (embedded), MedMNIST files, folders of pictures; and batches of them.

Everything is kept as bytes in memory and becomes floating point a batch at a time. What a batch holds, augmentation
included, is a pure function of (seed, number), as :mod:`memtrain_common.data.order` has it.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ..order import epoch_batch, epoch_order, random_bits, rank_share, stratified
from .folders import picture_folder
from .image_set import MULTI_LABEL, PictureSplit
from .medmnist import SPLITS, Split, file_name, read_npz
from .medmnist_sets import SETS

if TYPE_CHECKING:
    from torch import Tensor

Augment = Literal["none", "flip", "flip-shift"]


@dataclass(frozen=True)
class ImageSet:
    """Images and labels in three splits."""

    name: str
    task: str
    """MedMNIST's words: multi-class, ordinal-regression, binary-class, or multi-label, binary-class."""
    classes: tuple[str, ...]
    """Names of the classes, or of a multi-label set's labels."""
    splits: dict[str, Split]
    """"train", "val" and "test"; images (N, S, S) or (N, S, S, 3) bytes."""
    official_name: str
    """How the set is called in the names of result files: ``breastmnist``, ``breastmnist_64``."""

    @property
    def size(self) -> int:
        """Pixels of an image's side."""
        return self.splits["train"].images.shape[1]

    @property
    def multi_label(self) -> bool:
        return self.task == MULTI_LABEL

    @cached_property
    def sha256(self) -> str:
        """Hash of all images and labels."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for array in (self.splits[split].images, self.splits[split].labels):
                digest.update(str(array.shape).encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        counts = {split: len(self.splits[split].images) for split in SPLITS}
        return {"name": self.name, "task": self.task, "classes": list(self.classes), "size": self.size, **counts,
                "sha256": self.sha256}  # fmt: skip


def load_images(name: str, data_dir: str = "", size: int = 28, *, verify: bool = True) -> ImageSet:
    """A set by name.

    Args:
        name: "digits" (in scikit-learn, 8 pixels), a MedMNIST set, or "folder".
        data_dir: where a MedMNIST set's npz file lies, or the folder of pictures.
        size: pixels of a MedMNIST file or of a folder's pictures; the digits have theirs.
        verify: compare a MedMNIST file's MD5 with the published one.

    Raises:
        UserError: naming what is missing or damaged.
    """
    if name == "digits":
        if data_dir:
            raise UserError("the digits come with scikit-learn: leave --data-dir out, or name another --data")
        return digits()
    if not data_dir:
        what = "the folder of pictures" if name == "folder" else f"the folder that holds {name}.npz"
        raise UserError(f"--data {name} needs --data-dir, {what}")
    if name == "folder":
        return image_folder(Path(data_dir), size)
    splits = read_npz(data_dir, name, size, verify=verify)
    known = SETS[name]
    labels = tuple(map(str, range(known.classes)))
    return ImageSet(name, known.task, labels, splits, Path(file_name(name, size)).stem)


def digits() -> ImageSet:
    """scikit-learn's 1797 handwritten digits of 8×8 pixels: 1197 for training, 200 to validate, 400 to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), 16 levels of grey
    order = epoch_order(0, 0, len(images))
    cuts = {"train": order[:1197], "val": order[1197:1397], "test": order[1397:]}
    labels = found.target.astype(np.int64)
    splits = {name: Split(images[rows], labels[rows]) for name, rows in cuts.items()}
    return ImageSet("digits", "multi-class", tuple(map(str, range(10))), splits, "digits")


def image_folder(folder: Path, size: int) -> ImageSet:
    """The pictures of a folder or a zip, in memory (:func:`memtrain_common.data.images.folders.picture_folder`).

    Pictures become RGB, their shorter side is scaled to ``size`` (bilinear) and the middle is cut out.
    """
    found = picture_folder(folder)
    splits = {name: Split(_fitted(split, size), split.labels) for name, split in found.splits.items()}
    return ImageSet(found.name, found.task, found.classes, splits, found.name.replace("_", "-"))


def _fitted(split: PictureSplit, size: int) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    fit, way = ImageOps.fit, Image.Resampling.BILINEAR
    return np.stack([np.asarray(fit(Image.fromarray(split.pictures[i]), (size, size), way)) for i in range(len(split))])


def fold(images: ImageSet, k: int, folds: int, seed: int = 0) -> ImageSet:
    """The set with part k of train and val together, cut into ``folds`` stratified parts, as val; test stays."""
    both = [images.splits["train"], images.splits["val"]]
    if folds > len(both[0].images) + len(both[1].images):
        raise UserError(f"{folds} folds cannot be cut from {len(both[0].images) + len(both[1].images)} images")
    pool = Split(np.concatenate([s.images for s in both]), np.concatenate([s.labels for s in both]))
    parts = stratified(pool.labels, folds, seed)
    return replace(images, splits={**images.splits, "train": _rows(pool, parts != k), "val": _rows(pool, parts == k)})


def _rows(split: Split, rows: NDArray[np.bool_]) -> Split:
    return Split(split.images[rows], split.labels[rows])


def to_pixels(images: NDArray[np.uint8], size: int) -> "Tensor":
    """(B, S, S) or (B, S, S, 3) bytes -> (B, 3, size, size) floats in [−1, 1]: MedMNIST's Normalize(.5, .5).

    Grey becomes three equal channels; another size is reached by nearest neighbours, as the MedMNIST protocol has it.
    """
    import torch

    x = torch.from_numpy(np.ascontiguousarray(images))
    x = x[:, None].expand(-1, 3, -1, -1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    if x.shape[-1] != size:
        x = torch.nn.functional.interpolate(x, (size, size), mode="nearest-exact")
    return x.float().div_(127.5).sub_(1).contiguous()


@dataclass(frozen=True)
class ImageBatches:
    """Training batches by number, for :func:`memtrain_common.training.loop.fit`: (pixels (B, 3, S, S), labels)."""

    split: Split
    batch_size: int
    """Over all processes."""
    size: int
    """Pixels of the model's input."""
    seed: int
    augment: Augment = "none"
    """"flip": half of the images mirrored; "flip-shift": also moved by up to an eighth, black beyond the edge."""
    multi_label: bool = False
    rank: int = 0
    world_size: int = 1

    def __call__(self, number: int) -> tuple["Tensor", "Tensor"]:
        import torch

        rows = epoch_batch(self.seed, number, batch=self.batch_size, size=len(self.split.images))
        chance = random_bits(self.seed, number, 1, size=3 * self.batch_size).reshape(3, -1)
        share = rank_share(np.arange(self.batch_size), self.rank, self.world_size)
        images = flip_and_shift(self.split.images[rows[share]], chance[:, share], self.augment)
        labels = torch.from_numpy(self.split.labels[rows[share]])
        return to_pixels(images, self.size), labels.float() if self.multi_label else labels


def flip_and_shift(images: NDArray[np.uint8], chance: NDArray[np.uint64], augment: Augment) -> NDArray[np.uint8]:
    """Images (B, S, S) or (B, S, S, 3), augmented by random bits (3, B)."""
    if augment == "none":
        return images
    out = images.copy()
    mirrored = (chance[0] >> np.uint64(63)).astype(bool)
    out[mirrored] = out[mirrored, :, ::-1]
    if augment == "flip-shift":
        reach = max(1, images.shape[1] // 8)
        moves = (chance[1:] >> np.uint64(11)) % np.uint64(2 * reach + 1)  # (2, B)
        padded = np.pad(out, [(0, 0), (reach, reach), (reach, reach)] + [(0, 0)] * (images.ndim - 3))
        side = images.shape[1]
        for i, (down, right) in enumerate(moves.T.astype(int)):
            out[i] = padded[i, down : down + side, right : right + side]
    return out
