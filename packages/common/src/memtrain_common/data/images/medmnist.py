"""Reading a MedMNIST npz file, with everything checked that can be: checksum, keys, shapes, labels."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ..unpacking import NPZ_ERRORS, check_unpacked, npz_reason
from .image_set import SPLITS, ArrayImages, ImageSet, ImageSplit
from .medmnist_sets import SETS, SIZES, MedMNISTSet


def file_name(flag: str, size: int = 28) -> str:
    """The published name of a set's file: `breastmnist.npz`, `breastmnist_64.npz`."""
    return f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz"


def read_medmnist(flag: str, folder: Path, size: int = 28, *, verify: bool = True) -> ImageSet:
    """A published set from its npz file.

    Args:
        flag: the set, such as `breastmnist`.
        folder: where the file lies under its published name.
        size: 28, 64, 128 or 224 pixels.
        verify: compare the file's MD5 with the published one; without it, a file of one's own in the
            same form is read, whose counts may differ.
    """
    if flag not in SETS:
        raise UserError(f"{flag!r} is no MedMNIST 2D set: choose one of {', '.join(SETS)}")
    if size not in SIZES:
        raise UserError(f"MedMNIST images have {', '.join(map(str, SIZES))} pixels, not {size}")
    known = SETS[flag]
    path = folder / file_name(flag, size)
    if not path.is_file():
        raise UserError(f"{path} is not there: put the set's npz file under this name")
    if verify:
        _check_md5(path, known.md5[SIZES.index(size)])
    try:
        check_unpacked(path)
        with np.load(path, allow_pickle=False) as arrays:
            splits = {split: _split(arrays, split, known, size, path) for split in SPLITS}
    except NPZ_ERRORS as error:
        raise UserError(f"{path} is damaged or no npz file of numbers: {npz_reason(error)}") from error
    return ImageSet(flag, known.task, tuple(map(str, range(known.classes))), splits, size, path.stem)


def _check_md5(path: Path, published: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != published:
        raise UserError(f"{path} has MD5 {found}, and the published file has {published}: fetch it again")


def _split(arrays: Mapping[str, np.ndarray], split: str, known: MedMNISTSet, size: int, path: Path) -> ImageSplit:
    for kind in ("images", "labels"):
        if f"{split}_{kind}" not in arrays:
            raise UserError(
                f"{path} has no {split}_{kind}: a MedMNIST file holds images and labels of train, val, test"
            )
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    shape = (size, size) if known.channels == 1 else (size, size, 3)
    if not len(images):
        raise UserError(f"{path} has no pictures in {split}: a set needs some in each of {', '.join(SPLITS)}")
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise UserError(
            f"{split}_images of {path} are {images.dtype} {images.shape}, and {known.flag} has uint8 (N, "
            f"{', '.join(map(str, shape))})"
        )
    if len(labels) != len(images):
        raise UserError(f"{path} has {len(labels)} {split} labels for {len(images)} images")
    return ImageSplit(ArrayImages(images), check_labels(labels, known.task, known.classes, f"{split}_labels of {path}"))


def check_labels(labels: np.ndarray, task: str, classes: int, what: str) -> NDArray[np.int64]:
    """Labels as (N,) or, for a multi-label task, (N, classes); refused where they do not fit the task."""
    multi_label = task.startswith("multi-label")
    columns = classes if multi_label else 1
    labels = labels.reshape(len(labels), -1)  # also labels saved as (N,)
    if labels.shape[1] != columns:
        raise UserError(f"{what} have {labels.shape[1]} columns, and a {task} task of {classes} classes has {columns}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{what} are {labels.dtype}, and labels are whole numbers")
    highest = 1 if multi_label else classes - 1
    if labels.size and (labels.min() < 0 or labels.max() > highest):
        raise UserError(f"{what} lie in {labels.min()}..{labels.max()}, and must lie in 0..{highest}")
    whole = labels.astype(np.int64)
    return whole if multi_label else whole[:, 0]
